"""How the error of SFT-Sharpening falls with prompts n and samples N, where all of it is exact.

    P_x[pihat(y*|x) <= 1 - delta]  <~  (1 / delta) log|Pi| / n  +  C_cov / N*

A model of X prompts: each has one y* of probability p_x among M completions, the others equal. The
class is finite and realisable: for each prompt, which completion is y*; so it holds the law of
best-of-N, and its maximum-likelihood member takes the completion seen most often at each prompt.
Masses of prompts fall by halves and the p_x are spread evenly from a least one on. With a least p_x
of 0 both terms have long tails, the worst that the bound allows; else the second one falls
exponentially.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from sharpen.errors import InputError

from .coverage import check_share


@dataclass(frozen=True)
class Prompts:
    """Masses of X prompts and p_x of each, with M completions a prompt.

    Attributes:
        mass: Sums to 1.
        p_star: pi(y*|x), above 1 / M.
        M: Completions of a prompt, at least 2.
    """

    mass: Float64[np.ndarray, " X"]
    p_star: Float64[np.ndarray, " X"]
    M: int

    @property
    def coverage(self) -> float:
        """C_cov = E_x[1 / p_x]."""
        return float((self.mass / self.p_star).sum())

    @property
    def log_class(self) -> float:
        """The logarithm of |Pi| = M^X."""
        return len(self.mass) * float(np.log(self.M))


def spread_prompts(halvings: int = 12, levels: int = 16, least: float = 0.0) -> Prompts:
    """Masses 2^-i, each shared by `levels` prompts: p_x = least + (1 - least) (j + 1/2) / levels.

    Raises:
        InputError: If either number is below 1, or `least` is not in [0, 1).
    """
    if min(halvings, levels) < 1:
        raise InputError(
            f"`halvings` and `levels` must be at least 1, got {halvings} and {levels}."
        )
    if not 0 <= least < 1:
        raise InputError(f"`least` must be in [0, 1), got {least}.")
    share_I = 0.5 ** np.arange(halvings)
    mass_X = np.repeat(share_I / share_I.sum() / levels, levels)
    p_J = least + (1 - least) * (np.arange(levels) + 0.5) / levels
    return Prompts(mass_X, np.tile(p_J, halvings), 4 * levels)


def simulated_error(
    prompts: Prompts, n_prompts: int, n_samples: int, delta: float, rng: np.random.Generator
) -> float:
    """P_x[pihat(y*|x) <= 1 - delta] of the maximum-likelihood member on one drawn data set.

    A prompt fails if another completion was seen as often as y* (ties are settled by lot), or if
    best-of-N itself has no more than 1 - delta on y*.

    Args:
        prompts: The model.
        n_prompts: n, prompts drawn with replacement.
        n_samples: N of best-of-N.
        delta: In (0, 1).
        rng: Of all draws.

    Raises:
        InputError: If an argument is out of its range.

    Source:
        Huang et al. 2024, arXiv:2412.01951, theorem 4.1 and its general form in appendix H.
    """
    check_share("delta", delta)
    if n_prompts < 1 or n_samples < 1:
        raise InputError(
            f"`n_prompts` and `n_samples` must be at least 1, got {n_prompts} and {n_samples}."
        )
    won_X = -np.expm1(n_samples * np.log1p(-prompts.p_star))
    other_X = (1 - won_X) / (prompts.M - 1)
    law_XM = np.column_stack([won_X, np.tile(other_X[:, None], (1, prompts.M - 1))])
    visits_X = rng.multinomial(n_prompts, prompts.mass)
    chosen_X = _most_seen(rng.multinomial(visits_X, law_XM), rng)
    failed_X = (chosen_X != 0) | (won_X <= 1 - delta)
    return float(prompts.mass[failed_X].sum())


def error_bound(prompts: Prompts, n_prompts: int, n_samples: int, delta: float) -> float:
    """What theorem 4.1 promises of the same, without its constant: may well be above 1.

        (1 / delta) log|Pi| / n + C_cov / N*,   N = N* log(2 / delta)

    Raises:
        InputError: If delta is not in (0, 1).
    """
    check_share("delta", delta)
    fitted = prompts.log_class / (delta * n_prompts)
    return fitted + prompts.coverage * math.log(2 / delta) / n_samples


def _most_seen(count: Int64[np.ndarray, "X M"], rng: np.random.Generator) -> np.ndarray:
    # less than one half cannot change an order of counts
    return np.argmax(count + 0.5 * rng.random(count.shape), axis=1)


def fit_two_terms(
    n: Float64[np.ndarray, " K"], N: Float64[np.ndarray, " K"], error: Float64[np.ndarray, " K"]
) -> tuple[float, float, float]:
    """a, b and R^2 of error = a / n + b / N, by least squares of relative errors.

    Raises:
        InputError: If an error is not positive, or there are fewer than three.

    Example:
        >>> n, N = np.array([1.0, 2.0, 2.0, 4.0]), np.array([1.0, 1.0, 4.0, 8.0])
        >>> a, b, r2 = fit_two_terms(n, N, 3 / n + 5 / N)
        >>> round(a, 9), round(b, 9), round(r2, 9)
        (3.0, 5.0, 1.0)
    """
    if len(error) < 3 or not (error > 0).all():
        raise InputError("`error` must hold at least three positive numbers; leave zeros out.")
    # each row divided by its error: the fit is to 1
    row_K2 = np.column_stack([1 / n, 1 / N]) / error[:, None]
    (a, b), *_ = np.linalg.lstsq(row_K2, np.ones(len(error)), rcond=None)
    log_K = np.log(error)
    left_K = log_K - np.log(np.maximum(a / n + b / N, 1e-300))
    r2 = 1 - float((left_K**2).sum() / ((log_K - log_K.mean()) ** 2).sum())
    return float(a), float(b), r2
