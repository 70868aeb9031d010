"""The law that samples were drawn from, and the trainings that need it to be the base's own.

Samples of a file are described by the settings that lie beside it (`runs.py`): FILE.run.json of
`sharpen sample`, run.json of the run directory of another command. Where there are none, the rows
themselves tell a power sampler. The log-probs of a file are raw, whatever the law: those of the
model at temperature 1 (`Samples`).

A training command in several processes: the first runs it, the others fit along.

    torchrun --nproc_per_node 8 -m sharpen sft ...

    first     draw, rate, choose  ->  fit  ->  summary
    others    wait                ->  fit  ->  wait for another fit, or for the end

Prompts, samples and files are the first one's affair; the others get what is fitted from it.

Stages that `sft`, `rlhf` and `xpo` share: what is refused, samples and their rewards, the end.

Samples are drawn once and kept (`samples.jsonl`), and so are their log-probs under the base model
(`scores.jsonl`): they are the rewards and the reference of every later step.

What `sft` and `rlhf` have in common: sample once, rate, choose what to fit, fit it.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sharpen.errors import InputError, SharpenError
from sharpen.models import load_model
from sharpen.records import Row, file_digest, read_rows, write_text
from sharpen.runs import Journal, Run, Settings
from sharpen.sampling import Prompt
from sharpen.sampling.base import render_all
from sharpen.sampling.hf import TransformersSampler
from sharpen.sampling.metropolis import Metropolis
from sharpen.sampling.smc import ParticleFilter
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
from .options import OfflineConfig, PromptOptions, TrainConfig
from .stages import kept_scores, sample_into, score_samples, settings_beside

if TYPE_CHECKING:
    pass

log = logging.getLogger("sharpen")

# what only a power sampler writes into a row
TOLD_BY = {"accepted": "mh", "log_z": "smc"}
# of the draws of a run directory
POOL, RUN = "samples.jsonl", "run.json"


@dataclass(frozen=True)
class Law:
    """A law of completions.

    Attributes:
        model: Name or folder; None where it is not known.
        endpoint: Where a server drew; its model's name and the base's need not agree.
        sampler: "model", or "mh" or "smc" of the power distribution.
        alpha: The power; None where it is not known.
        temperature: Of each token; 0 is greedy.
        top_p: Mass of the nucleus.
    """

    model: str | None = None
    endpoint: str | None = None
    sampler: str = "model"
    alpha: float | None = 1.0
    temperature: float = 1.0
    top_p: float = 1.0

    @property
    def is_plain(self) -> bool:
        """Whether it is a model's own."""
        return (self.alpha, self.temperature, self.top_p) == (1.0, 1.0, 1.0)

    def __str__(self) -> str:
        """In words."""
        power = "" if self.alpha is None else f" alpha {self.alpha:g}"
        parts = [f"`--sampler {self.sampler}`{power}"] if self.sampler != "model" else []
        for name, value in (("temperature", self.temperature), ("top_p", self.top_p)):
            parts += [f"{name} {value:g}"] if value != 1 else []
        return "draws of " + (self.model or "a model") + "".join(f", {part}" for part in parts)


def law_of(settings: Settings | None, row: Row | None = None) -> Law | None:
    """The law of a file of samples; None where nobody says.

    Args:
        settings: Those beside the file.
        row: One of its rows.

    Example:
        >>> print(law_of({"model": "game24", "temperature": 0.5, "top_p": 1.0}))
        draws of game24, temperature 0.5
        >>> print(law_of({"model": "game24", "temperature": 1.0, "top_p": 1.0, "sampler": "mh"}))
        draws of game24, `--sampler mh` alpha 4
        >>> law_of(None, {"log_z": -2.5}).is_plain
        False
    """
    told = next((TOLD_BY[name] for name in TOLD_BY if name in (row or {})), None)
    # settings of what did not draw, such as `sharpen score`, say nothing of the law
    if settings is None or "temperature" not in settings:
        return None if told is None else Law(sampler=told, alpha=None)
    sampler = settings.get("sampler", "model")
    alpha = {"mh": Metropolis.alpha, "smc": ParticleFilter.alpha}.get(sampler, 1.0)
    # `xpo` has an alpha too: its optimism
    given = settings.get("alpha") if sampler in TOLD_BY.values() else None
    endpoint = settings.get("endpoint")
    return Law(
        model=settings.get("model") if endpoint is None else settings.get("endpoint_model"),
        endpoint=endpoint,
        sampler=sampler,
        alpha=alpha if given is None else given,
        temperature=settings["temperature"],
        top_p=settings.get("top_p", 1.0),
    )


