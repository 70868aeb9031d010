"""The one page a report is: its style, its frame, and how a number or a quoted text is written.

Nothing on the page is fetched or executed; a content security policy in the page says so to the
browser. Text from outside enters through `text` or `quote` only.

The prompts that the report quotes, each with its chosen and its best rejected response.

P prompts, G completions per prompt.

`report.html`: one file that says what choosing by self-reward did, and shows it.

    headline sentence and table -> figures -> prompts with their responses -> facts of the run

It holds no script and fetches nothing; the same run gives the same bytes.
"""

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .figures import accuracy_svg, histogram_svg, logprob_svg
from .metrics import N_RESAMPLES, N_SUBSETS, order_by
from .outcome import MAJORITY, Outcome, Texts
from .summary import Row, Summary, headline_rows
from .summary import format_table as format_table

# what HTML cannot hold: controls but tab and newline, lone surrogates, noncharacters
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
QUOTE_HEAD, QUOTE_TAIL = 700, 500  # characters of a long text that are shown; a choice
NBSP, MINUS = "\N{NO-BREAK SPACE}", "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfb; --ink: #1a1a19; --soft: #63625d; --rule: #dededb; --tint: #f3f3ef;
  --s0: #0072b2; --s1: #c2500a; --s2: #007d5c; --s3: #8250b0; --s4: #846600; --s5: #4a6674;
  --serif: Charter, "Bitstream Charter", "Sitka Text", Cambria, Georgia, serif;
  --sans: ui-sans-serif, system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #161615; --ink: #e8e7e2; --soft: #a09f98; --rule: #383834; --tint: #1f1f1d;
    --s0: #5ab4e8; --s1: #f5955a; --s2: #4cc9a0; --s3: #c3a0ea; --s4: #d9b847; --s5: #9db6c2;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 4rem clamp(1.1rem, 4vw, 3rem) 5rem; max-width: 74rem;
  background: var(--paper); color: var(--ink); font: 1rem/1.55 var(--sans);
  font-variant-numeric: tabular-nums;
}
h1 {
  margin: 0; max-width: 24em; font: 400 clamp(1.7rem, 3.6vw, 2.5rem)/1.2 var(--serif);
  text-wrap: balance;
}
h2 { margin: 4rem 0 1rem; font: 400 1.45rem/1.3 var(--serif); }
h3 { margin: 2.5rem 0 0.4rem; font-size: 1rem; font-weight: 600; }
p { margin: 0.6rem 0; max-width: 44em; text-wrap: pretty; }
.lede { margin-top: 1.1rem; font: 1.15rem/1.55 var(--serif); }
.soft, caption, figcaption span, th { color: var(--soft); }
.note { margin-top: 1rem; max-width: 50em; font-size: 0.94rem; color: var(--soft); }
h3 .soft { font-weight: 400; }
.eyebrow { margin: 0 0 0.9rem; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.94rem; }
th { font-weight: 400; text-align: left; vertical-align: bottom; }
th, td { padding: 0.5rem 0 0.5rem 1.6rem; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { padding-left: 0; }
.numbers th:not(:first-child), .numbers td:not(:first-child) {
  text-align: right; white-space: nowrap;
}
.own td { font-weight: 600; }
.own td .soft { font-weight: 400; }
.figures {
  display: grid; gap: 2.5rem 3rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
}
figure {
  display: flex; flex-direction: column; justify-content: space-between;
  margin: 0; max-width: 38rem; break-inside: avoid;
}
figcaption { margin-bottom: 0.7rem; font-size: 0.94rem; line-height: 1.45; }
figcaption b { display: block; font-weight: 600; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-family: var(--sans) !important; }
.quotes { table-layout: fixed; }
.quotes td, .quotes th { vertical-align: top; }
.quotes th:first-child { width: 24%; }
.quotes pre { margin: 0; font: 0.82rem/1.5 var(--mono); white-space: pre-wrap;
  overflow-wrap: anywhere; }
.quotes tr { break-inside: avoid; }
.grade { margin-bottom: 0.25rem; font-size: 0.82rem; color: var(--soft); }
.right { color: var(--s0); }
.wrong { color: var(--s1); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.3rem 2rem; margin: 0;
  font-size: 0.94rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 44rem) {
  body { padding-top: 2rem; }
  .quotes, .quotes tbody, .quotes tr, .quotes td { display: block; width: 100%; }
  .quotes thead { display: none; }
  .quotes tr { padding: 0.9rem 0; border-bottom: 1px solid var(--rule); }
  .quotes td { padding: 0.3rem 0; border: 0; }
  .quotes td:not(:first-child)::before {
    content: attr(data-head); font-size: 0.82rem; color: var(--soft);
  }
}
@media print {
  :root {
    color-scheme: light;
    --paper: #fff; --ink: #000; --soft: #555; --rule: #ccc; --tint: #fff;
    --s0: #0072b2; --s1: #c2500a; --s2: #007d5c; --s3: #8250b0; --s4: #846600; --s5: #4a6674;
  }
  html { font-size: 8pt; }
  body { padding: 0; max-width: none; }
  .scroll { overflow: visible; }
  .figures { grid-template-columns: 1fr 1fr; gap: 1.5rem 2rem; }
  h2, h3 { break-after: avoid; }
}
""".strip()


def page(title: str, body: str) -> str:
    """A whole HTML document; `title` is escaped here, `body` is HTML already."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{text(title)}</title>
<style>
{CSS}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def text(value: object) -> str:
    """`str(value)` as HTML text: escaped, and free of characters that HTML cannot hold."""
    return html.escape(UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", str(value)))


def quote(value: str) -> str:
    """A text as it was written, in `<pre>`; of a long one the beginning and the end."""
    hidden = len(value) - QUOTE_HEAD - QUOTE_TAIL
    # a gap shorter than its own notice would save nothing
    if hidden <= 100:
        return f"<pre>{text(value.strip())}</pre>"
    head, tail = text(value[:QUOTE_HEAD].lstrip()), text(value[-QUOTE_TAIL:].rstrip())
    return f'<pre>{head}<span class="soft"> [{hidden:,} characters left out] </span>{tail}</pre>'


def number(value: float | None, digits: int = 1, *, sign: bool = False) -> str:
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


def table(heads: list[str], rows: list[tuple[str, list[str]]], kind: str) -> str:
    """A table of cells that are HTML already; each row has a class and its cells."""
    head = "".join(f"<th scope='col'>{cell}</th>" for cell in heads)
    body = "\n".join(
        f"<tr{f' class={name!r}' if name else ''}>"
        + "".join(f"<td data-head='{h}'>{c}</td>" for h, c in zip(heads, cells, strict=True))
        + "</tr>"
        for name, cells in rows
    )
    return (
        f"<div class='scroll'><table class='{kind}'><thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


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
        f"Best rejected is the next best by {text(reward)} that differs.</p>",
    ]
    for group in groups:
        count = f"{len(group.examples):,} of {group.total:,}"
        parts += [
            f"<h3>{group.title} <span class='soft'>{count}</span></h3>",
            table(
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
        number + quote(example.prompt),
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
    facts = f"{number(response.logprob, 2)}{NBSP}nats, sample {response.index}"
    return f"<div class='grade'>{mark}{facts}</div>{quote(response.text)}"


MAX_PROMPTS = 100  # quoted in full; a choice


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
    rows = headline_rows(summary)
    sections = [
        _header(summary, rows),
        _headline_table(summary, rows) if rows else "",
        _figures(summary, outcome),
        _every_n(summary, rows),
        responses_section(outcome, texts, reward=str(summary["reward"]), limit=MAX_PROMPTS),
        _facts(summary),
    ]
    title = f"{_task(summary)}: best of {summary['n']} by {summary['reward']}"
    return page(title, "\n".join(section for section in sections if section))


def _task(summary: Summary) -> str:
    return "Prompts of a file" if summary["task"] is None else str(summary["task"])


def _header(summary: Summary, rows: list[Row]) -> str:
    n, reward = summary["n"], text(summary["reward"])
    eyebrow = f"<p class='eyebrow'>{text(_task(summary))}, model {text(summary['model'])}</p>"
    by_key = {row.key: row for row in rows}
    if not rows:
        nats = number(summary["mean_logprob_of_chosen"][str(n)], 2)
        one = number(summary["mean_logprob_of_chosen"]["1"], 2)
        return (
            f"<header>{eyebrow}<h1>Best of {n} by {reward} chooses responses of "
            f"{nats}{NBSP}nats on average.</h1>"
            f"<p class='lede'>One sample of these {summary['prompts']:,} prompts has "
            f"{one}{NBSP}nats. Nothing checks their answers, so no figure here is an accuracy."
            "</p></header>"
        )
    own, last = by_key[summary["reward"]], str(n)
    lede = [
        f"One sample solves {percent(by_key['sample'].accuracy['1'])} "
        f"({number(own.gain, sign=True)}{NBSP}points, p{NBSP}{_equals(own.p_vs_sample)})"
    ]
    if "greedy" in by_key:
        lift = "" if own.lift is None else f"{number(own.lift, sign=True)}{NBSP}%, "
        lede.append(
            f"greedy decoding {percent(by_key['greedy'].accuracy['1'])} "
            f"({lift}p{NBSP}{_equals(own.p_vs_greedy)})"
        )
    return (
        f"<header>{eyebrow}<h1>Best of {n} by {reward} solves {percent(own.accuracy[last])} "
        f"of {summary['prompts']:,} prompts.</h1><p class='lede'>{', '.join(lede)}. At least one "
        f"of the {n} samples is right for {percent(by_key['pass'].accuracy[last])}.</p></header>"
    )


def _equals(p: float | None) -> str:
    shown = p_text(p)
    return shown.replace("<", "&lt;") if shown.startswith("<") else f"={NBSP}{shown}"


def _headline_table(summary: Summary, rows: list[Row]) -> str:
    n = str(summary["n"])
    heads = [
        "",
        "Accuracy",
        "95 % interval",
        "Lift over greedy",
        "Points over one sample",
        "p, one sample",
        "p, greedy",
    ]
    lines = []
    for row in rows:
        is_choice = row.gain is not None
        value = row.accuracy.get(n, row.accuracy["1"])
        lift = "" if row.lift is None else f"{number(row.lift, sign=True)}{NBSP}%"
        gain = f"{number(row.gain, sign=True)} {_soft(interval(row.ci95_of_gain, sign=True))}"
        cells = [
            text(row.name.replace(" N", f" {n}", 1).replace("@N", f"@{n}")),
            percent(value),
            interval(row.ci95, 100.0),
            f"{lift} {_soft(interval(row.ci95_of_lift, sign=True))}" if is_choice else "",
            gain if is_choice else "",
            text(p_text(row.p_vs_sample)) if is_choice else "",
            text(p_text(row.p_vs_greedy)) if is_choice else "",
        ]
        lines.append(("own" if row.key == summary["reward"] else "", cells))
    return (
        f"<section><h2>Choosing from {n} samples</h2>{table(heads, lines, 'numbers')}"
        "<p class='note'>The run chose by the reward in bold. Lift is relative to the greedy "
        "accuracy. Intervals and two-sided p-values are from a paired bootstrap over prompts "
        f"({N_RESAMPLES:,} resamples). Pass@N is the share of prompts with a correct response "
        "among the samples: the most that any choice could reach.</p></section>"
    )


def _soft(html: str) -> str:
    return f"<span class='soft'>{html}</span>"


def _figures(summary: Summary, outcome: Outcome) -> str:
    pairs = []
    if summary["accuracy"] is not None:
        pairs += [
            (
                "Accuracy of the choice against N",
                "Bands are 95 % intervals over prompts.",
                accuracy_svg(summary, with_pass=False),
            ),
            (
                "The same, with pass@N",
                "Pass@N: a correct response is among the N.",
                accuracy_svg(summary, with_pass=True),
            ),
        ]
    classes = "correct and incorrect" if outcome.correct_PG is not None else "chosen and all"
    pairs += [
        (
            f"Log-probability of {classes} responses",
            "Valid responses; the lowest bin holds all below it.",
            histogram_svg(outcome, reward=str(summary["reward"])),
        ),
        (
            "Log-probability of the choice against N",
            "Mean over prompts with a choice.",
            logprob_svg(summary),
        ),
    ]
    figures = "\n".join(
        f"<figure role='group' aria-label='{title}'><figcaption><b>{title}</b>"
        f"<span>{note}</span></figcaption>\n{svg}</figure>"
        for title, note, svg in pairs
    )
    return (
        f"<section><h2>Curves and histograms</h2><div class='figures'>\n{figures}\n</div></section>"
    )


def _every_n(summary: Summary, rows: list[Row]) -> str:
    columns = list(summary["mean_logprob_of_chosen"])
    heads = ["", f"N = {columns[0]}", *columns[1:]]
    accuracy = [
        (
            "",
            [
                text(row.name),
                *(percent(row.accuracy[k]) if k in row.accuracy else "" for k in columns),
            ],
        )
        for row in rows
    ]
    nats = [
        ("", [f"Best of N, {text(reward)}", *(number(by_n[k], 2) for k in columns)])
        for reward, by_n in summary["mean_logprob_by_reward"].items()
    ]
    parts = ["<section><h2>Every N</h2>"]
    if accuracy:
        parts += ["<h3>Accuracy</h3>", table(heads, accuracy, "numbers")]
    parts += [
        "<h3>Mean log-probability of the chosen response, nats</h3>",
        table(heads, nats, "numbers"),
        "<p class='note'>Each figure is the expectation over random subsets of N of the "
        f"{summary['n']} samples. {_method(summary)}</p></section>",
    ]
    return "\n".join(parts)


def _method(summary: Summary) -> str:
    is_voted = MAJORITY in summary["mean_logprob_by_reward"]
    sentences = [
        f"It is exact, but for votes, which take {N_SUBSETS} seeded subsets a prompt."
        if is_voted
        else "It is exact."
    ]
    if summary["accuracy"] is not None:
        sentences.append("A subset without a valid response counts as wrong.")
    return " ".join(sentences)


def _facts(summary: Summary) -> str:
    seconds, tokens = summary["seconds"], summary["tokens"]
    no_choice = summary["prompts_without_choice"][summary["reward"]]
    facts: dict[str, object] = {
        "model": summary["model"],
        "task": _task(summary),
        "prompts": f"{summary['prompts']:,}",
        "samples per prompt": summary["n"],
        "seed": summary["seed"],
        "chosen by": summary["reward"],
        "sampling": f"{number(seconds['sample'])} s, {tokens['sampled']:,} tokens",
        "scoring": f"{number(seconds['score'])} s, {tokens['scored']:,} tokens",
        "invalid samples": percent(summary["invalid_share"]),
        "prompts without a choice": f"{no_choice:,}",
    }
    for key, value in summary["settings"].items():
        facts[str(key).replace("_", " ")] = _plain(value)
    lines = "\n".join(f"<dt>{text(key)}</dt><dd>{text(value)}</dd>" for key, value in facts.items())
    return f"<section><h2>The run</h2><dl>\n{lines}\n</dl></section>"


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return "none" if value is None else str(value)
