"""`report.html`: one file that says what choosing by self-reward did, and shows it.

    headline sentence and table -> figures -> prompts with their responses -> facts of the run

The page is `report.html.jinja` with the style `report.css` inside it; here are its contents: which
prompts are quoted, and how a number or a long text is written. It holds no script and fetches
nothing; the same run gives the same bytes.

P prompts, G completions per prompt.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup

from .figures import accuracy_svg, histogram_svg, logprob_svg
from .metrics import MAJORITY, N_RESAMPLES, N_SUBSETS, Outcome, Texts, order_by
from .summary import Summary, headline_rows

MAX_PROMPTS = 100  # quoted; a choice
EXCERPT_HEAD, EXCERPT_TAIL = 700, 500  # characters of a long text that are shown; a choice
# what HTML cannot hold: controls but tab and newline, lone surrogates, noncharacters
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
NBSP, MINUS, NONE = "\N{NO-BREAK SPACE}", "\N{MINUS SIGN}", "\N{EN DASH}"


def render_report(summary: Summary, outcome: Outcome, texts: Texts) -> str:
    """The report as one self-contained HTML document.

    Args:
        summary: What `summarize` returned for `outcome`.
        outcome: The run.
        texts: Its prompts and completions; at most `MAX_PROMPTS` prompts are quoted.

    Raises:
        InputError: If `texts` are not those of `outcome`.
    """
    texts.check(outcome)
    reward = str(summary["reward"])
    groups = group_examples(outcome, texts, reward=reward, limit=MAX_PROMPTS)
    rows = headline_rows(summary)
    by_key = {row.key: row for row in rows}
    return _template().render(
        summary=summary,
        task=_task(summary),
        reward=reward,
        n=summary["n"],
        last=str(summary["n"]),
        columns=list(summary["mean_logprob_of_chosen"]),
        rows=rows,
        by_key=by_key,
        chosen=by_key.get(reward),
        n_resamples=N_RESAMPLES,
        n_subsets=N_SUBSETS,
        figures=_figures(summary, outcome),
        groups=groups,
        n_shown=sum(len(group.examples) for group in groups),
        facts=_facts(summary),
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_printable,
        keep_trailing_newline=True,
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    for function in (excerpt, interval, number, p_text, percent):
        environment.filters[function.__name__] = function
    return environment.get_template("report.html.jinja")


def _printable(value: object) -> object:
    """`str(value)` without the characters that HTML cannot hold; markup as it is."""
    if isinstance(value, Markup):
        return value
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", str(value))


def number(value: float | int | None, digits: int = 1, *, sign: bool = False) -> str:
    """A number with a true minus sign; a dash for None and NaN."""
    if value is None or math.isnan(value):
        return NONE
    return f"{value:{'+' if sign else ''},.{digits}f}".replace("-", MINUS)


def percent(share: float | None) -> str:
    """A fraction of 1 as percent, with its sign."""
    return NONE if share is None else f"{number(100 * share)}{NBSP}%"


def interval(bounds: list[float] | None, scale: float = 1.0, *, sign: bool = False) -> str:
    """`low to high`."""
    if bounds is None:
        return NONE
    return f"{NBSP}to{NBSP}".join(number(scale * bound, sign=sign) for bound in bounds)


def p_text(p: float | None) -> str:
    """A p-value to two figures; below 0.001 only that it is."""
    if p is None:
        return NONE
    return f"<{NBSP}0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


class Excerpt(NamedTuple):
    """The beginning and the end of a text, with the number of characters between them."""

    head: str
    n_hidden: int = 0
    tail: str = ""


def excerpt(text: str) -> Excerpt:
    """A text as it is shown: of a long one the beginning and the end."""
    n_hidden = len(text) - EXCERPT_HEAD - EXCERPT_TAIL
    # a gap shorter than its own notice would save nothing
    if n_hidden <= 100:
        return Excerpt(text.strip())
    return Excerpt(text[:EXCERPT_HEAD].lstrip(), n_hidden, text[-EXCERPT_TAIL:].rstrip())


@dataclass(frozen=True)
class Response:
    """One completion as quoted: its text, log-probability (nats) and grade."""

    index: int
    text: str
    logprob: float
    is_correct: bool | None


@dataclass(frozen=True)
class QuotedPrompt:
    """One prompt; `chosen` is None if no completion is eligible, `rejected` if all are alike."""

    index: int
    prompt: str
    chosen: Response | None
    rejected: Response | None


@dataclass(frozen=True)
class PromptGroup:
    """Prompts with one fate: the first few of `total`."""

    title: str
    total: int
    examples: list[QuotedPrompt]


def group_examples(outcome: Outcome, texts: Texts, *, reward: str, limit: int) -> list[PromptGroup]:
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

    def response(p: int, g: int) -> Response:
        is_correct = None if outcome.correct_PG is None else bool(outcome.correct_PG[p, g])
        logprob = float(outcome.reward_PG["logprob"][p, g])
        return Response(g, texts.completions[p][g], logprob, is_correct)

    def quoted(p: int) -> QuotedPrompt:
        # a vote rejects answers, every other reward rejects texts
        content = texts.completions[p]
        if reward == MAJORITY and outcome.answers is not None:
            content = outcome.answers[p]
        ranked = [int(g) for g in order_PG[p] if eligible_PG[p, g]]
        others = [g for g in ranked if content[g] != content[ranked[0]]]
        return QuotedPrompt(
            p,
            texts.prompts[p],
            response(p, ranked[0]) if ranked else None,
            response(p, others[0]) if others else None,
        )

    return [
        PromptGroup(title, len(index), [quoted(int(p)) for p in index[: quota[title]]])
        for title, index in members.items()
        if quota[title]
    ]


def _fates(outcome: Outcome, chosen_P: np.ndarray) -> list[tuple[str, np.ndarray]]:
    if outcome.correct_PG is None:
        return [("All prompts", np.ones(outcome.n_prompts, dtype=bool))]
    picked_P = np.take_along_axis(outcome.correct_PG, np.maximum(chosen_P, 0)[:, None], axis=1)
    right_P = picked_P[:, 0] & (chosen_P >= 0)
    any_P = np.logical_or.reduce(outcome.correct_PG, axis=1)
    if outcome.greedy_correct_P is None:
        return [
            ("Chosen wrong, though a correct response was sampled", ~right_P & any_P),
            ("Chosen right", right_P),
            ("No correct response among the samples", ~any_P),
        ]
    greedy_P = outcome.greedy_correct_P
    return [
        ("Greedy wrong, chosen right", ~greedy_P & right_P),
        ("Greedy right, chosen wrong", greedy_P & ~right_P),
        ("Both wrong, though a correct response was sampled", ~greedy_P & ~right_P & any_P),
        ("Both right", greedy_P & right_P),
        ("Both wrong, no correct response among the samples", ~greedy_P & ~any_P),
    ]


class TitledFigure(NamedTuple):
    """A figure with the title and the note above it."""

    title: str
    note: str
    svg: Markup


def _figures(summary: Summary, outcome: Outcome) -> list[TitledFigure]:
    figures = []

    def add(title: str, note: str, svg: str) -> None:
        figures.append(TitledFigure(title, note, Markup(svg)))

    if summary["accuracy"] is not None:
        note = "Bands are 95 % intervals over prompts."
        add("Accuracy of the choice against N", note, accuracy_svg(summary, with_pass=False))
        note = "Pass@N: a correct response is among the N."
        add("The same, with pass@N", note, accuracy_svg(summary, with_pass=True))
    classes = "correct and incorrect" if outcome.correct_PG is not None else "chosen and all"
    svg = histogram_svg(outcome, reward=str(summary["reward"]))
    note = "Valid responses; the lowest bin holds all below it."
    add(f"Log-probability of {classes} responses", note, svg)
    note = "Mean over prompts with a choice."
    add("Log-probability of the choice against N", note, logprob_svg(summary))
    return figures


def _facts(summary: Summary) -> dict[str, str]:
    seconds, tokens = summary["seconds"], summary["tokens"]
    no_choice = summary["prompts_without_choice"][summary["reward"]]
    facts = {
        "model": str(summary["model"]),
        "task": _task(summary),
        "prompts": f"{summary['prompts']:,}",
        "samples per prompt": str(summary["n"]),
        "seed": str(summary["seed"]),
        "chosen by": str(summary["reward"]),
        "sampling": f"{number(seconds['sample'])} s, {tokens['sampled']:,} tokens",
        "scoring": f"{number(seconds['score'])} s, {tokens['scored']:,} tokens",
        "invalid samples": percent(summary["invalid_share"]),
        "prompts without a choice": f"{no_choice:,}",
    }
    for key, value in summary["settings"].items():
        facts[str(key).replace("_", " ")] = _plain(value)
    return facts


def _task(summary: Summary) -> str:
    return "Prompts of a file" if summary["task"] is None else str(summary["task"])


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return "none" if value is None else str(value)
