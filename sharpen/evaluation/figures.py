"""The figures of the report as inline SVG: text stays text, colours follow the page.

Every figure is a string that stands inside HTML.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from .curves import order_by
from .headline import headline_rows
from .outcome import Outcome
from .panel import INK, RC, SERIES, End, against_n, look, name_ends, panel, svg
from .summary import Summary

N_BINS = 48


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
