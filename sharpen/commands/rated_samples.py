"""Scored samples of a file, a prompt at a time: texts, ids and one reward of each completion.

A record holds `completions`, or one `completion`; the single ones of a prompt are put together. A
reward is taken from the record's `rewards` (`sharpen score`), or made of the token statistics that
it holds: `token_stats`, or the `logprobs` that a sampler kept.
"""

from collections.abc import Iterable
from dataclasses import replace
from math import isfinite
from typing import Any

import torch

from sharpen.errors import RecordError
from sharpen.records import (
    PromptRecord,
    Row,
    check_ids,
    check_prompt,
    check_text,
    content_id,
    read_rows,
)
from sharpen.scoring import Scores
from sharpen.scoring.rewards import REWARDS, options_needed, stats_needed
from sharpen.training.datasets import Rated
from sharpen_kernels import TokenStats

from .score import completion_text

NAN = float("nan")


def read_rated(path: str, reward: str | None, *, cut: bool) -> list[Rated]:
    """Every prompt of a file with its rated completions, in the order of their first records.

    Args:
        path: JSON lines, of `sharpen score` or `sharpen sample`.
        reward: Its name; None: completions are not rated and not looked at.
        cut: Whether completions that were cut at the token limit may be chosen.

    Raises:
        InputError: If the file cannot be read.
        RecordError: If a record is bad or has not the reward.
    """
    whole: list[Rated] = []
    singles: dict[str, list[Rated]] = {}
    for place, row in read_rows(path):
        group = _rated(place, row, reward, cut)
        if "completion" not in row:
            whole.append(group)
            continue
        together = singles.setdefault(group.prompt_id, [])
        if together and together[0].prompt != group.prompt:
            raise RecordError(
                f"{place}: `prompt_id` {group.prompt_id!r} must belong to one prompt, got another "
                f"at {together[0].place}."
            )
        # its place in the order of the file is that of its first record
        if not together:
            whole.append(group)
        together.append(group)
    return [
        _joined(singles[group.prompt_id])
        if singles.get(group.prompt_id, [None])[0] is group
        else group
        for group in whole
    ]


def with_prompts(
    groups: Iterable[Rated], records: Iterable[PromptRecord], path: str
) -> list[Rated]:
    """The groups with the prompts that they were drawn from, which may be messages.

    Raises:
        RecordError: If a group's `prompt_id` is not among them.
    """
    given = {record.id: record.prompt for record in records}
    found = []
    for group in groups:
        if group.prompt_id not in given:
            raise RecordError(
                f"{group.place}: `prompt_id` {group.prompt_id!r} must be in {path!r}; give the "
                "file that the samples were drawn from."
            )
        found.append(replace(group, prompt=given[group.prompt_id]))
    return found


def _rated(place: str, row: Row, reward: str | None, cut: bool) -> Rated:
    prompt = check_prompt(place, row)
    given = row.get("prompt_id")
    prompt_id = content_id(prompt) if given is None else check_text(place, "prompt_id", given)
    if reward is None:
        return Rated(place, prompt_id, prompt, [], [], [])
    if ("completion" in row) == ("completions" in row):
        got = "both" if "completion" in row else f"only {', '.join(row)}"
        raise RecordError(f"{place}: must have one of `completion` and `completions`, got {got}.")
    single = "completion" in row
    values = _listed(place, "completions", row["completion" if single else "completions"], single)
    texts = [completion_text(place, value) for value in values]
    ids = None
    if row.get("completion_ids") is not None:
        lists = _listed(place, "completion_ids", row["completion_ids"], single, len(texts))
        ids = [check_ids(place, "completion_ids", x) for x in lists]
    prompt_ids = row.get("prompt_ids")
    if prompt_ids is not None:
        check_ids(place, "prompt_ids", prompt_ids)
    rewards = _rewards(place, row, reward, single, len(texts))
    able = [bool(text) and isfinite(r) for text, r in zip(texts, rewards, strict=True)]
    reasons = row.get("finish_reason" if single else "finish_reasons")
    if reasons is not None and not cut:
        ends = _listed(place, "finish_reasons", reasons, single, len(texts))
        able = [ok and end == "stop" for ok, end in zip(able, ends, strict=True)]
    return Rated(place, prompt_id, prompt, texts, rewards, able, prompt_ids, ids)


# a field of a record: whatever JSON holds
def _listed(place: str, name: str, value: Any, single: bool, n: int | None = None) -> list[Any]:
    """A field as a list of one entry a completion."""
    values = [value] if single else value
    if not isinstance(values, list) or (n is not None and len(values) != n):
        wanted = "a list" if n is None else f"a list of {n} entries, one a completion"
        got = len(values) if isinstance(values, list) else type(values).__name__
        raise RecordError(f"{place}: `{name}` must be {wanted}, got {got}.")
    return values


def _rewards(place: str, row: Row, reward: str, single: bool, n: int) -> list[float]:
    known = row.get("rewards")
    if isinstance(known, dict) and reward in known:
        values = _listed(place, f"rewards.{reward}", known[reward], single, n)
        if not all(map(_is_number, values)):
            raise RecordError(f"{place}: `rewards.{reward}` must hold numbers or null.")
        return [NAN if x is None else float(x) for x in values]
    stats = _statistics(place, row, single, n)
    if (
        reward not in REWARDS
        or options_needed(reward)
        or not set(stats_needed(reward)) <= set(stats)
    ):
        raise RecordError(
            f"{place}: `reward` {reward!r} must be among its rewards "
            f"({', '.join(known or {}) or 'none'}) or follow from its token statistics "
            f"({', '.join(stats) or 'none'}); run `sharpen score --rewards {reward}` first."
        )
    needed = {name: stats[name] for name in stats_needed(reward)}
    for name, nested in needed.items():
        if not all(isinstance(x, list) and all(map(_is_number, x)) for x in nested):
            raise RecordError(
                f"{place}: `{name}` must hold a list for each completion, of a number or null for "
                "each token."
            )
    lengths = [len(tokens) for tokens in next(iter(needed.values()))]
    for name, nested in needed.items():
        if [len(tokens) for tokens in nested] != lengths:
            raise RecordError(
                f"{place}: `{name}` must be as long as the other token statistics of a completion."
            )
    columns = {
        name: torch.tensor([NAN if x is None else x for tokens in nested for x in tokens]).float()
        for name, nested in needed.items()
    }
    return Scores.of(TokenStats(**columns), [lengths]).reward(reward).tolist()


def _statistics(place: str, row: Row, single: bool, n: int) -> dict[str, list[list[Any]]]:
    """The token statistics of a record, one list a completion."""
    kept = row.get("token_stats")
    found = dict(kept) if isinstance(kept, dict) else {}
    if "logprob" not in found and row.get("logprobs") is not None:
        found["logprob"] = row["logprobs"]
    return {name: _listed(place, name, value, single, n) for name, value in found.items()}


def _is_number(x: object) -> bool:
    return x is None or (isinstance(x, (int, float)) and not isinstance(x, bool))


def _joined(parts: list[Rated]) -> Rated:
    """The single completions of a prompt as one group."""
    first = parts[0]
    ids = [part.completion_ids for part in parts]
    return Rated(
        first.place,
        first.prompt_id,
        first.prompt,
        [text for part in parts for text in part.completions],
        [reward for part in parts for reward in part.reward],
        [ok for part in parts for ok in part.eligible],
        first.prompt_ids,
        None if any(x is None for x in ids) else [x for part in ids if part for x in part],
    )
