"""The adaptive rule of best-of-N in closed form: expected samples, miss rate, certified fraction.

    N = the first k with  log k + max_{j <= k} log pi(y_j|x) >= log mu,    mu = ln(2 / delta)

Before k the best so far only grows and mu / k only falls, so the rule goes on past k exactly if
all k draws lie below mu / k:

    g(k) = P[N > k] = P_{y ~ pi}[ pi(y|x) < mu / k ]^k

With p* = max_y pi(y|x), P* the mass of all y that reach it and k0 = ceil(mu / p*), g(k) = 1 below
k0, and summing what y* misses at each k leaves

    E[N] = k0 + sum_{k >= k0} g(k)
    P[miss] = (1 - P*)^k0 - P* sum_{k >= k0} g(k)

A law that is known only above a log-prob gives both as an interval: below it, g(k) lies between 0
and what the known mass leaves. Log-probabilities are nats.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sharpen.errors import InputError

from .coverage import check_share


@dataclass(frozen=True)
class Stopping:
    """What the rule does on one prompt. `low` and `high` are equal where the law is known whole.

    Attributes:
        first: k0: it never stops before so many samples.
        expected_low: E[N] is at least this.
        expected_high: And at most this.
        miss_low: P[y* not among the samples when it stops] is at least this.
        miss_high: And at most this.
    """

    first: int
    expected_low: float
    expected_high: float
    miss_low: float
    miss_high: float


def mu_of(delta: float) -> float:
    """Mu = ln(2 / delta): the miss rate of y* stays within delta / 2 at this mu.

    Raises:
        InputError: If delta is not in (0, 1).

    Source:
        Huang et al. 2024, arXiv:2412.01951, theorem D.1.
    """
    check_share("delta", delta)
    return math.log(2 / delta)


def stopping(
    logprobs: Sequence[float], mu: float, *, whole: bool = False, tolerance: float = 1e-9
) -> Stopping:
    """Expected samples and miss rate of the adaptive rule on one prompt.

    Args:
        logprobs: Of the most probable completions, in nats: every one above the smallest of them.
        mu: Of the rule.
        whole: Whether `logprobs` are all completions, and what is left of the mass never stops the
            rule (as what is cut does not).
        tolerance: Completions this close to the best, in nats, are y* too.

    Raises:
        InputError: If there is no completion, their mass is above 1, or mu is not positive.

    Source:
        The rule, and the bounds that these numbers sharpen, P[miss] <= e^(-|y*| mu) and
        E[N] <= (mu + 1 / |y*|) / p*: Huang et al. 2024, arXiv:2412.01951, appendix D and lemma I.1.

    Example:
        >>> found = stopping([math.log(0.5), math.log(0.25), math.log(0.25)], mu=1.0, whole=True)
        >>> found.first, found.expected_low, found.miss_low
        (2, 2.375, 0.0625)
    """
    p_Y, known_Y = _law(logprobs, mu)
    best = float(p_Y[0])
    star = min(1.0, float(p_Y[p_Y >= best * math.exp(-tolerance)].sum()))
    # from these k on, one more completion stops the rule: between them g(k) is geometric
    start_Y = np.maximum(1, np.ceil(mu / p_Y * (1 - 1e-12)))
    first = int(start_Y[0])
    with np.errstate(divide="ignore"):
        rate_Y = np.log1p(-known_Y)
    head_Y = np.exp(start_Y * rate_Y)
    tail_Y = np.append(np.exp(start_Y[1:] * rate_Y[:-1]), 0.0)
    sum_Y = (head_Y - tail_Y) / known_Y
    high = float(sum_Y.sum())
    # behind the last one, what is not listed may stop it at once
    low = high if whole else float(sum_Y[:-1].sum())
    none = math.exp(first * math.log1p(-star)) if star < 1 else 0.0
    return Stopping(
        first=first,
        expected_low=first + low,
        expected_high=first + high,
        miss_low=max(0.0, none - star * high),
        miss_high=max(0.0, none - star * low),
    )


def certified_by(logprobs: Sequence[float], mu: float, cap: int) -> float:
    """P[N <= cap]: how often the rule has stopped, and so certified its answer, by `cap` samples.

    Args:
        logprobs: As in `stopping`; where a completion outside them could stop the rule by `cap`,
            the number is a lower bound.
        mu: Of the rule.
        cap: Most samples.

    Raises:
        InputError: As `stopping`, or if `cap` < 1.

    Example:
        >>> certified_by([math.log(0.5), math.log(0.5)], mu=1.0, cap=2)
        1.0
    """
    if cap < 1:
        raise InputError(f"`cap` must be at least 1, got {cap}.")
    p_Y, known_Y = _law(logprobs, mu)
    reached = int(np.searchsorted(-p_Y, -mu / cap * (1 - 1e-12), side="right"))
    return 1.0 - max(0.0, 1.0 - float(known_Y[reached - 1])) ** cap if reached else 0.0


def _law(logprobs: Sequence[float], mu: float) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, largest first, and their running sum."""
    if not 0 < mu < math.inf:
        raise InputError(f"`mu` must be positive and finite, got {mu}.")
    p_Y = -np.sort(-np.exp(np.asarray(logprobs, dtype=np.float64)))
    if len(p_Y) == 0 or not p_Y.min() > 0 or not p_Y.sum() <= 1 + 1e-5:
        raise InputError(
            "`logprobs` must hold at least one log-prob above -inf, with a mass of at most 1, "
            f"got {len(p_Y)} of mass {p_Y.sum()}."
        )
    return p_Y, np.minimum(np.cumsum(p_Y), 1.0)