def read_law(path: str) -> Law | None:
    """The law of the samples in a file.

    Raises:
        InputError: If the settings beside it cannot be read.
    """
    place = Path(path)
    if not place.is_file():
        return None
    rows = read_rows(path)
    return law_of(_settings(place), next((row for _, row in rows), None))


def check_law(config: OfflineConfig, plain: Literal["must", "should", "any"], by: str) -> None:
    """Refuse samples of another law than a training is made for, or warn of them.

    Samples that the command is to draw itself are looked at as well as given ones. A file of which
    nothing is known is taken at its word.

    Args:
        config: Of the command.
        plain: Whether the optimum is the stated one on plain draws of the base alone ("must"),
            whether the paper's loss has it so ("should"), or whether any samples will do.
        by: What has that optimum, as it is typed.

    Raises:
        InputError: If the law must be plain and is not, or if `--scores sampler` would take
            another model's log-probs for the base's.
    """
    base = model_settings(config, "")["model"]
    given = config.samples is not None
    drawn = Law(base, temperature=config.temperature, top_p=config.top_p)
    law = read_law(config.samples) if config.samples is not None else drawn
    if law is None:
        return
    is_other = law.endpoint is None and law.model is not None and law.model != base
    if given and config.scores == "sampler":
        _check_scores(law, base, is_other=is_other)
    if plain == "any" or (law.is_plain and not is_other):
        return
    where = f"`samples` {config.samples!r}" if given else "`temperature` and `top_p`"
    if plain == "must":
        raise InputError(
            f"{where} must make plain draws of {base} for {by}, whose optimum is another on other "
            f"samples, got {law}; use `--weights equal` or `best`, or draw with `--sampler model`, "
            "temperature 1 and top_p 1."
        )
    log.warning(
        "%s: %s takes pairs of plain draws of %s, got %s; its optimum is the same only where the "
        "model reaches it exactly.", where, by, base, law,
    )  # fmt: skip


# base: name or folder, as settings have it
def _check_scores(law: Law, base: Any, *, is_other: bool) -> None:
    if is_other:
        raise InputError(
            f"`scores` sampler must come with samples whose log-probs are those of {base}, got "
            f"{law}; use `--scores scorer`."
        )
    if law.endpoint is not None:
        log.warning(
            "log-probs by %s at %s are taken as those of %s; `--scores scorer` computes them.",
            law.model, law.endpoint, base,
        )  # fmt: skip


def _settings(path: Path) -> Settings | None:
    beside = [settings_beside(path)]
    if path.name == POOL:
        beside.append(path.with_name(RUN))
    found = next((place for place in beside if place.is_file()), None)
    if found is None:
        return None
    try:
        settings = json.loads(found.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{str(found)!r} must hold the settings of its samples, got what is no JSON "
            f"({error}); mend or remove it."
        ) from error
    if not isinstance(settings, dict):
        raise InputError(
            f"{str(found)!r} must hold the settings of its samples, got "
            f"{type(settings).__name__}; mend or remove it."
        )
    return settings


# drawing may take long
WAIT = timedelta(days=30)


@dataclass(frozen=True)
class Task:
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


