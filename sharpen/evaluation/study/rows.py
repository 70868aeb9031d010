"""Entries to the rows of the table: means over seeds, 95 % bands over prompts.

One paired bootstrap over prompts serves all rows; the accuracy of a prompt is its mean over seeds
first, so a band tells how far other puzzles would move a figure. `by_seed` tells the noise of the
seeds. P prompts, M columns, B resamples.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from ..bootstrap import N_RESAMPLES, ci95, p_value, resample_means
from .entries import Entry, Measured

# Any: JSON values
Row = dict[str, Any]

SAMPLE = ("decoding", "T = 1", None)  # what gains are over
EQUAL_COST = "best-of-N, logprob"
DIGITS = 4


def table_rows(
    entries: Sequence[Entry], *, target_n: int, seed: int = 0, n_resamples: int = N_RESAMPLES
) -> list[Row]:
    """One JSON object a row.

    Accuracies are fractions of 1, gains are points; `gap_closed` is the gain over one sample as a
    share of that of best-of-`target_n` by log-prob, its band that of the ratio.

    Args:
        entries: With one of T = 1 and those of best-of-N by log-prob that are compared with.
        target_n: Of the gap.
        seed: Of the bootstrap.
        n_resamples: Of the bootstrap.
    """
    keys = [(e.group, e.name, e.n) for e in entries]
    value_PM = np.stack([e.accuracy for e in entries], axis=1)
    mean_BM = resample_means(value_PM, seed=seed, n_resamples=n_resamples)
    mean_B = dict(zip(keys, mean_BM.T, strict=True))
    mean = {key: float(x_P.mean()) for key, x_P in zip(keys, value_PM.T, strict=True)}
    goal = ("selection", EQUAL_COST, target_n)
    rows = []
    for entry, key in zip(entries, keys, strict=True):
        gain_B = mean_B[key] - mean_B[SAMPLE]
        row: Row = {
            "group": entry.group,
            "name": entry.name,
            "n": entry.n,
            "accuracy": _round(mean[key]),
            "ci95": _band(mean_B[key]),
            "by_seed": [_round(float(m.accuracy_P.mean())) for m in entry.measured],
            "gain_points": _round(100 * (mean[key] - mean[SAMPLE]), 2),
            "ci95_of_gain": _band(100 * gain_B, 2),
            "p_vs_sample": _round(p_value(gain_B)) if key != SAMPLE else None,
            **_means(entry.measured),
        }
        if entry.bound_of_kl is not None:
            row["kl_at_most"] = _round(entry.bound_of_kl)
        if entry.tokens_as is not None:
            rival = ("selection", EQUAL_COST, entry.tokens_as)
            row["equal_cost"] = {
                "n": entry.tokens_as,
                "accuracy": _round(mean[rival]),
                "difference_points": _round(100 * (mean[key] - mean[rival]), 2),
                "ci95": _band(100 * (mean_B[key] - mean_B[rival]), 2),
                "p": _round(p_value(mean_B[key] - mean_B[rival])),
            }
        if entry.group == "training":
            row["training"] = entry.training
            row["gap_closed"] = _share(mean, mean_B, key, goal)
        seeds = list(range(len(entry.measured)))
        rows.append(row | {"seeds": seeds, "stages": list(entry.stages)})
    return rows


def _means(measured: Sequence[Measured]) -> Row:
    """Means over seeds of what is a number already."""
    found: Row = {
        name: _round(float(np.mean([getattr(m, name) for m in measured])))
        for name in ("logprob", "length", "tokens")
    }
    kl = [m.kl for m in measured if m.kl is not None]
    found["kl"] = _round(float(np.mean(kl))) if kl else None
    passed = [m.pass_P for m in measured if m.pass_P is not None]
    found["pass"] = (
        {"n": measured[0].n_pass, "share": _round(float(np.mean([x.mean() for x in passed])))}
        if passed
        else None
    )
    names = measured[0].facts
    found["facts"] = {n: _round(float(np.mean([m.facts[n] for m in measured]))) for n in names}
    return found


def _share(
    mean: Mapping[tuple, float],
    mean_B: Mapping[tuple, Float64[np.ndarray, " B"]],
    key: tuple,
    goal: tuple,
) -> Row | None:
    gap = mean[goal] - mean[SAMPLE]
    if gap <= 0:
        return None
    gap_B = mean_B[goal] - mean_B[SAMPLE]
    # a resample without a gap would have no ratio
    share_B = (mean_B[key] - mean_B[SAMPLE])[gap_B > 0] / gap_B[gap_B > 0]
    return {
        "of_n": goal[2],
        "share": _round((mean[key] - mean[SAMPLE]) / gap),
        "ci95": _band(share_B),
    }


def _band(value_B: Float64[np.ndarray, " B"], digits: int = DIGITS) -> list[float | None]:
    return [_round(x, digits) for x in ci95(value_B)]


def _round(value: float, digits: int = DIGITS) -> float | None:
    # + 0.0 turns -0.0 into 0.0
    return round(value, digits) + 0.0 if math.isfinite(value) else None
