"""What a study measured of one method at one setting, seed by seed, before seeds are joined.

P prompts, G completions per prompt. Nats.

Entries to the rows of the table: means over seeds, 95 % bands over prompts.

One paired bootstrap over prompts serves all rows; the accuracy of a prompt is its mean over seeds
first, so a band tells how far other puzzles would move a figure. `by_seed` tells the noise of the
seeds. P prompts, M columns, B resamples.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64

from sharpen.evaluation.metrics import (
    N_RESAMPLES,
    ci95,
    p_value,
    pass_at_k,
    resample_means,
    sample_accuracy,
)

from .pools import Pool
from .selectors import Selected


@dataclass(frozen=True)
class Measured:
    """One seed.

    Attributes:
        accuracy_P: Expected accuracy of each prompt's answer.
        logprob: Mean log pi_base of the answers, nats; of those that have one.
        length: Mean tokens of the answers, end tokens among them.
        tokens: Completion tokens that the model reads or writes for one answer, mean over prompts.
        kl: KL to the base model in nats, if it can be estimated; of greedy decoding, -log p(y).
        pass_P: Chance that one of the samples is right, if there are several; and of how many.
        facts: Further means by name.
    """

    accuracy_P: Float64[np.ndarray, " P"]
    logprob: float
    length: float
    tokens: float
    kl: float | None = None
    pass_P: Float64[np.ndarray, " P"] | None = None
    n_pass: int | None = None
    facts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A method at a setting.

    Attributes:
        group: "decoding", "selection", "power" or "training": which table.
        name: Of the method.
        n: Samples that it chooses from; None where there is no choice.
        measured: One a seed.
        stages: Names of the runs that it needs.
        training: Tokens and seconds that its training took, mean over seeds.
        tokens_as: Number of plain samples that cost as many tokens, where that is the comparison.
        bound_of_kl: What the KL to the base cannot exceed, nats; of best-of-N by a fixed reward.
    """

    group: str
    name: str
    n: int | None
    measured: Sequence[Measured]
    stages: Sequence[str]
    training: Mapping[str, int | float] | None = None
    tokens_as: int | None = None
    bound_of_kl: float | None = None

    @property
    def accuracy(self) -> Float64[np.ndarray, " P"]:
        """Mean over seeds."""
        return np.mean([m.accuracy_P for m in self.measured], axis=0)


def of_samples(pool: Pool, drawn_PG: Float64[np.ndarray, "P G"] | None = None) -> Measured:
    """One sample of a law, from several independent ones of each prompt.

    KL(q || p) = E[log q(y) - log p(y)],   E under q, here the samples.

    Args:
        pool: Samples of it.
        drawn_PG: Log-prob of each under the law q that it was drawn from, nats; None: unknown.
    """
    logprob_PG, G = pool.outcome.reward_PG["logprob"], pool.length_PG.shape[1]
    length = float(pool.length_PG.mean())
    return Measured(
        sample_accuracy(pool.correct),
        _mean(logprob_PG),
        length,
        length,
        kl=None if drawn_PG is None else _mean(drawn_PG - logprob_PG),
        pass_P=pass_at_k(pool.correct, G) if G > 1 else None,
        n_pass=G if G > 1 else None,
    )


def of_power(pool: Pool, *, samples_each: int, alpha: float) -> Measured:
    """One sample of a sampler of p^alpha. Its KL is that of the target, where Z was estimated.

    KL(p^alpha / Z || p) = (alpha - 1) E[log p] - log Z,   E under p^alpha / Z, here the samples.

    Args:
        pool: Samples; those of a prompt may depend on each other, so there is no pass@n.
        samples_each: Whole completions that are drawn for a sample, where its tokens were not
            counted.
        alpha: The power.
    """
    one = of_samples(pool)
    kl = None
    if pool.log_z_P is not None:
        kl = (alpha - 1) * one.logprob - _mean(pool.log_z_P)
    tokens = samples_each * one.length if pool.cost_PG is None else float(pool.cost_PG.mean())
    return Measured(one.accuracy_P, one.logprob, one.length, tokens, kl=kl)


def of_choice(pool: Pool, selected: Selected, k: int) -> Measured:
    """The choice of a selector from k samples of a pool."""
    weight_PG, correct_PG = selected.weight_PG, pool.correct
    n_used = selected.facts.get("n_used", float(k))
    logprob_PG = pool.outcome.reward_PG["logprob"]
    return Measured(
        (weight_PG * correct_PG).sum(axis=1),
        _weighted(logprob_PG, weight_PG, ~np.isnan(logprob_PG)),
        _weighted(pool.length_PG.astype(np.float64), weight_PG, np.ones_like(correct_PG)),
        n_used * float(pool.length_PG.mean()),
        facts=selected.facts,
    )


def best_of_n_bound(n: int) -> float:
    """Log n - (n - 1) / n, nats: best-of-n by any fixed reward is at most that far from the base.

    Source:
        Beirami et al. 2024, arXiv:2401.01879.

    Example:
        >>> round(best_of_n_bound(1), 4), round(best_of_n_bound(25), 4)
        (0.0, 2.2589)
    """
    return math.log(n) - (n - 1) / n


def _mean(values: Float64[np.ndarray, "..."]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan


def _weighted(
    value_PG: Float64[np.ndarray, "P G"],
    weight_PG: Float64[np.ndarray, "P G"],
    counts_PG: Bool[np.ndarray, "P G"],
) -> float:
    used_PG = (weight_PG > 0) & counts_PG
    total = weight_PG[used_PG].sum()
    return float(weight_PG[used_PG] @ value_PG[used_PG] / total) if total > 0 else math.nan


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
