"""Uncertainty over prompts: percentile bootstrap of means, and of their paired differences.

The prompt is the unit of resampling; all samples of a prompt move together. One set of
resamples serves every statistic of a run, so any two of them are paired.

P prompts, M statistics, B resamples.
"""

import numpy as np
from jaxtyping import Float64

N_RESAMPLES = 10_000  # a choice: the Monte Carlo error of a 95 % limit is far below its width
CHUNK = 1 << 22  # prompt draws held at once, 32 MiB


def resample_means(
    value_PM: Float64[np.ndarray, "P M"], *, seed: int = 0, n_resamples: int = N_RESAMPLES
) -> Float64[np.ndarray, "B M"]:
    """Mean of every column over P prompts drawn with replacement, `n_resamples` times."""
    P = len(value_PM)
    rng = np.random.default_rng(seed)
    rows = max(1, CHUNK // P)
    means = []
    for start in range(0, n_resamples, rows):
        size = min(rows, n_resamples - start)
        draw_BP = rng.integers(P, size=(size, P)) + P * np.arange(size)[:, None]
        count_BP = np.bincount(draw_BP.ravel(), minlength=size * P).reshape(size, P)
        means.append(count_BP.astype(np.float64) @ value_PM / P)
    return np.concatenate(means)


def ci95(statistic_B: Float64[np.ndarray, " B"]) -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles of a resampled statistic."""
    low, high = np.percentile(statistic_B, [2.5, 97.5])
    return float(low), float(high)


def p_value(difference_B: Float64[np.ndarray, " B"]) -> float:
    """Two-sided p-value of "the difference is zero", from its resampled values.

        p = min(1, 2 * (1 + min(#{d <= 0}, #{d >= 0})) / (B + 1))

    It is the percentile interval turned round: p < 0.05 where the 95 % interval leaves out 0.
    Never 0; the smallest possible is 2 / (B + 1).

    Source:
        Efron and Tibshirani 1993, chapters 13 and 15; the added one is Davison and Hinkley 1997.
    """
    # equal vectors summed in another order differ in the last bits; that is not a sign
    d = np.round(difference_B, 12)
    tail = min(int((d <= 0).sum()), int((d >= 0).sum()))
    return min(1.0, 2 * (1 + tail) / (len(d) + 1))


def bootstrap_ci95(
    value_P: Float64[np.ndarray, " P"], *, seed: int = 0, n_resamples: int = N_RESAMPLES
) -> tuple[float, float]:
    """95 % percentile interval of the mean of `value_P` over prompts."""
    return ci95(resample_means(value_P[:, None], seed=seed, n_resamples=n_resamples)[:, 0])


def paired_p_value(
    a_P: Float64[np.ndarray, " P"],
    b_P: Float64[np.ndarray, " P"],
    *,
    seed: int = 0,
    n_resamples: int = N_RESAMPLES,
) -> float:
    """Two-sided paired bootstrap p-value (`p_value`) of equal means of two vectors over prompts."""
    difference_P1 = (a_P - b_P)[:, None]
    return p_value(resample_means(difference_P1, seed=seed, n_resamples=n_resamples)[:, 0])
