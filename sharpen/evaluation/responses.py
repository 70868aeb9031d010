"""The prompts that the report quotes, each with its chosen and its best rejected response.

P prompts, G completions per prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import page
from .curves import order_by
from .outcome import MAJORITY, Outcome, Texts


@dataclass(frozen=True)
class Response:
    """One completion as quoted: its text, log-probability (nats) and grade."""

    index: int
    text: str
    logprob: float
    is_correct: bool | None


@dataclass(frozen=True)
class Example:
    """One prompt; `chosen` is None if no completion is eligible, `rejected` if all are alike."""

    index: int
    prompt: str
    chosen: Response | None
    rejected: Response | None


@dataclass(frozen=True)
class Group:
    """Prompts with one fate: the first few of `total`."""

    title: str
    total: int
    examples: list[Example]


def responses_section(outcome: Outcome, texts: Texts, *, reward: str, limit: int) -> str:
    """The section of the page: at most `limit` prompts in a table per group, as HTML."""
    groups = group_examples(outcome, texts, reward=reward, limit=limit)
    shown = sum(len(group.examples) for group in groups)
    dealt = ", dealt evenly over the groups below" if len(groups) > 1 else ""
    parts = [
        "<section><h2>Prompts and responses</h2>",
        f"<p class='note'>{shown:,} of {outcome.n_prompts:,} prompts{dealt}. "
        f"Best rejected is the next best by {page.text(reward)} that differs.</p>",
    ]
    for group in groups:
        count = f"{len(group.examples):,} of {group.total:,}"
        parts += [
            f"<h3>{group.title} <span class='soft'>{count}</span></h3>",
            page.table(
                ["Prompt", "Chosen", "Best rejected"],
                [("", _cells(example)) for example in group.examples],
                "quotes",
            ),
        ]
    return "\n".join([*parts, "</section>"])


def group_examples(outcome: Outcome, texts: Texts, *, reward: str, limit: int) -> list[Group]:
    """At most `limit` prompts, dealt evenly over the fates that choosing can have.

    With a checker and greedy grades: choosing made it right, made it wrong, left a correct
    response behind, kept it right, had nothing correct to choose. Without, fewer or one.
    Empty groups are left out; prompts stand in input order.
    """
    order_PG, eligible_PG = order_by(outcome, reward), outcome.eligible(reward)
    chosen_P = np.where(eligible_PG.any(axis=1), order_PG[:, 0], -1)
    members = {title: np.flatnonzero(mask_P) for title, mask_P in _fates(outcome, chosen_P)}
    members = {title: index for title, index in members.items() if len(index)}
    quota = dict.fromkeys(members, 0)
    left = min(limit, outcome.n_prompts)
    while left:
        for title, index in members.items():
            if left and quota[title] < len(index):
                quota[title] += 1
                left -= 1

    def examples(index: np.ndarray) -> list[Example]:
        ranked = {int(p): [int(g) for g in order_PG[p] if eligible_PG[p, g]] for p in index}
        return [_example(outcome, texts, reward, p, best) for p, best in ranked.items()]

    return [
        Group(title, len(index), examples(index[: quota[title]]))
        for title, index in members.items()
        if quota[title]
    ]


def _fates(outcome: Outcome, chosen_P: np.ndarray) -> list[tuple[str, np.ndarray]]:
    if outcome.correct_PG is None:
        return [("All prompts", np.ones(outcome.n_prompts, dtype=bool))]
    picked_P = np.take_along_axis(outcome.correct_PG, np.maximum(chosen_P, 0)[:, None], axis=1)
    right_P = picked_P[:, 0] & (chosen_P >= 0)
    any_P = outcome.correct_PG.any(axis=1)
    fates = [
        ("Chosen wrong, though a correct response was sampled", ~right_P & any_P),
        ("Chosen right", right_P),
        ("No correct response among the samples", ~any_P),
    ]
    if outcome.greedy_correct_P is not None:
        greedy_P = outcome.greedy_correct_P
        fates = [
            ("Greedy wrong, chosen right", ~greedy_P & right_P),
            ("Greedy right, chosen wrong", greedy_P & ~right_P),
            ("Both wrong, though a correct response was sampled", ~greedy_P & ~right_P & any_P),
            ("Both right", greedy_P & right_P),
            ("Both wrong, no correct response among the samples", ~greedy_P & ~any_P),
        ]
    return fates


def _example(outcome: Outcome, texts: Texts, reward: str, p: int, ranked: Sequence[int]) -> Example:
    def response(g: int) -> Response:
        is_correct = None if outcome.correct_PG is None else bool(outcome.correct_PG[p, g])
        logprob = float(outcome.reward_PG["logprob"][p, g])
        return Response(g, texts.completions[p][g], logprob, is_correct)

    # a vote rejects answers, every other reward rejects texts
    content = texts.completions[p]
    if reward == MAJORITY and outcome.answers is not None:
        content = outcome.answers[p]
    others = [g for g in ranked if content[g] != content[ranked[0]]]
    return Example(
        p,
        texts.prompts[p],
        response(ranked[0]) if ranked else None,
        response(others[0]) if others else None,
    )


def _cells(example: Example) -> list[str]:
    number = f"<div class='grade'>prompt {example.index}</div>"
    return [
        number + page.quote(example.prompt),
        _quoted(example.chosen),
        _quoted(example.rejected),
    ]


def _quoted(response: Response | None) -> str:
    if response is None:
        return "<span class='soft'>none</span>"
    mark = {
        None: "",
        True: "<span class='right'>\N{CHECK MARK} correct</span>, ",
        False: "<span class='wrong'>\N{MULTIPLICATION X} incorrect</span>, ",
    }[response.is_correct]
    facts = f"{page.number(response.logprob, 2)}{page.NBSP}nats, sample {response.index}"
    return f"<div class='grade'>{mark}{facts}</div>{page.quote(response.text)}"
