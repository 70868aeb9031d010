"""What a command reads: prompts with their task, a model, samples that another command drew.

open_source         prompts of a task, with its grader, or of a file: `Source`
load                the model and its tokenizer
read_samples        samples of `sharpen sample`, for training
check_provenance    how they were drawn, and which trainings may take them
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sharpen.errors import InputError, RecordError, check_value
from sharpen.models import SHIPPED, load_model, load_tokenizer
from sharpen.records import PromptRecord, Row, check_ids, file_digest, read_prompts, read_rows
from sharpen.runs import Settings
from sharpen.sampling import Prompt
from sharpen.sampling.base import has_chat_template
from sharpen.sampling.metropolis import Metropolis
from sharpen.sampling.smc import ParticleFilter
from sharpen.scoring import rewards
from sharpen.scoring.rewards import options_needed
from sharpen.tasks import Example, Task, get_task

from .options import ModelOptions, OfflineConfig, PromptOptions
from .stages import RUN, SAMPLES, settings_beside, some_samples, token_keys

log = logging.getLogger("sharpen")

# what only a power sampler writes into a row
POWER_COLUMNS = {"accepted": "mh", "log_z": "smc"}


@dataclass(frozen=True)
class Source:
    """The prompts, in order; task and examples are None for prompts from a file."""

    records: list[PromptRecord]
    task: Task | None
    examples: list[Example] | None

    def answers(self, samples: list[Row]) -> list[list[str | None]] | None:
        """What each completion of `samples` claims; None without a task."""
        if self.task is None or self.examples is None:
            return None
        return [
            [self.task.answer(example, text) for text in row["completions"]]
            for example, row in zip(self.examples, samples, strict=True)
        ]

    def reward_options(self, reward: str, samples: list[Row]) -> dict[str, Any]:
        """What `reward` wants besides statistics; its samples' answers need a task."""
        needed = options_needed(reward)
        answers = (self.answers(samples) or []) if "answers" in needed else []
        given = {
            "answers": [answer for group in answers for answer in group],
            # equal for equal completions of a prompt
            "keys": [key for row in samples for key in token_keys(row)],
        }
        return {name: given[name] for name in needed}


def check_reward(reward: str, task: str | None) -> None:
    """Reject a reward that does not exist, or needs answers that nobody extracts."""
    # equal completions are known by their ids; what they claim, by a task
    options = ("keys",) if task is None else ("keys", "answers")
    rewards.check_reward(
        reward, "which only a task can extract; give `--task`, or another reward", options=options
    )


def open_source(options: PromptOptions, tokenizer: PreTrainedTokenizerBase | None) -> Source:
    """Read the prompts that `options` name."""
    check_source(options)
    if options.prompts is not None:
        records = read_prompts(options.prompts)
        return Source(records[: options.limit], None, None)
    assert options.task is not None
    task = get_task(options.task)
    parts = [task.examples(split) for split in options.split.split("+")]
    examples = [example for part in parts for example in part][: options.limit]
    chat = has_chat_template(tokenizer)
    records = [
        PromptRecord(example.id, example.id, task.prompt(example, shots=options.shots, chat=chat))
        for example in examples
    ]
    return Source(records, task, examples)


def check_source(options: PromptOptions) -> None:
    """Reject contradictory options before anything is loaded."""
    if (options.task is None) == (options.prompts is None):
        got = "neither" if options.task is None else "both"
        raise InputError(f"give one of `--task` and `--prompts`, got {got}.")
    check_value("limit", options.limit, options.limit is None or options.limit >= 1, "at least 1")
    if options.prompts is not None and options.shots:
        raise InputError("`shots` needs `--task`; write worked examples into the prompts file.")
    parts = options.split.split("+")
    if options.task is not None and len(set(parts)) < len(parts):
        raise InputError(f"`split` must name each split once, got {options.split!r}.")


def source_settings(options: PromptOptions) -> dict[str, Any]:
    """What the outputs depend on: names, and the content of the prompts file."""
    digest = file_digest(options.prompts) if options.prompts is not None else None
    return {
        "task": options.task,
        "split": options.split if options.task else None,
        "shots": options.shots,
        "prompts": options.prompts,
        "prompts_digest": digest,
        "limit": options.limit,
    }


