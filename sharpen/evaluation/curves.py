"""Best-of-k and pass@k for every k <= G from one set of G samples, without Monte Carlo.

A run draws G completions once; the figure at k is the expectation over a uniformly
random subset of k of them, drawn without replacement. Sort the eligible ones best
first: the one at rank j is chosen if it is in the subset and the j before it are not,

    weight[j] = C(G - 1 - j, k - 1) / C(G, k) = k/G * prod_{i<j} (G - k - i) / (G - 1 - i)

and every figure is a sum of weight x value. At k = G the weights are one-hot: the choice
of `best_of_n`. A vote is not an order statistic (the votes change with the subset), so
`majority` and `rpc` enumerate all subsets where they are few and draw seeded ones where not.

P prompts, G completions per prompt.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

from sharpen.errors import InputError

from .outcome import MAJORITY, VOTES, Outcome
from .subset_votes import all_votes, vote_weights

N_SUBSETS = 200  # of a vote, per prompt: standard error at most 0.035 / sqrt(P); a choice


@dataclass(frozen=True)
class BestOfK:
    """Best-of-k of one reward at one k, prompt by prompt, so that prompts can be resampled.

    Attributes:
        weight_PG: Probability that each completion is the chosen one; a row sums to the share
            of subsets that hold an eligible completion.
        accuracy_P: Probability of a correct choice; a subset without an eligible completion
            counts as wrong. None without a checker.
        mean_logprob: Mean log-probability of the chosen, nats, over all prompts and subsets
            that have a choice (pooled, each with its probability); NaN if none has.
    """

    weight_PG: Float64[np.ndarray, "P G"]
    accuracy_P: Float64[np.ndarray, " P"] | None
    mean_logprob: float


def best_of_k(
    outcome: Outcome, reward: str, k: int, *, seed: int = 0, n_subsets: int = N_SUBSETS
) -> BestOfK:
    """Expected accuracy and log-probability of the best of k random samples by `reward`.

    Exact for every reward but the votes "majority" and "rpc", which are exact where
    C(G, k) <= max(n_subsets, G) (so at k = 1 and k = G) and otherwise a mean over `n_subsets`
    random subsets per prompt.

    Args:
        outcome: The run.
        reward: One of `outcome.rewards`.
        k: Subset size, 1 <= k <= G.
        seed: Of the random subsets; not used by exact figures.
        n_subsets: Random subsets per prompt, >= 1.

    Raises:
        InputError: If `k` is out of range or the reward unknown.
    """
    _check_k(k, outcome.n_samples)
    if reward in VOTES:
        weight_PG = vote_weights(outcome, reward, k, seed, n_subsets)
    else:
        weight_PG = _rank_weights(outcome, reward, k)
    logprob_PG = outcome.reward_PG["logprob"]
    counted_PG = (weight_PG > 0) & ~np.isnan(logprob_PG)
    total = weight_PG[counted_PG].sum()
    mean = float(weight_PG[counted_PG] @ logprob_PG[counted_PG] / total) if total > 0 else math.nan
    accuracy_P = None
    if outcome.correct_PG is not None:
        accuracy_P = (weight_PG * outcome.correct_PG).sum(axis=1)
    return BestOfK(weight_PG, accuracy_P, mean)


def pass_at_k(correct_PG: Bool[np.ndarray, "P G"], k: int) -> Float64[np.ndarray, " P"]:
    """Probability that at least one of k random samples is correct, valid or not.

        1 - C(G - c, k) / C(G, k) = 1 - prod_{i<k} (G - c - i) / (G - i)

    Raises:
        InputError: If `k` is not in 1..G.

    Source:
        Chen et al. 2021, arXiv:2107.03374, equation 1.

    Example:
        >>> pass_at_k(np.array([[True, False, False, False]]), 2)
        array([0.5])
    """
    G = correct_PG.shape[1]
    _check_k(k, G)
    i_k = np.arange(k)
    wrong_P = G - correct_PG.sum(axis=1)
    # where k > G - c one factor is exactly 0
    return 1 - np.prod((wrong_P[:, None] - i_k) / (G - i_k), axis=1)


def sample_accuracy(correct_PG: Bool[np.ndarray, "P G"]) -> Float64[np.ndarray, " P"]:
    """Expected accuracy of one sample: the mean over all G, valid or not."""
    return correct_PG.mean(axis=1, dtype=np.float64)


def order_by(outcome: Outcome, reward: str) -> Int64[np.ndarray, "P G"]:
    """Completion indices best first: eligible before ineligible, ties by the lower index."""
    eligible_PG = outcome.eligible(reward)
    reward_PG = all_votes(outcome) if reward == MAJORITY else outcome.reward_PG[reward]
    # -inf is a legal reward, so eligibility is a key of its own and not a sentinel value
    key_PG = np.where(eligible_PG, -reward_PG, 0.0)
    return np.lexsort((key_PG, ~eligible_PG), axis=1).astype(np.int64)


def _check_k(k: int, G: int) -> None:
    if not 1 <= k <= G:
        raise InputError(f"`k` must be in 1..{G}, the samples per prompt, got {k}; sample more.")


def _rank_weights(outcome: Outcome, reward: str, k: int) -> np.ndarray:
    G = outcome.n_samples
    i = np.arange(G - 1)
    step = np.maximum(G - k - i, 0) / (G - 1 - i)
    weight_G = k / G * np.concatenate([[1.0], np.cumprod(step)])
    weight_PG = np.empty((outcome.n_prompts, G))
    np.put_along_axis(weight_PG, order_by(outcome, reward), weight_G[None], axis=1)
    return np.where(outcome.eligible(reward), weight_PG, 0.0)
