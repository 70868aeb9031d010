"""What the trainings share: `sft` and `rlhf` are `train_offline`, and `xpo` uses its parts.

    check_training          rejects bad options before anything is loaded
    train_offline           sample once -> score by the base model -> choose -> fit -> summary
    rate                    log-probs and rewards under the base model: `Drawn`
    WorkerGroup             several processes: rank 0 runs the command, all of them fit

Samples are drawn once and kept (`samples.jsonl`), and so are their log-probs under the base model
(`scores.jsonl`), which are the rewards and the reference of every later step. With
`torchrun --nproc_per_node 8 -m sharpen sft ...`

    rank 0    sample, score, choose  ->  fit  ->  summary
    others    wait                   ->  fit  ->  wait for another fit, or for the end

Only rank 0 reads prompts and samples and writes files; the others receive what is fitted.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sharpen.errors import InputError, SharpenError
from sharpen.models import load_model
from sharpen.records import Messages, Row, file_digest, write_text
from sharpen.runs import Journal, Run, Settings
from sharpen.sampling.base import render_all
from sharpen.sampling.hf import TransformersSampler
from sharpen.scoring import Scorer, Scores
from sharpen.scoring.rewards import stats_needed
from sharpen.training.fit import LOSSES, MODEL, fit, require_train
from sharpen.training.groups import Group
from sharpen.training.losses import Objective
from sharpen.training.options import FitOptions, more_arguments, trainer_arguments

from .engines import sampling_config
from .inputs import (
    Source,
    check_reward,
    check_source,
    load,
    model_settings,
    open_source,
    read_samples,
    source_settings,
)
from .options import OfflineConfig, TrainConfig
from .stages import (
    RUN,
    SAMPLES,
    SCORES,
    SUMMARY,
    TIMINGS,
    kept_scores,
    sample_into,
    score_samples,
    seconds_of,
    versions_of,
)

log = logging.getLogger("sharpen")

PAIRS = "pairs.jsonl"
# how long rank 0 may take to draw
WAIT = timedelta(days=30)


def check_training(config: TrainConfig, reward: str) -> FitOptions:
    """Reject bad options before anything is loaded or written; how to fit."""
    check_source(config)
    names = ("lr", "epochs", "batch", "lora_rank", "save_every", "seed", "max_tokens")
    given = {name: getattr(config, name) for name in names}
    options = FitOptions(**given, more=more_arguments(config.trainer))
    samples = getattr(config, "samples", None)
    if samples is not None and not Path(samples).is_file():
        raise InputError(f"cannot read {samples!r}: no such file; check `--samples`.")
    require_train(lora=config.lora_rank > 0)
    check_reward(reward, config.task)
    if config.device is not None and ":" in config.device:
        raise InputError(
            f"`device` must be cpu or cuda in training, got {config.device!r}; choose a GPU with "
            "CUDA_VISIBLE_DEVICES."
        )
    is_cpu = config.device == "cpu" or not torch.cuda.is_available()
    trainer_arguments(options, Path(config.out), is_cpu=is_cpu)
    if is_cpu:
        # else processes of a launcher take GPUs where there are some
        options = replace(options, more={**options.more, "use_cpu": True})
    return options


@dataclass(frozen=True)
class Drawn:
    """Samples of every prompt, and what the base model thinks of them.

    Attributes:
        rows: One a prompt, as in `samples.jsonl`.
        scores: Under the base model; cut samples are not valid.
        reward: Of each completion, all prompts end to end.
        reference: log pi_base of each completion, in nats.
        prompts: One a row, as they were given: text or messages.
    """

    rows: list[Row]
    scores: Scores
    reward: Float64[Tensor, " N"]
    reference: Float64[Tensor, " N"]
    prompts: list[str | Messages]

    @property
    def usable(self) -> Bool[Tensor, " N"]:
        """Which completions may be fitted: eligible, with a finite log-prob and reward."""
        return self.scores.eligible & self.reference.isfinite() & self.reward.isfinite()


@dataclass(frozen=True)
class Choice:
    """What is fitted.

    Attributes:
        groups: The completions, and what is known of them.
        objective: The loss.
        found: For the summary.
        what: How many of what, in words.
    """

    groups: list[Group]
    objective: Objective
    found: dict[str, Any]
    what: str


def train_offline(
    command: str, config: OfflineConfig, own: dict[str, Any], choose: Callable[[Drawn], Choice]
) -> None:
    """Run a training that samples once, or go on with it.

    Args:
        command: Its name.
        config: Its options.
        own: Those of its options that no other training has.
        choose: What to fit, of the samples that the base model has rated.
    """
    options = check_training(config, config.reward)

    def lead(workers: WorkerGroup) -> None:
        draws, out = sampling_config(config), Path(config.out)
        model, tokenizer = load_base(config)
        source = open_source(config, tokenizer)
        prompts = render_all(source.records, tokenizer)
        sampler = TransformersSampler(model, tokenizer, max_tokens=config.max_tokens)
        sampler.check(prompts, draws)
        claimed = settings(command, config, own, model.device, workers.size)
        with Run(out / RUN, claimed, outputs_of(out)):
            # sample
            if config.samples is not None:
                rows = read_samples(config.samples, prompts, config.n)
            else:
                timings = Journal(out / TIMINGS)
                rows = sample_into(out / SAMPLES, sampler, prompts, draws, timings=timings)
            # score
            scorer = Scorer(model, max_tokens=config.max_tokens)
            drawn = rate(out, scorer, source, rows, config.reward, config.scores)
            if not drawn.usable.any():
                raise InputError(
                    f"no sample can be fitted: none of {len(drawn.usable)} was ended by the model "
                    "with a finite log-prob and reward; raise `--max-new-tokens`."
                )
            # choose, fit, and say so
            choice = choose(drawn)
            fitted = FitTask(out, None, model.dtype, choice.groups, choice.objective, options)
            workers.fit(fitted, model, tokenizer)
            found = {"prompts": len(prompts), "prompts_fitted": len(choice.groups), **choice.found}
            of = f"of {len(choice.groups)} of {len(prompts)} prompts"
            finish(out, config, found, f"fitted {choice.what} {of}")

    run_on_rank_zero(config, lead)


def rate(
    out: Path,
    scorer: Scorer,
    source: Source,
    rows: list[Row],
    reward: str,
    scores_of: Literal["scorer", "sampler"] = "scorer",
) -> Drawn:
    """Log-probs and rewards of samples under the base model, kept in `out`."""
    stats = tuple(dict.fromkeys(["logprob", *stats_needed(reward)]))
    if scores_of == "sampler":
        if set(stats) != {"logprob"} or any("logprobs" not in row for row in rows):
            raise InputError(
                f"`scores` sampler must come with samples that hold `logprobs`, and a reward of "
                f"them alone, got {reward}; leave it out."
            )
        scores = kept_scores(rows)
    else:
        scores = score_samples(out / SCORES, scorer, rows, stats, Journal(out / TIMINGS))
    scores.warn_of_nan()
    reward_N = scores.reward(reward, **source.reward_options(reward, rows)).double()
    given = {record.id: record.prompt for record in source.records}
    prompts = [given[row["prompt_id"]] for row in rows]
    return Drawn(rows, scores, reward_N, scores.reward("logprob").double(), prompts)


def finish(out: Path, config: TrainConfig, found: dict[str, Any], line: str) -> None:
    """Write the summary and say what there is now."""
    is_test = config.task is not None and "test" in config.split.split("+")
    summary = {
        # transductive where the model is fitted on the prompts of its test
        "setting": "transductive" if is_test else "inductive",
        **found,
        "seconds": seconds_of(*sorted(out.glob(f"**/{TIMINGS}"))),
        "versions": versions_of("sharpen", "torch", "transformers", "accelerate"),
    }
    write_text(out / SUMMARY, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    sys.stdout.write(f"{line}\nmodel: {out / MODEL}\n")


def outputs_of(out: Path) -> list[Path]:
    """What a training command writes."""
    return [out / name for name in (SAMPLES, SCORES, PAIRS, LOSSES, MODEL, SUMMARY)]


def load_base(config: TrainConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to start from; in fp32 if all of its weights are trained.

    Half-precision weights lose the small updates of a fine-tuning.
    """
    whole = config.dtype == "auto" and config.lora_rank == 0
    return load(replace(config, dtype="float32") if whole else config)


