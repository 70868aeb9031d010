"""What a study measured of one method at one setting, seed by seed, before seeds are joined.

P prompts, G completions per prompt. Nats.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float64

from ..curves import pass_at_k, sample_accuracy
from .pool import Pool
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
