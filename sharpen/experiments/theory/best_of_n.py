"""Best-of-N in closed form: how often it misses y*, how many samples it needs, what it returns.

Y distinct completions of one prompt. Log-probabilities are nats.
"""

import math

import numpy as np
from jaxtyping import Float64

from sharpen.errors import InputError

from .coverage import check_share


def miss_probability(logprob: float, n: int) -> float:
    """Probability that none of n samples is y*: (1 - pi(y*|x))^n.

    Best-of-n by log-prob returns y* exactly when it is among the samples.

    Args:
        logprob: log pi(y*|x), or the log of the mass of y*_gamma.
        n: Samples, at least 0.

    Raises:
        InputError: If an argument is out of its range.

    Source:
        Huang et al. 2024, arXiv:2412.01951, proposition C.1, before its bound by e^(-n pi).

    Example:
        >>> round(miss_probability(math.log(0.5), 3), 9)
        0.125
    """
    if n < 0:
        raise InputError(f"`n` must be at least 0, got {n}.")
    p = _probability(logprob)
    if n == 0:
        return 1.0
    return math.exp(n * math.log1p(-p)) if p < 1 else 0.0


def sufficient_n(logprob: float, rho: float) -> int:
    """Samples that proposition C.1 asks for: the least N >= log(1 / rho) / pi(y*|x).

    Args:
        logprob: log pi(y*|x).
        rho: Probability of a miss to stay within, in (0, 1).

    Raises:
        InputError: If an argument is out of its range.

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

    Raises:
        InputError: If an argument is out of its range.
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

    Raises:
        InputError: If an argument is out of its range.

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

    Raises:
        InputError: If an argument is out of its range.

    Source:
        Beirami et al. 2024, arXiv:2401.01879, lemma 1, with ties.

    Example:
        >>> best_of_n_law(np.array([0.5, 0.25, 0.25]), np.array([0.0, 1.0, 1.0]), 2)
        array([0.25 , 0.375, 0.375])
    """
    if n < 1:
        raise InputError(f"`n` must be at least 1, got {n}.")
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


def _probability(logprob: float) -> float:
    if not -math.inf < logprob <= 1e-5:
        raise InputError(f"`logprob` must be a log-prob above -inf and at most 0, got {logprob}.")
    return min(1.0, math.exp(logprob))


def _least(x: float) -> int:
    """The least integer at least x, where x may be an integer up to rounding."""
    return math.ceil(x - 1e-9 * max(1.0, x))