def model_settings(options: ModelOptions, device: str) -> dict[str, Any]:
    """What the outputs depend on: the model and how it is run."""
    name = options.model
    is_folder = name not in ("", *SHIPPED) and Path(name).exists()
    return {
        "model": str(Path(name).resolve()) if is_folder else name,
        "dtype": options.dtype,
        "device": device,
        "max_tokens": options.max_tokens,
    }


def load(options: ModelOptions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer that `options` name."""
    check_value("max_tokens", options.max_tokens, options.max_tokens >= 1, "at least 1")
    tokenizer = load_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
    model = load_model(
        options.model,
        device=options.device,
        dtype=None if options.dtype == "auto" else options.dtype,
        trust_remote_code=options.trust_remote_code,
        allow_pickle=options.allow_pickle,
    )
    return model, tokenizer


def read_samples(path: str, prompts: Sequence[Prompt], n: int) -> list[Row]:
    """The first n samples of each prompt that an earlier command drew, in the order of `prompts`.

    A prompt with fewer has all of its own, which is said once.
    """
    rows: dict[str, Row] = {}
    for place, row in read_rows(path):
        _check_samples(place, row)
        if row["prompt_id"] in rows:
            raise RecordError(
                f"{place}: `prompt_id` {row['prompt_id']!r} must be there once, got it again; "
                "give a file of one `sharpen sample`."
            )
        rows[row["prompt_id"]] = row
    for prompt in prompts:
        row = rows.get(prompt.id)
        if row is None or row["prompt_ids"] != list(prompt.ids):
            why = "none" if row is None else "samples of other tokens"
            raise InputError(
                f"`samples` {path!r} must hold samples of prompt {prompt.id!r}, got {why}; "
                "give the same prompts as when they were drawn."
            )
    few = [k for prompt in prompts if (k := len(rows[prompt.id]["completions"])) < n]
    if few:
        log.warning(
            "`n` is %d, but %d of %d prompts in %s have fewer samples, the least %d; all of "
            "theirs are taken.",
            *(n, len(few), len(prompts), path, min(few)),
        )
    return [some_samples(rows[prompt.id], 0, n) for prompt in prompts]


def _check_samples(place: str, row: Row) -> None:
    lists = ("completions", "completion_ids", "finish_reasons")
    for name in ("prompt_id", "prompt_ids", *lists):
        if name not in row:
            raise RecordError(
                f"{place}: must have the field `{name}`; give a file of `sharpen sample`."
            )
    if not isinstance(row["prompt_id"], str):
        raise RecordError(f"{place}: `prompt_id` must be text, got {row['prompt_id']!r}.")
    sizes = [len(row[name]) if isinstance(row[name], list) else None for name in lists]
    if None in sizes or len(set(sizes)) > 1:
        raise RecordError(
            f"{place}: {', '.join(f'`{name}`' for name in lists)} must be lists of one length, "
            f"got {', '.join(map(str, sizes))}."
        )
    for ids in row["completion_ids"]:
        check_ids(place, "completion_ids", ids)


@dataclass(frozen=True)
class Provenance:
    """How samples were drawn.

    Log-probs in a file of samples are raw whatever the distribution: those of the model at
    temperature 1 (`Samples`).

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
        """Whether the distribution is a model's own."""
        return (self.alpha, self.temperature, self.top_p) == (1.0, 1.0, 1.0)

    def __str__(self) -> str:
        """In words."""
        power = "" if self.alpha is None else f" alpha {self.alpha:g}"
        parts = [f"`--sampler {self.sampler}`{power}"] if self.sampler != "model" else []
        for name, value in (("temperature", self.temperature), ("top_p", self.top_p)):
            parts += [f"{name} {value:g}"] if value != 1 else []
        return "draws of " + (self.model or "a model") + "".join(f", {part}" for part in parts)


def check_provenance(
    config: OfflineConfig, plain: Literal["must", "should", "any"], by: str
) -> None:
    """Reject samples that were drawn otherwise than a training assumes, or warn of them.

    Samples that the command is to draw itself are looked at as well as given ones. A file of which
    nothing is known is taken at its word.

    Args:
        config: Of the command.
        plain: Whether the optimum is the stated one on plain draws of the base alone ("must"),
            whether the paper's loss has it so ("should"), or whether any samples will do.
        by: What has that optimum, as it is typed.
    """
    base = model_settings(config, "")["model"]
    drawn = Provenance(base, temperature=config.temperature, top_p=config.top_p)
    found = read_provenance(config.samples) if config.samples is not None else drawn
    if found is None:
        return
    is_other = found.endpoint is None and found.model is not None and found.model != base
    if config.samples is not None and config.scores == "sampler":
        if is_other:
            raise InputError(
                f"`scores` sampler must come with samples whose log-probs are those of {base}, got "
                f"{found}; use `--scores scorer`."
            )
        if found.endpoint is not None:
            log.warning(
                "log-probs by %s at %s are taken as those of %s; `--scores scorer` computes them.",
                *(found.model, found.endpoint, base),
            )
    if plain == "any" or (found.is_plain and not is_other):
        return
    given = f"`samples` {config.samples!r}"
    where = "`temperature` and `top_p`" if config.samples is None else given
    if plain == "must":
        raise InputError(
            f"{where} must make plain draws of {base} for {by}, whose optimum is another on other "
            f"samples, got {found}; use `--weights equal` or `best`, or draw with `--sampler "
            "model`, temperature 1 and top_p 1."
        )
    log.warning(
        "%s: %s takes pairs of plain draws of %s, got %s; its optimum is the same only where the "
        "model reaches it exactly.",
        *(where, by, base, found),
    )


def read_provenance(path: str) -> Provenance | None:
    """How the samples of a file were drawn.

    Told by the settings beside it: FILE.run.json of `sharpen sample`, or run.json in the run
    directory of another command. Where there are none, the rows themselves tell a power sampler.
    """
    place = Path(path)
    if not place.is_file():
        return None
    rows = read_rows(path)
    return provenance_of(_settings_of(place), next((row for _, row in rows), None))


def provenance_of(settings: Settings | None, row: Row | None = None) -> Provenance | None:
    """How samples were drawn; None where nobody says.

    Args:
        settings: Those beside the file.
        row: One of its rows.

    Example:
        >>> print(provenance_of({"model": "game24", "temperature": 0.5, "top_p": 1.0}))
        draws of game24, temperature 0.5
        >>> print(provenance_of({"model": "game24", "temperature": 1.0, "sampler": "mh"}))
        draws of game24, `--sampler mh` alpha 4
        >>> provenance_of(None, {"log_z": -2.5}).is_plain
        False
    """
    by_row = next((POWER_COLUMNS[name] for name in POWER_COLUMNS if name in (row or {})), None)
    # settings of what did not draw, such as `sharpen score`, say nothing of it
    if settings is None or "temperature" not in settings:
        return None if by_row is None else Provenance(sampler=by_row, alpha=None)
    sampler = settings.get("sampler", "model")
    alpha = {"mh": Metropolis.alpha, "smc": ParticleFilter.alpha}.get(sampler, 1.0)
    # `xpo` has an alpha too: its optimism
    given = settings.get("alpha") if sampler in POWER_COLUMNS.values() else None
    endpoint = settings.get("endpoint")
    return Provenance(
        model=settings.get("model") if endpoint is None else settings.get("endpoint_model"),
        endpoint=endpoint,
        sampler=sampler,
        alpha=alpha if given is None else given,
        temperature=settings["temperature"],
        top_p=settings.get("top_p", 1.0),
    )


def _settings_of(path: Path) -> Settings | None:
    found = settings_beside(path)
    if path.name == SAMPLES and not found.is_file():
        found = path.with_name(RUN)
    if not found.is_file():
        return None
    wanted = f"{str(found)!r} must hold the settings of its samples, got"
    try:
        settings = json.loads(found.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{wanted} what is no JSON ({error}); mend or remove it.") from error
    if not isinstance(settings, dict):
        raise InputError(f"{wanted} {type(settings).__name__}; mend or remove it.")
    return settings
