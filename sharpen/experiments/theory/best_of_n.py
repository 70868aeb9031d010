"""Best-of-N in closed form, for a fixed N and for the adaptive rule.

Fixed N    `miss_probability`, `sufficient_n`, `necessary_n`, `fixed_n`: how often it misses y*, how
           many samples it needs; `best_of_n_law`: what it returns
Adaptive   `mu_of`, `stopping`, `certified_by`: expected samples, miss rate, certified fraction

The adaptive rule draws until

    N = the first k with  log k + max_{j <= k} log pi(y_j|x) >= log mu,    mu = ln(2 / delta)

Before k the best so far only grows and mu / k only falls, so the rule goes on past k exactly if
all k draws lie below mu / k:

    g(k) = P[N > k] = P_{y ~ pi}[ pi(y|x) < mu / k ]^k

With p* = max_y pi(y|x), P* the mass of all y that reach it and k0 = ceil(mu / p*), g(k) = 1 below
k0, and summing what y* misses at each k leaves

    E[N] = k0 + sum_{k >= k0} g(k)
    P[miss] = (1 - P*)^k0 - P* sum_{k >= k0} g(k)

A law that is known only above a log-prob gives both as an interval: below it, g(k) lies between 0
and what the known mass leaves.

Y distinct completions of one prompt. Log-probabilities are nats.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from sharpen.errors import InputError, check_value

from .coverage import check_share


def miss_probability(logprob: float, n: int) -> float:
    """Probability that none of n samples is y*: (1 - pi(y*|x))^n.

    Best-of-n by log-prob returns y* exactly when it is among the samples.

    Args:
        logprob: log pi(y*|x), or the log of the mass of y*_gamma.
        n: Samples, at least 0.

    Source:
        Huang et al. 2024, arXiv:2412.01951, proposition C.1, before its bound by e^(-n pi).

    Example:
        >>> round(miss_probability(math.log(0.5), 3), 9)
        0.125
    """
    check_value("n", n, n >= 0, "at least 0")
    p = _probability(logprob)
    if n == 0:
        return 1.0
    return math.exp(n * math.log1p(-p)) if p < 1 else 0.0


def sufficient_n(logprob: float, rho: float) -> int:
    """Samples that proposition C.1 asks for: the least N >= log(1 / rho) / pi(y*|x).

    Args:
        logprob: log pi(y*|x).
        rho: Probability of a miss to stay within, in (0, 1).

    Source:
        Huang et al. 2024, arXiv:2412.01951, proposition C.1.

    Example:
        >>> sufficient_n(math.log(0.5), 0.1), necessary_n(math.log(0.5), 0.1)
        (5, 4)
    """
    check_share("rho", rho)
    return _least(math.log(1 / rho) / _probability(logprob))


def necessary_n(logprob: float, rho: float) -> int:
    """The least n with (1 - pi(y*|x))^n <= rho; never more than `sufficient_n`.

    Args:
        logprob: log pi(y*|x).
        rho: Probability of a miss to stay within, in (0, 1).
    """
    check_share("rho", rho)
    p = _probability(logprob)
    return 1 if p == 1 else max(1, _least(math.log(rho) / math.log1p(-p)))


def fixed_n(logprob: Float64[np.ndarray, " P"], miss: float) -> int:
    """The least n, one for all prompts, whose mean miss rate over them is at most `miss`.

        min { n : E_x[ (1 - pi(y*(x)|x))^n ] <= miss }

    Args:
        logprob: log pi(y*|x) of each prompt.
        miss: In (0, 1).

    Example:
        >>> fixed_n(np.log([0.5, 0.5]), 0.25), fixed_n(np.log([1.0, 0.5]), 0.25)
        (2, 1)
    """
    check_share("miss", miss)
    if len(logprob) == 0:
        raise InputError("`logprob` must hold at least one prompt, got none.")
    low, high = 0, max(necessary_n(float(x), miss) for x in logprob)
    with np.errstate(divide="ignore"):
        rate_P = np.log1p(-np.minimum(np.exp(logprob), 1.0))
    while high - low > 1:
        n = (low + high) // 2
        low, high = (low, n) if np.exp(n * rate_P).mean() <= miss * (1 + 1e-12) else (n, high)
    return high


def best_of_n_law(
    probability: Float64[np.ndarray, " Y"], reward: Float64[np.ndarray, " _"], n: int
) -> Float64[np.ndarray, " Y"]:
    """What best-of-n returns: the exact law over Y completions.

        P_n(y) = F(r(y))^n - F(r(y)-)^n

    where F(r) and F(r-) are the mass of reward at most r, and below r. Completions of equal reward
    share their mass in proportion to their own: best-of-n takes the first it meets.

    Args:
        probability: Of each completion; sums to 1.
        reward: What is chosen by; with -inf for completions that never win, as cut ones, the rest
            of the law is that of samplers that drop them, and -inf wins only against itself.
        n: Samples, at least 1.

    Source:
        Beirami et al. 2024, arXiv:2401.01879, lemma 1, with ties.

    Example:
        >>> best_of_n_law(np.array([0.5, 0.25, 0.25]), np.array([0.0, 1.0, 1.0]), 2)
        array([0.25 , 0.375, 0.375])
    """
    check_value("n", n, n >= 1, "at least 1")
    if probability.shape != reward.shape or np.isnan(reward).any():
        raise InputError("`reward` must hold one number, not NaN, for each completion.")
    total = float(probability.sum())
    if (probability < 0).any() or not math.isclose(total, 1.0, abs_tol=1e-9):
        raise InputError(f"`probability` must be at least 0 and sum to 1, got a sum of {total}.")
    level, of_Y = np.unique(reward, return_inverse=True)
    mass_L = np.bincount(of_Y, weights=probability, minlength=len(level))
    at_most_L = np.minimum(np.cumsum(mass_L), 1.0)
    below_L = np.concatenate([[0.0], at_most_L[:-1]])
    won_L = at_most_L**n - below_L**n
    share_Y = np.divide(probability, mass_L[of_Y], where=mass_L[of_Y] > 0, out=0 * probability)
    return won_L[of_Y] * share_Y


def mu_of(delta: float) -> float:
    """Mu = ln(2 / delta): the miss rate of y* stays within delta / 2 at this mu.

    Source:
        Huang et al. 2024, arXiv:2412.01951, theorem D.1.
    """
    check_share("delta", delta)
    return math.log(2 / delta)


@dataclass(frozen=True)
class StoppingBounds:
    """What the adaptive rule does on one prompt; low and high are equal for a law known whole.

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