class Crew:
    """The processes that a launcher started; one of itself without it.

    To be made by all of them, once `TrainingArguments` have joined them.
    """

    def __init__(self):
        self.n = dist.get_world_size() if dist.is_initialized() else 1
        self.is_first = self.n == 1 or dist.get_rank() == 0
        self._is_fitting = False
        # of its own, since it waits longer than a gradient may take (Any: typed as a number, too)
        self._group: Any = dist.new_group(backend="gloo", timeout=WAIT) if self.n > 1 else None

    def fit(
        self, task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        """Fit in all processes; the first calls it."""
        self._send(task)
        self._is_fitting = True
        fit(model, tokenizer, task.groups, task.objective, task.options, task.out)
        self._is_fitting = False

    @contextmanager
    def led(self) -> Iterator[None]:
        """While open, the others wait; in the end they are let go. For the first."""
        try:
            yield
        finally:
            # in the middle of a fit they listen to nothing else
            if not self._is_fitting:
                self._send(None)

    def follow(
        self, load_base: Callable[[torch.dtype], PreTrainedModel], *, trust_remote_code: bool
    ) -> None:
        """Fit what the first process sends until it lets go. For the others.

        Args:
            load_base: Loads, as that type, the model of fits that name no other.
            trust_remote_code: Run model code that comes with those that are named.
        """
        logging.getLogger("sharpen").setLevel(logging.ERROR)
        while (task := self._received()) is not None:
            model = load_base(task.dtype) if task.start is None else load_model(
                task.start, device="cpu", dtype=task.dtype, trust_remote_code=trust_remote_code
            )  # fmt: skip
            try:
                fit(model, None, task.groups, task.objective, task.options, task.out)
            except SharpenError as error:
                # the first process has met it too, and says so
                raise SystemExit(2) from error

    def _send(self, task: Task | None) -> None:
        if self._group is not None:
            dist.broadcast_object_list([task], group=self._group)

    def _received(self) -> Task | None:
        found: list[Task | None] = [None]
        dist.broadcast_object_list(found, group=self._group)
        return found[0]


SAMPLES, SCORES, PAIRS = "samples.jsonl", "scores.jsonl", "pairs.jsonl"
SUMMARY, TIMINGS = "summary.json", "timings.jsonl"


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
    options = fit_options(config)
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


def fit_options(config: TrainConfig) -> FitOptions:
    """The options of training as `fit` takes them."""
    names = ("lr", "epochs", "batch", "lora_rank", "save_every", "seed", "max_tokens")
    given = {name: getattr(config, name) for name in names}
    return FitOptions(**given, more=more_arguments(config.trainer))


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
        out / SAMPLES, sampler, prompts, sampling_config(config), label="sample", timings=timings
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


def fit_once(
    command: str, config: OfflineConfig, own: dict[str, Any], choose: Callable[[Drawn], Choice]
) -> None:
    """Run a command that samples once, or go on with it.

    Args:
        command: Its name.
        config: Its options.
        own: Those of its options that no other training command has.
        choose: What to fit, of the samples that the base model has rated.
    """
    options = check_training(config, config.reward)
    run_in_crew(config, partial(_lead, command, config, own, choose, options))


def _lead(
    command: str,
    config: OfflineConfig,
    own: dict[str, Any],
    choose: Callable[[Drawn], Choice],
    options: FitOptions,
    crew: Crew,
) -> None:
    draws = sampling_config(config)
    model, tokenizer = load_base(config)
    source = open_source(config, tokenizer)
    prompts = render_all(source.records, tokenizer)
    sampler = TransformersSampler(model, tokenizer, max_tokens=config.max_tokens)
    sampler.check(prompts, draws)
    out = Path(config.out)
    claimed = settings(command, config, own, model.device, crew.n)
    with Run(out / "run.json", claimed, outputs_of(out)):
        rows = draw(config, out, sampler, prompts, config.samples)
        scorer = Scorer(model, max_tokens=config.max_tokens)
        drawn = rate(out, scorer, source, rows, config.reward, config.scores)
        if not drawn.usable.any():
            raise InputError(
                f"no sample can be fitted: none of {len(drawn.usable)} was ended by the model with "
                "a finite log-prob and reward; raise `--max-new-tokens`."
            )
        choice = choose(drawn)
        task = Task(out, None, model.dtype, choice.groups, choice.objective, options)
        fit_into(crew, task, model, tokenizer)
        found = {"prompts": len(prompts), "prompts_fitted": len(choice.groups), **choice.found}
        of = f"of {len(choice.groups)} of {len(prompts)} prompts"
        finish(out, config, found, f"fitted {choice.what} {of}")


def settings(
    command: str,
    config: OfflineConfig,
    own: dict[str, Any],
    device: torch.device,
    n_processes: int = 1,
) -> dict[str, Any]:
    """Everything that the outputs depend on."""
    return {
        **training_settings(command, config, device, n_processes),
        "reward": config.reward,
        "scores": config.scores,
        **own,
        **samples_settings(config.samples),
    }
