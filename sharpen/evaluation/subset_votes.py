"""Votes over random subsets of a prompt's completions: which completion each subset chooses.

In a subset the value of a completion is that of its answer: the number of completions that give it
("majority"), or the log of the summed probability of the distinct ones ("rpc"). The first
completion of the highest value is the choice; one without an answer has the least value there is.

P prompts, G completions per prompt, B subsets, A answers, R distinct completions.
"""

import itertools
import math
import sys
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float64, Int64

from .outcome import MAJORITY, RPC, Outcome

NO_VOTE = -sys.float_info.max  # below every value of an answer, above no choice at all


def vote_weights(
    outcome: Outcome, reward: str, k: int, seed: int, n_subsets: int
) -> Float64[np.ndarray, "P G"]:
    """Share of the subsets of k that choose each completion, by the vote `reward`.

    All subsets where there are at most max(n_subsets, G), else `n_subsets` seeded ones per prompt.
    """
    G = outcome.n_samples
    eligible_PG = outcome.eligible(reward)
    weight_PG = np.zeros((outcome.n_prompts, G))
    is_exact = math.comb(G, k) <= max(n_subsets, G)
    member_BG = _all_subsets(G, k) if is_exact else None
    for p, label_G in enumerate(_labels(outcome, reward)):
        if member_BG is None:
            # a generator per prompt: its subsets do not depend on which prompts stand before it
            drawn_BG = np.random.default_rng([seed, p]).random((n_subsets, G)).argsort(axis=1) < k
        else:
            drawn_BG = member_BG
        able_BG = drawn_BG & eligible_PG[p]
        if reward == RPC:
            assert outcome.response_PG is not None
            logprob_G = outcome.reward_PG["logprob"][p]
            value_BG = _log_masses(label_G, outcome.response_PG[p], logprob_G, able_BG)
        else:
            value_BG = _counts(label_G, able_BG)
        value_BG = np.where(able_BG, np.maximum(value_BG, NO_VOTE), -np.inf)
        winner_B = value_BG.argmax(axis=1)[able_BG.any(axis=1)]
        weight_PG[p] = np.bincount(winner_B, minlength=G) / len(drawn_BG)
    return weight_PG


def all_votes(outcome: Outcome) -> Float64[np.ndarray, "P G"]:
    """Votes for each completion's answer among all eligible ones; 0 for one without an answer."""
    member_1G = np.ones((1, outcome.n_samples), dtype=bool)
    labels = _labels(outcome, MAJORITY)
    return np.concatenate([_counts(label_G, member_1G) for label_G in labels])


def _labels(outcome: Outcome, reward: str) -> Iterator[Int64[np.ndarray, " G"]]:
    """Answers of each prompt as small integers; -1 for a completion that has no vote."""
    eligible_PG = outcome.eligible(reward)
    for p, row in enumerate(outcome.answers or []):
        label_G = np.full(len(row), -1, dtype=np.int64)
        seen: dict[str | None, int] = {}
        for g in np.flatnonzero(eligible_PG[p]).tolist():
            if row[g] is not None:
                label_G[g] = seen.setdefault(row[g], len(seen))
        yield label_G


def _counts(
    label_G: Int64[np.ndarray, " G"], member_BG: Bool[np.ndarray, "B G"]
) -> Float64[np.ndarray, "B G"]:
    """Votes that each completion's answer gets in each subset; 0 for one without an answer."""
    # column 0 is for no answer and stays empty
    label_A = np.arange(-1, label_G.max() + 1)
    is_vote_GA = (label_G[:, None] == label_A) & (label_A >= 0)
    return (member_BG.astype(np.float64) @ is_vote_GA)[:, label_G + 1]


def _log_masses(
    label_G: Int64[np.ndarray, " G"],
    response_G: Int64[np.ndarray, " G"],
    logprob_G: Float64[np.ndarray, " G"],
    able_BG: Bool[np.ndarray, "B G"],
) -> Float64[np.ndarray, "B G"]:
    """Log-mass of each completion's answer in each subset, nats; -inf for one without an answer."""
    mass_BA = np.full((len(able_BG), label_G.max() + 2), -np.inf)
    # of an answer that no eligible completion gives there is no column; column 0 stays empty
    for label, response in sorted(set(zip(label_G.tolist(), response_G.tolist(), strict=True))):
        if label < 0:
            continue
        same_G = (label_G == label) & (response_G == response)
        logprob = logprob_G[same_G][0]
        is_there_B = able_BG[:, same_G].any(axis=1)
        mass_BA[is_there_B, label + 1] = np.logaddexp(mass_BA[is_there_B, label + 1], logprob)
    return mass_BA[:, label_G + 1]


def _all_subsets(G: int, k: int) -> np.ndarray:
    index_BK = np.array(list(itertools.combinations(range(G), k)))
    member_BG = np.zeros((len(index_BK), G), dtype=bool)
    np.put_along_axis(member_BG, index_BK, True, axis=1)
    return member_BG
