"""Figures as inline SVG: the parts of a panel, then the figures of the report.

`panel`, `look`, `against_n`, `name_ends`, `svg`   one panel, the looks of its series, names where
                                                   curves end, and its bytes
`accuracy_svg`, `logprob_svg`, `histogram_svg`     each a string that stands inside HTML

Ink and series colours are CSS variables with a fallback (`var(--s0, #0072b2)`), so one figure
serves light, dark and paper; text stays text. Series differ in marker as well as in colour. The
same input gives the same bytes. matplotlib's settings are changed only while a figure is drawn; its
pyplot state and backend are not touched.
"""

import io
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from .metrics import Outcome, order_by
from .summary import Summary, headline_rows

# after Okabe and Ito 2008, safe for colour-blind readers; the page holds lighter ones for dark
SERIES = ("#0072b2", "#c2500a", "#007d5c", "#8250b0", "#846600", "#4a6674")
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, RULE = "#1a1a19", "#dededb"
VARIABLES = {
    INK: "var(--ink, #1a1a19)",
    RULE: "var(--rule, #dededb)",
    **{color: f"var(--s{i}, {color})" for i, color in enumerate(SERIES)},
}
SIZE_INCHES = (5.2, 3.4)
N_BINS = 48  # of the histogram
LEFT, BOTTOM, HEIGHT = 0.09, 0.15, 0.73  # of the axes, as a share of the figure
CHAR_WIDTH = 0.0185  # of a letter at 10 points, as a share of the figure's width
RC = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.unicode_minus": True,
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "ytick.major.size": 0,
}


class End(NamedTuple):
    """The name of a curve, and where on the y axis the curve ends."""

    y: float
    text: str
    color: str


def look(i: int) -> tuple[str, str]:
    """Colour and marker of series i."""
    return SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]


def panel(ylabel: str) -> tuple[Figure, Axes]:
    """A figure of one panel, its y axis named above it."""
    figure = Figure(figsize=SIZE_INCHES)
    axes = figure.add_axes((LEFT, BOTTOM, 0.97 - LEFT, HEIGHT))
    # above the axis and level: nobody reads a title on its side
    figure.text(0.01, 0.94, ylabel)
    axes.grid(axis="y", color=RULE, lw=0.6)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    return figure, axes


