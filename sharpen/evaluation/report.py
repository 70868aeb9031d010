"""`report.html`: one file that says what choosing by self-reward did, and shows it.

    headline sentence and table -> figures -> prompts with their responses -> facts of the run

It holds no script and fetches nothing; the same run gives the same bytes.
"""

from collections.abc import Mapping

from . import page
from .bootstrap import N_RESAMPLES
from .curves import N_SUBSETS
from .figures import accuracy_svg, histogram_svg, logprob_svg
from .headline import Row, headline_rows
from .headline import format_table as format_table
from .outcome import MAJORITY, Outcome, Texts
from .page import NBSP, interval, number, p_text, percent, text
from .responses import responses_section
from .summary import Summary

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
    return page.page(title, "\n".join(section for section in sections if section))


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
        f"<section><h2>Choosing from {n} samples</h2>{page.table(heads, lines, 'numbers')}"
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
        parts += ["<h3>Accuracy</h3>", page.table(heads, accuracy, "numbers")]
    parts += [
        "<h3>Mean log-probability of the chosen response, nats</h3>",
        page.table(heads, nats, "numbers"),
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