def stopping(
    logprobs: Sequence[float], mu: float, *, whole: bool = False, tolerance: float = 1e-9
) -> StoppingBounds:
    """Expected samples and miss rate of the adaptive rule on one prompt.

    Args:
        logprobs: Of the most probable completions, in nats: every one above the smallest of them.
        mu: Of the rule.
        whole: Whether `logprobs` are all completions, and what is left of the mass never stops the
            rule (as what is cut does not).
        tolerance: Completions this close to the best, in nats, are y* too.

    Source:
        The rule, and the bounds that these numbers sharpen, P[miss] <= e^(-|y*| mu) and
        E[N] <= (mu + 1 / |y*|) / p*: Huang et al. 2024, arXiv:2412.01951, appendix D and lemma I.1.

    Example:
        >>> found = stopping([math.log(0.5), math.log(0.25), math.log(0.25)], mu=1.0, whole=True)
        >>> found.first, found.expected_low, found.miss_low
        (2, 2.375, 0.0625)
    """
    p_Y, known_Y = _probabilities(logprobs, mu)
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
    return StoppingBounds(
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

    Example:
        >>> certified_by([math.log(0.5), math.log(0.5)], mu=1.0, cap=2)
        1.0
    """
    check_value("cap", cap, cap >= 1, "at least 1")
    p_Y, known_Y = _probabilities(logprobs, mu)
    reached = int(np.searchsorted(-p_Y, -mu / cap * (1 - 1e-12), side="right"))
    return 1.0 - max(0.0, 1.0 - float(known_Y[reached - 1])) ** cap if reached else 0.0


def _probability(logprob: float) -> float:
    """The probability, at most 1, of a log-prob that may be off by rounding."""
    if not -math.inf < logprob <= 1e-5:
        raise InputError(f"`logprob` must be a log-prob above -inf and at most 0, got {logprob}.")
    return min(1.0, math.exp(logprob))


def _least(x: float) -> int:
    """The least integer at least x, where x may be an integer up to rounding."""
    return math.ceil(x - 1e-9 * max(1.0, x))


def _probabilities(logprobs: Sequence[float], mu: float) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, largest first, and their running sum."""
    check_value("mu", mu, 0 < mu < math.inf, "positive and finite")
    p_Y = -np.sort(-np.exp(np.asarray(logprobs, dtype=np.float64)))
    if len(p_Y) == 0 or not p_Y.min() > 0 or not p_Y.sum() <= 1 + 1e-5:
        raise InputError(
            "`logprobs` must hold at least one log-prob above -inf, with a mass of at most 1, "
            f"got {len(p_Y)} of mass {p_Y.sum()}."
        )
    return p_Y, np.minimum(np.cumsum(p_Y), 1.0)