def settings(
    command: str,
    config: OfflineConfig,
    own: dict[str, Any],
    device: torch.device,
    n_processes: int = 1,
) -> Settings:
    """Everything that the outputs of `train_offline` depend on."""
    return {
        **training_settings(command, config, device, n_processes),
        "reward": config.reward,
        "scores": config.scores,
        **own,
        "samples": config.samples,
        "samples_digest": None if config.samples is None else file_digest(config.samples),
    }


def training_settings(
    command: str, config: TrainConfig, device: torch.device, n_processes: int = 1
) -> Settings:
    """Everything that the outputs of a training depend on, but its own options."""
    return {
        "command": command,
        **model_settings(config, device.type),
        **source_settings(config),
        **config.draw_settings(),
        **config.train_settings(),
        # a step takes a batch of each
        **({"processes": n_processes} if n_processes > 1 else {}),
    }


@dataclass(frozen=True)
class FitTask:
    """A fit.

    Attributes:
        out: The folder that it is kept in.
        start: The folder of the model to begin with; None for the base.
        dtype: Of that model.
        groups: What is fitted.
        objective: Loss of a batch.
        options: How.
    """

    out: Path
    start: Path | None
    dtype: torch.dtype
    groups: list[Group]
    objective: Objective
    options: FitOptions