def against_n(axes: Axes, n_N: Sequence[int]) -> None:
    """A logarithmic x axis of numbers of samples, with a tick at each."""
    axes.set_xscale("log")
    axes.set_xticks(n_N)
    # a name gives way to the next where the two would touch
    is_crowded = [b < 1.35 * a for a, b in pairwise(n_N)] + [False]
    axes.set_xticklabels(
        ["" if crowded else str(n) for n, crowded in zip(n_N, is_crowded, strict=True)]
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(0.92 * n_N[0], 1.08 * n_N[-1])
    axes.set_xlabel("N, samples chosen from")


def name_ends(axes: Axes, ends: Sequence[End]) -> None:
    """Write each name right of where its curve ends, moved apart where they would touch."""
    room = CHAR_WIDTH * max((len(end.text) for end in ends), default=0)
    axes.set_position((LEFT, BOTTOM, 1 - LEFT - room - 0.02, HEIGHT))
    low, high = axes.get_ylim()
    for y, end in zip(apart(sorted(ends), 0.075 * (high - low)), sorted(ends), strict=True):
        axes.text(
            1.02, y, end.text, color=end.color, va="center", transform=axes.get_yaxis_transform()
        )


def apart(ends: Sequence[End], gap: float) -> list[float]:
    """Heights nearest to those wanted (least squares) that keep `gap`; `ends` sorted upwards."""
    # with gap * i taken off they need only not decrease: isotonic regression, by pooling
    pools: list[list[float]] = []
    for i, end in enumerate(ends):
        pools.append([end.y - gap * i])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    level = [float(np.mean(pool)) for pool in pools for _ in pool]
    return [y + gap * i for i, y in enumerate(level)]


def svg(figure: Figure, name: str, *, paper: str | None = None) -> str:
    """The figure as one `<svg>` element whose ids begin with `name`, without date or metadata.

    Args:
        figure: What `panel` made.
        name: Of the figure, unlike those of others on its page.
        paper: Colour behind it, for a figure that stands alone; None lets the page show through.
    """
    with style.context({"svg.hashsalt": name}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=paper is None, facecolor=paper or "none")
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r" *<metadata>.*?</metadata>\n", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for color, variable in VARIABLES.items():
        text = text.replace(color, variable)
    return text.strip()


def accuracy_svg(summary: Summary, *, with_pass: bool) -> str:
    """Accuracy against N: each reward with its 95 % band, greedy and one sample as lines.

    Args:
        summary: Of a run with a checker.
        with_pass: Also draw pass@N, which widens the scale and flattens the rest.
    """
    rewards = list(summary["mean_logprob_by_reward"])
    with style.context(["default", RC]):
        figure, axes = panel("Accuracy, %")
        ends = []
        for row in headline_rows(summary):
            if row.key in ("greedy", "sample"):
                y = 100 * row.accuracy["1"]
                axes.axhline(y, color=INK, lw=0.9, ls="--" if row.key == "greedy" else ":")
                ends.append(End(y, f"{row.name.split(',')[0].lower()} {y:.1f}", INK))
                continue
            color, marker, bands = INK, "", summary["ci95_of_baselines"]["pass_at_n"]
            if row.key in rewards:
                color, marker = look(rewards.index(row.key))
                bands = summary["ci95"][row.key]
            elif not with_pass:
                continue
            y_N = [100 * y for y in row.accuracy.values()]
            _curve(axes, summary, y_N, color, marker)
            low_N, high_N = 100 * np.array([bands[k] for k in row.accuracy]).T
            axes.fill_between(_n(summary), low_N, high_N, color=color, alpha=0.13, lw=0)
            name = row.key if row.key in rewards else "pass@N"
            ends.append(End(y_N[-1], f"{name} {y_N[-1]:.1f}", color))
        against_n(axes, _n(summary))
        name_ends(axes, ends)
        return svg(figure, "coverage" if with_pass else "accuracy")


def logprob_svg(summary: Summary) -> str:
    """Mean log-probability of the chosen response against N, for each reward."""
    with style.context(["default", RC]):
        figure, axes = panel("Mean log-probability of the chosen, nats")
        ends = []
        for i, (reward, by_n) in enumerate(summary["mean_logprob_by_reward"].items()):
            y_N = [np.nan if y is None else y for y in by_n.values()]
            color, marker = look(i)
            _curve(axes, summary, y_N, color, marker)
            if np.isfinite(y_N[-1]):
                text = f"{reward} {y_N[-1]:.1f}".replace("-", "\N{MINUS SIGN}")
                ends.append(End(y_N[-1], text, color))
        against_n(axes, _n(summary))
        name_ends(axes, ends)
        return svg(figure, "logprob")


def histogram_svg(outcome: Outcome, *, reward: str) -> str:
    """Log-probability of valid responses: correct beside incorrect, or all beside the chosen.

    Each histogram is in percent of its own class. The lowest bin holds everything below the
    half per cent quantile as well, so that one improbable response does not set the scale.

    Args:
        outcome: The run.
        reward: What chooses; used where there is no checker.
    """
    logprob_PG = outcome.reward_PG["logprob"]
    shown_PG = outcome.valid_PG & np.isfinite(logprob_PG)
    if outcome.correct_PG is not None:
        groups = {"correct": outcome.correct_PG, "incorrect": ~outcome.correct_PG}
    else:
        chosen_PG = np.zeros_like(shown_PG)
        np.put_along_axis(chosen_PG, order_by(outcome, reward)[:, :1], True, axis=1)
        groups = {"chosen": chosen_PG & outcome.eligible(reward), "all": np.ones_like(shown_PG)}
    with style.context(["default", RC]):
        figure, axes = panel("Responses, % of their class")
        axes.set_xlabel("Log-probability of the response, nats")
        all_X = logprob_PG[shown_PG]
        low, high = (np.quantile(all_X, 0.005), all_X.max()) if all_X.size else (-1.0, 0.0)
        edges = np.linspace(min(low, high - 1e-6), high, N_BINS + 1)
        top = 0.0
        for i, (name, group_PG) in enumerate(groups.items()):
            value_X = logprob_PG[shown_PG & group_PG]
            if value_X.size == 0:
                continue
            count, _ = np.histogram(np.maximum(value_X, edges[0]), edges)
            share = 100 * count / value_X.size
            color, top = SERIES[i], max(top, share.max())
            axes.stairs(share, edges, fill=True, color=color, alpha=0.22, lw=0)
            axes.stairs(share, edges, color=color, lw=1.3, ls="-" if i == 0 else (0, (4, 1.5)))
            median = f"{np.median(value_X):.1f}".replace("-", "\N{MINUS SIGN}")
            text = f"{name}: {value_X.size:,}, median {median}"
            axes.text(0.02, 0.97 - 0.085 * i, text, color=color, va="top", transform=axes.transAxes)
        axes.set_ylim(0, 1.06 * top if top else 1)
        axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
        return svg(figure, "histogram")


def _n(summary: Summary) -> list[int]:
    return [int(k) for k in summary["mean_logprob_of_chosen"]]


def _curve(axes: Axes, summary: Summary, y_N: Sequence[float], color: str, marker: str) -> None:
    axes.plot(_n(summary), y_N, color=color, marker=marker, ms=4.5, lw=1.6)
