"""Best-of-k and pass@k for every k <= G from one set of G samples, without Monte Carlo.

A run draws G completions once; the figure at k is the expectation over a uniformly
random subset of k of them, drawn without replacement. Sort the eligible ones best
first: the one at rank j is chosen if it is in the subset and the j before it are not,

    weight[j] = C(G - 1 - j, k - 1) / C(G, k) = k/G * prod_{i<j} (G - k - i) / (G - 1 - i)

and every figure is a sum of weight x value. At k = G the weights are one-hot: the choice
of `best_of_n`. A vote is not an order statistic (the votes change with the subset), so
`majority` enumerates all subsets where they are few and draws seeded ones where not.

P prompts, G completions per prompt, B subsets.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

from sharpen.errors import InputError

from .outcome import MAJORITY, Outcome

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

    Exact for every reward but "majority", which is exact where C(G, k) <= max(n_subsets, G)
    (so at k = 1 and k = G) and otherwise a mean over `n_subsets` random subsets per prompt.

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
    if reward == MAJORITY:
        weight_PG = _vote_weights(outcome, k, seed, n_subsets)
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
    if reward == MAJORITY:
        member_1G = np.ones((1, outcome.n_samples), dtype=bool)
        reward_PG = np.concatenate([_votes(label_G, member_1G) for label_G in _labels(outcome)])
    else:
        reward_PG = outcome.reward_PG[reward]
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


def _vote_weights(outcome: Outcome, k: int, seed: int, n_subsets: int) -> np.ndarray:
    G = outcome.n_samples
    eligible_PG = outcome.eligible(MAJORITY)
    weight_PG = np.zeros((outcome.n_prompts, G))
    is_exact = math.comb(G, k) <= max(n_subsets, G)
    member_BG = _all_subsets(G, k) if is_exact else None
    for p, label_G in enumerate(_labels(outcome)):
        if member_BG is None:
            # a generator per prompt: its subsets do not depend on which prompts stand before it
            drawn_BG = np.random.default_rng([seed, p]).random((n_subsets, G)).argsort(axis=1) < k
        else:
            drawn_BG = member_BG
        able_BG = drawn_BG & eligible_PG[p]
        votes_BG = np.where(able_BG, _votes(label_G, able_BG), -1.0)
        winner_B = votes_BG.argmax(axis=1)[able_BG.any(axis=1)]
        weight_PG[p] = np.bincount(winner_B, minlength=G) / len(drawn_BG)
    return weight_PG


def _labels(outcome: Outcome) -> Int64[np.ndarray, "P G"]:
    """Answers as small integers per prompt; -1 for a completion that has no vote."""
    label_PG = np.full(outcome.valid_PG.shape, -1, dtype=np.int64)
    eligible_PG = outcome.eligible(MAJORITY)
    for p, row in enumerate(outcome.answers or []):
        seen: dict[str | None, int] = {}
        for g in np.flatnonzero(eligible_PG[p]).tolist():
            if row[g] is not None:
                label_PG[p, g] = seen.setdefault(row[g], len(seen))
    return label_PG


def _votes(label_G: np.ndarray, member_BG: np.ndarray) -> np.ndarray:
    """Votes that each completion's answer gets in each subset; 0 for one without an answer."""
    # column 0 is for no answer and stays empty
    label_A = np.arange(-1, label_G.max() + 1)
    is_vote_GA = (label_G[:, None] == label_A) & (label_A >= 0)
    return (member_BG.astype(np.float64) @ is_vote_GA)[:, label_G + 1]


def _all_subsets(G: int, k: int) -> np.ndarray:
    index_BK = np.array(list(itertools.combinations(range(G), k)))
    member_BG = np.zeros((len(index_BK), G), dtype=bool)
    np.put_along_axis(member_BG, index_BK, True, axis=1)
    return member_BG