def run_on_rank_zero(config: TrainConfig, lead: Callable[["WorkerGroup"], None]) -> None:
    """Run a training: `lead` in the first process, its fits in all of them."""
    workers = WorkerGroup()
    if workers.is_first:
        with workers.leading():
            lead(workers)
        return

    def of_type(dtype: torch.dtype) -> PreTrainedModel:
        name = str(dtype).removeprefix("torch.")
        return load(replace(config, device="cpu", dtype=name))[0]

    workers.follow(of_type, trust_remote_code=config.trust_remote_code)


class WorkerGroup:
    """The processes that a launcher started; without a launcher, this one alone.

    To be made by all of them, once `TrainingArguments` have joined them.
    """

    def __init__(self):
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.is_first = self.size == 1 or dist.get_rank() == 0
        self._is_fitting = False
        # of its own, since it waits longer than a gradient may take (Any: typed as a number, too)
        self._group: Any = None
        if self.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=WAIT)

    def fit(
        self, task: FitTask, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Fit in all processes what is not fitted yet; called by the first."""
        if (task.out / MODEL).exists():
            return
        started = time.monotonic()
        self._send(task)
        self._is_fitting = True
        fit(model, tokenizer, task.groups, task.objective, task.options, task.out)
        self._is_fitting = False
        seconds = time.monotonic() - started
        Journal(task.out / TIMINGS).append([{"stage": "train", "seconds": seconds}])

    @contextmanager
    def leading(self) -> Iterator[None]:
        """While open, the other processes wait for fits; in the end they are let go."""
        try:
            yield
        finally:
            # in the middle of a fit they listen to nothing else
            if not self._is_fitting:
                self._send(None)

    def follow(
        self, load_base: Callable[[torch.dtype], PreTrainedModel], *, trust_remote_code: bool
    ) -> None:
        """Fit what the first process sends until it lets go; called by the others.

        Args:
            load_base: Loads, as that type, the model of fits that name no other.
            trust_remote_code: Run model code that comes with those that are named.
        """
        logging.getLogger("sharpen").setLevel(logging.ERROR)
        trust = {"trust_remote_code": trust_remote_code}
        while (task := self._received()) is not None:
            if task.start is None:
                model = load_base(task.dtype)
            else:
                model = load_model(task.start, device="cpu", dtype=task.dtype, **trust)
            try:
                fit(model, None, task.groups, task.objective, task.options, task.out)
            except SharpenError as error:
                # the first process has met it too, and says so
                raise SystemExit(2) from error

    def _send(self, task: FitTask | None) -> None:
        if self._group is not None:
            dist.broadcast_object_list([task], group=self._group)

    def _received(self) -> FitTask | None:
        found: list[FitTask | None] = [None]
        dist.broadcast_object_list(found, group=self._group)
        return found[0]
