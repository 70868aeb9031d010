"""Stages that `sft`, `rlhf` and `xpo` share: what is refused, samples and their rewards, the end.

Samples are drawn once and kept (`samples.jsonl`), and so are their log-probs under the base model
(`scores.jsonl`): they are the rewards and the reference of every later step.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sharpen.errors import InputError
from sharpen.records import Row, file_digest, write_text
from sharpen.runs import Journal
from sharpen.sampling import Prompt
from sharpen.sampling.hf import TransformersSampler
from sharpen.scoring import Scorer, Scores
from sharpen.scoring.rewards import stats_needed
from sharpen.training.fit import LOSSES, MODEL, require_train
from sharpen.training.options import FitOptions, trainer_arguments

from .crew import Crew, Task
from .given_samples import read_samples
from .options import DrawOptions, ModelOptions, PromptOptions, TrainOptions, required
from .sources import Source, check_reward, check_source, load, model_settings, source_settings
from .stages import kept_scores, sample_into, score_samples

SAMPLES, SCORES, PAIRS = "samples.jsonl", "scores.jsonl", "pairs.jsonl"
SUMMARY, TIMINGS = "summary.json", "timings.jsonl"


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainOptions, DrawOptions, PromptOptions, ModelOptions):
    """What every training command is told."""

    out: str = required("run directory; the same command again goes on where it stopped")

    def fit_options(self) -> FitOptions:
        """How to fit.

        Raises:
            InputError: If a value is out of its range.
        """
        return self.fitting(seed=self.seed, max_tokens=self.max_tokens)


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
    prompts: list[str | list[dict[str, str]]]

    @property
    def usable(self) -> Bool[Tensor, " N"]:
        """Which completions may be fitted: eligible, with a finite log-prob and reward."""
        return self.scores.eligible & self.reference.isfinite() & self.reward.isfinite()


def check_training(config: TrainConfig, reward: str) -> FitOptions:
    """Refuse bad options before anything is loaded or written.

    Raises:
        InputError: If an option is out of range, an extra is missing, or the reward cannot be
            computed.
    """
    check_source(config)
    options = config.fit_options()
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


def load_base(config: TrainConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to start from; in fp32 if all of its weights are trained.

    Half-precision weights lose the small updates of a fine-tuning.
    """
    whole = config.dtype == "auto" and config.lora_rank == 0
    return load(replace(config, dtype="float32") if whole else config)


def run_in_crew(config: TrainConfig, lead: Callable[[Crew], None]) -> None:
    """Run a training command: `lead` in the first process, its fits in all of them."""
    crew = Crew()
    if crew.is_first:
        with crew.led():
            lead(crew)
        return

    def of_type(dtype: torch.dtype) -> PreTrainedModel:
        name = str(dtype).removeprefix("torch.")
        return load(replace(config, device="cpu", dtype=name))[0]

    crew.follow(of_type, trust_remote_code=config.trust_remote_code)


def training_settings(
    command: str, config: TrainConfig, device: torch.device, n_processes: int = 1
) -> dict[str, Any]:
    """Everything that the outputs of a training command depend on, but its own options."""
    return {
        "command": command,
        **model_settings(config, device.type),
        **source_settings(config),
        **config.draw_settings(),
        **config.train_settings(),
        # a step takes a batch of each
        **({"processes": n_processes} if n_processes > 1 else {}),
    }


def samples_settings(path: str | None) -> dict[str, Any]:
    """What the outputs depend on where samples are given."""
    return {"samples": path, "samples_digest": None if path is None else file_digest(path)}


def draw(
    config: TrainConfig,
    out: Path,
    sampler: TransformersSampler,
    prompts: list[Prompt],
    given: str | None,
) -> list[Row]:
    """Samples of every prompt: drawn once into `out`, or the first n in the file `given`."""
    if given is not None:
        return read_samples(given, prompts, config.n)
    timings = Journal(out / TIMINGS)
    return sample_into(
        out / SAMPLES, sampler, prompts, config.sampling(), label="sample", timings=timings
    )


def rate(
    out: Path,
    scorer: Scorer,
    source: Source,
    rows: list[Row],
    reward: str,
    scores_of: Literal["scorer", "sampler"] = "scorer",
) -> Drawn:
    """Log-probs and rewards of samples under the base model, kept in `out`.

    Raises:
        InputError: If the sampler's log-probs are wanted and are not there, or not enough.
    """
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


def fit_into(
    crew: Crew, task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A fit by all processes, its time kept with the others."""
    if (task.out / MODEL).exists():
        return
    started = time.monotonic()
    crew.fit(task, model, tokenizer)
    Journal(task.out / TIMINGS).append([{"stage": "train", "seconds": time.monotonic() - started}])


def finish(out: Path, config: TrainConfig, found: dict[str, Any], line: str) -> None:
    """Write the summary and say what there is now."""
    seconds: dict[str, float] = {}
    for path in sorted(out.glob(f"**/{TIMINGS}")):
        for row in Journal(path).rows:
            seconds[row["stage"]] = seconds.get(row["stage"], 0.0) + row["seconds"]
    names = ("sharpen", "torch", "transformers", "accelerate")
    summary = {
        "setting": setting(config),
        **found,
        "seconds": seconds,
        "versions": {name: metadata.version(name) for name in names},
    }
    write_text(out / SUMMARY, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    sys.stdout.write(f"{line}\nmodel: {out / MODEL}\n")


def setting(config: PromptOptions) -> str:
    """Named "transductive" where the model is fitted on the prompts of its test."""
    is_test = config.task is not None and "test" in config.split.split("+")
    return "transductive" if is_test else "inductive"


def outputs_of(out: Path) -> list[Path]:
    """What a training command writes."""
    return [out / name for name in (SAMPLES, SCORES, PAIRS, LOSSES, MODEL, SUMMARY)]
