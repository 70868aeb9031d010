"""Samples that an earlier command drew, read for training."""

import logging
from collections.abc import Sequence

from sharpen.errors import InputError, RecordError
from sharpen.records import Row, check_ids, read_rows
from sharpen.sampling import Prompt

from .stages import first_samples

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
