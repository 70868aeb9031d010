"""The figures of a study, from its rows: each one SVG that stands alone.

Error bars and bands are 95 % over puzzles.

`study.md`: the tables of a study as Markdown, beside its figures.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sharpen.evaluation.figures import (
    INK,
    RC,
    RULE,
    SERIES,
    End,
    against_n,
    look,
    name_ends,
    panel,
    svg,
)

from .tables import (
    auroc_table,
    band,
    covariance_table,
    decoding_table,
    percent,
    power_table,
    rounds_table,
    selection_facts_table,
    selection_table,
    stages_table,
    training_table,
    under_power_table,
)

PAPER = "#ffffff"
# of selectors, those whose curves are drawn; the table has all
CURVES = (
    "best-of-N, logprob",
    "best-of-N, mean_logprob",
    "majority",
    "probability-weighted majority",
    "Borda, self_certainty",
)
# Any: JSON values
Study = dict[str, Any]
Row = dict[str, Any]


def figure_files(study: Study) -> dict[str, str]:
    """File names and contents."""
    drawn: dict[str, Callable[[Study], Figure]] = {
        "selection": selection_figure,
        "power": power_figure,
        "training": training_figure,
        "auroc": auroc_figure,
        "covariance": covariance_figure,
    }
    files = {}
    for name, draw in drawn.items():
        with style.context(["default", RC]):
            files[f"{name}.svg"] = svg(draw(study), name, paper=PAPER) + "\n"
    return files


def selection_figure(study: Study) -> Figure:
    """Accuracy against N of a few selectors, with greedy and one sample."""
    figure, axes = panel("Accuracy, %")
    ends = _references(axes, study)
    grid: list[int] = []
    for i, name in enumerate(CURVES):
        rows = [row for row in study["rows"] if row["name"] == name and row["n"]]
        grid = [row["n"] for row in rows] if len(rows) > len(grid) else grid
        color, marker = look(i)
        _band(axes, rows, "n", color, marker)
        ends.append(End(100 * rows[-1]["accuracy"], name.replace("best-of-N, ", ""), color))
    against_n(axes, grid)
    name_ends(axes, ends)
    return figure


def power_figure(study: Study) -> Figure:
    """Accuracy against completion tokens of one answer: power samplers beside best-of-N."""
    figure, axes = panel("Accuracy, %")
    ends = _references(axes, study)
    best = [row for row in study["rows"] if row["name"] == CURVES[0]]
    power = [row for row in study["rows"] if row["group"] == "power"]
    names = dict.fromkeys(row["name"] for row in power)
    series = {"best-of-N": best} | {x: [row for row in power if row["name"] == x] for x in names}
    for i, (name, rows) in enumerate(series.items()):
        color, marker = look(i)
        _band(axes, rows, "tokens", color, marker)
        ends.append(End(100 * rows[-1]["accuracy"], name.partition(",")[0], color))
    against_n(axes, [round(row["tokens"]) for row in best])
    axes.set_xlabel("Completion tokens for one answer")
    name_ends(axes, ends)
    return figure


def training_figure(study: Study) -> Figure:
    """Accuracy of each trained model at T = 1 and greedy, beside the base's."""
    rows = [row for row in study["rows"] if row["group"] == "training"]
    names = list(dict.fromkeys(row["name"].partition(",")[0] for row in rows))
    base = {row["name"]: row for row in study["rows"] if row["group"] == "decoding"}
    goal = _goal(study)
    of = {row["name"]: row for row in rows}
    figure, axes = _dots(["base", *names], "Accuracy, %")
    for i, label in enumerate(("T = 1", "greedy")):
        color, marker = look(i)
        lines = [base[label], *(of[f"{name}, {label}"] for name in names)]
        _bars(axes, lines, color, marker, shift=0.16 * (1 - 2 * i))
        axes.plot([], [], color=color, marker=marker, ls="", label=label)
    axes.axvline(100 * goal["accuracy"], color=INK, lw=0.9, ls=":", label=f"best-of-{goal['n']}")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.4, 1.15), ncols=3)
    return figure


def auroc_figure(study: Study) -> Figure:
    """AUROC within prompts of every reward."""
    rows = [row for row in study["auroc"] if row["auroc"] is not None and row["ci95"]]
    figure, axes = _dots([row["reward"] for row in rows], "AUROC within prompts")
    for y, row in enumerate(rows):
        axes.plot(row["ci95"], [y, y], color=SERIES[0], lw=1.4)
        axes.plot(row["auroc"], y, color=SERIES[0], marker="o", ms=5)
    axes.axvline(0.5, color=INK, lw=0.9, ls=":")
    return figure


def covariance_figure(study: Study) -> Figure:
    """Covariance of grade and log-prob of each puzzle, against the accuracy of one sample."""
    known = [row for row in study["by_prompt"] if row["covariance"] is not None]
    figure, axes = panel("Covariance of grade and log-prob, nats")
    x, y = (np.array([row[name] for row in known]) for name in ("accuracy", "covariance"))
    axes.axhline(0, color=INK, lw=0.9)
    axes.plot(100 * x, y, color=SERIES[0], marker="o", ms=3.5, ls="", alpha=0.55)
    mean = float(y.mean()) if len(y) else 0.0
    axes.axhline(mean, color=SERIES[1], lw=1.2, ls="--")
    axes.set_xlabel("Accuracy of one sample of the puzzle, %")
    name_ends(axes, [End(mean, f"mean {mean:+.3f}", SERIES[1])])
    return figure


