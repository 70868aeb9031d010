"""Prompts of a command, from a task or a file, with the task's grader where there is one.

Samples that an earlier command drew, read for training.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sharpen.errors import InputError, RecordError
from sharpen.models import SHIPPED, load_model, load_tokenizer
from sharpen.records import PromptRecord, Row, check_ids, file_digest, read_prompts, read_rows
from sharpen.sampling import Prompt
from sharpen.sampling.base import has_chat_template
from sharpen.scoring.rewards import REWARDS, options_needed
from sharpen.tasks import Example, Task, get_task

from .options import ModelOptions, PromptOptions
from .stages import first_samples, token_keys


@dataclass(frozen=True)
class Source:
    """The prompts, in order; task and examples are None for prompts from a file."""

    records: list[PromptRecord]
    task: Task | None
    examples: list[Example] | None

    @property
    def name(self) -> str | None:
        """Name of the task."""
        return self.task.name if self.task else None

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
    """Refuse a reward that does not exist, or needs answers that nobody extracts.

    Raises:
        InputError: If so.
    """
    if reward not in REWARDS:
        raise InputError(f"`reward` must be one of {', '.join(REWARDS)}, got {reward!r}.")
    if options_needed(reward) and task is None:
        raise InputError(
            f"`reward` {reward} needs answers, which only a task can extract; "
            "give `--task`, or another reward."
        )


def open_source(options: PromptOptions, tokenizer: PreTrainedTokenizerBase | None) -> Source:
    """Read the prompts that `options` name.

    Raises:
        InputError: If neither or both of task and prompts are given, or either is bad.
    """
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
    """Refuse contradictory options before anything is loaded.

    Raises:
        InputError: If neither or both of task and prompts are given, or a number is bad.
    """
    if (options.task is None) == (options.prompts is None):
        got = "neither" if options.task is None else "both"
        raise InputError(f"give one of `--task` and `--prompts`, got {got}.")
    if options.limit is not None and options.limit < 1:
        raise InputError(f"`limit` must be at least 1, got {options.limit}.")
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
    """The model and tokenizer that `options` name.

    Raises:
        InputError: If they cannot be loaded, or the budget is not positive.
    """
    if options.max_tokens < 1:
        raise InputError(f"`max_tokens` must be at least 1, got {options.max_tokens}.")
    tokenizer = load_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
    model = load_model(
        options.model,
        device=options.device,
        dtype=None if options.dtype == "auto" else options.dtype,
        trust_remote_code=options.trust_remote_code,
        allow_pickle=options.allow_pickle,
    )
    return model, tokenizer


log = logging.getLogger("sharpen")


def read_samples(path: str, prompts: Sequence[Prompt], n: int) -> list[Row]:
    """The first n samples of each prompt that an earlier command drew, in the order of `prompts`.

    A prompt with fewer has all of its own, which is said once.

    Raises:
        InputError: If a prompt has none, or its tokens were others.
        RecordError: If the file cannot be read, or a record is not one of `sharpen sample`.
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
            "theirs are taken.", n, len(few), len(prompts), path, min(few),
        )  # fmt: skip
    return [first_samples(rows[prompt.id], n) for prompt in prompts]


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