def _goal(study: Study) -> Row:
    named = (row for row in study["rows"] if row["name"] == CURVES[0])
    return next(row for row in named if row["n"] == study["target_n"])


def _references(axes: Axes, study: Study) -> list[End]:
    ends = []
    for name, dash in (("greedy", "--"), ("T = 1", ":")):
        (row,) = (r for r in study["rows"] if r["group"] == "decoding" and r["name"] == name)
        axes.axhline(100 * row["accuracy"], color=INK, lw=0.9, ls=dash)
        ends.append(End(100 * row["accuracy"], name, INK))
    return ends


def _band(axes: Axes, rows: Sequence[Row], x: str, color: str, marker: str) -> None:
    x_N = [row[x] for row in rows]
    low_N, high_N = 100 * np.array([row["ci95"] for row in rows]).T
    axes.plot(x_N, [100 * row["accuracy"] for row in rows], color=color, marker=marker, ms=4.5)
    axes.fill_between(x_N, low_N, high_N, color=color, alpha=0.1, lw=0)


def _dots(names: Sequence[str], xlabel: str) -> tuple[Figure, Axes]:
    """A panel of one line a name, downwards."""
    figure, axes = panel("")
    axes.set_position((0.32, 0.15, 0.64, 0.73))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=RULE, lw=0.6)
    axes.set_xlabel(xlabel)
    return figure, axes


def _bars(axes: Axes, rows: Sequence[Row], color: str, marker: str, *, shift: float) -> None:
    for y, row in enumerate(rows):
        axes.plot([100 * x for x in row["ci95"]], [y - shift] * 2, color=color, lw=1.4)
        axes.plot(100 * row["accuracy"], y - shift, color=color, marker=marker, ms=5)


TITLES = {
    "sft": "SFT-Sharpening: the best of N samples by log-prob, fitted; all prompts and samples",
    "sft-round2": "a second round: samples of the model of `sft`, by its own log-prob",
    "sft-round3": "a third round",
    "sft-greedy": "a second round: what greedy decoding of the model of `sft` finds, one a prompt",
    "sft-greedy2": "a third round of that kind",
    "sft-transductive": "SFT-Sharpening, transductive: fitted on the test prompts themselves",
    "sft-equal": "SFT-Sharpening on as many samples as the objectives below",
    "soft-sft": "power self-distillation: all samples, by p^(alpha - 1)",
    "rlhf": "RLHF-Sharpening: square loss of Eq. (8) on random pairs",
    "dpo": "DPO on the best and the worst sample",
    "xpo": "XPO: rounds of new samples, optimism",
}


def headline(study: Study) -> str:
    """What a reader wants first, in plain text."""
    by = {(row["group"], row["name"], row["n"]): row for row in study["rows"]}
    n = study["target_n"]
    facts = [
        ("greedy", by["decoding", "greedy", None]),
        ("one sample", by["decoding", "T = 1", None]),
        (f"best-of-{n}, logprob", by["selection", "best-of-N, logprob", n]),
    ]
    facts += [(f"{row['name']}", row) for row in study["rows"] if row["group"] == "training"]
    lines = [f"{study['prompts']} test prompts, accuracy in % with its 95 % band over prompts"]
    for name, row in facts:
        share = (row.get("gap_closed") or {}).get("share")
        closed = "" if share is None else f"  closes {100 * share:.0f} % of the gap"
        lines.append(f"{name:24s}{percent(row['accuracy']):>6s}  {band(row['ci95'])}{closed}")
    return "\n".join(lines)


def format_page(study: Study) -> str:
    """The whole page."""
    settings = study["settings"]
    total = sum(stage["seconds"] for stage in study["stages"])
    quick = " This is a quick run, too small to rely on." if settings["quick"] else ""
    machine = study["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    flags = " --quick" if settings["quick"] else ""
    flags += f" --train-seeds {settings['train_seeds']}"
    if machine["jobs"] > 1:
        flags += f" --jobs {machine['jobs']}"
    command = f"sharpen study {settings['task']}{flags}"
    parts = [
        f"# Study: {settings['task']}",
        f"`{command}` on {study['prompts']} test prompts, {settings['seeds']} seeds of samples and "
        f"{settings['train_seeds']} of training: "
        f"{len(study['stages'])} runs, {total / 60:.1f} minutes in all, {machine['jobs']} at a "
        f"time, {machine['threads']} threads ({versions}). Accuracies are in % with 95 % bands: a "
        f"bootstrap over prompts of their mean over seeds. Log-probs are those of the base model, "
        f"in nats.{quick}",
        decoding_table(study),
        "## Selection\n\n![Accuracy against N](selection.svg)",
        "Expectations over subsets of one pool of samples a seed: exact for best-of-N, else over "
        "random subsets. The KL to the base is at most log N - (N - 1)/N nats for best-of-N by a "
        "fixed reward, and not known for the others; lengths, tokens and KL are at the largest N.",
        selection_table(study),
        selection_facts_table(study),
        "## Samplers of the power distribution\n\n![Accuracy against tokens](power.svg)",
        power_table(study),
        "## Trained models\n\n![Accuracy of trained models](training.svg)",
        training_table(study),
        "\n".join(f"- `{name}`: {title}." for name, title in TITLES.items()),
        rounds_table(study),
        "## Does the self-reward follow the true one?\n\n![AUROC](auroc.svg)",
        auroc_table(study),
        "![Covariance](covariance.svg)",
        covariance_table(study),
        under_power_table(study),
        "## Every run\n",
        stages_table(study),
    ]
    return "\n\n".join(parts) + "\n"
