"""Votes for answers: one per completion, or as many as its weight.

N completions of all prompts together, P prompts.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from sharpen.errors import InputError
from sharpen.scoring import Scores
from sharpen.scoring.votes import check_one_each

from .candidates import candidates


def majority_vote(
    scores: Scores,
    answers: Sequence[str | None],
    *,
    reward: str | Float[Tensor, " N"] = "logprob",
) -> Int64[Tensor, " P"]:
    """Index of the completion that stands for the answer most completions give.

        V(a) = #{n eligible: answers[n] = a}
        chosen[p] = argmax of reward over the eligible completions of the answer of largest V

    Who votes, ties, and prompts without an answer: as in `weighted_vote`.

    Args:
        scores: Scored completions of P prompts.
        answers: What each of the N completions answers, None where nothing could be read.
        reward: Says which completion stands for the answer.

    Returns:
        An index into the completions of each prompt, -1 where none is eligible.

    Raises:
        InputError: If the reward cannot be computed, or there is not one answer per completion.

    Source:
        Wang et al. 2022 (self-consistency), arXiv:2203.11171.

    Example:
        >>> scores = Scores.from_logprobs([[[-1.0], [-5.0], [-4.0]]])
        >>> majority_vote(scores, ["7", "24", "24"])
        tensor([2])
    """
    ones_N = torch.ones(len(scores.valid), dtype=torch.float64)
    return weighted_vote(scores, answers, ones_N, reward=reward)


def weighted_vote(
    scores: Scores,
    answers: Sequence[str | None],
    weight: Float64[Tensor, " N"],
    *,
    reward: str | Float[Tensor, " N"] = "logprob",
) -> Int64[Tensor, " P"]:
    """Index of the completion that stands for the answer of largest summed weight.

        V(a) = sum of weight[n] over the eligible n with answers[n] = a
        chosen[p] = argmax of reward over the eligible completions of the answer of largest V

    A completion votes if it is eligible as in `best_of_n`, has an answer, and its weight is not
    NaN. Of answers with equal V the one given first wins, of completions of equal reward the first.
    Where no completion votes, the one of highest reward is chosen. Weights are summed without
    rounding in between, so the order of the completions decides nothing but ties.

    Args:
        scores: Scored completions of P prompts.
        answers: What each of the N completions answers, None where nothing could be read.
        weight: Of each completion, at least 0; of any scale.
        reward: Says which completion stands for the answer.

    Returns:
        An index into the completions of each prompt, -1 where none is eligible.

    Raises:
        InputError: If the reward cannot be computed, there is not one answer and one weight per
            completion, or a weight is negative or infinite.

    Example:
        >>> scores = Scores.from_logprobs([[[-1.0], [-5.0], [-4.0]]])
        >>> weight = torch.tensor([3.0, 1.0, 1.0], dtype=torch.float64)
        >>> weighted_vote(scores, ["7", "24", "24"], weight)
        tensor([0])
    """
    N = len(scores.valid)
    check_one_each("answers", answers, N)
    if weight.shape != (N,) or bool((weight.isinf() | (weight < 0)).any()):
        raise InputError(
            f"`weight` must hold a finite number of at least 0 for each of N={N} completions, "
            f"got {weight.tolist()[:8]}."
        )
    weights = weight.tolist()
    chosen = []
    for group in candidates(scores, reward):
        votes: dict[str, list[float]] = defaultdict(list)
        for n in group.members:
            answer = answers[n]
            if answer is not None and not math.isnan(weights[n]):
                votes[answer].append(weights[n])
        # max() keeps the first of equals
        winner = max(votes, key=lambda a: math.fsum(votes[a]), default=None)
        given = {n for n in group.members if answers[n] == winner}
        chosen.append(group.best(given if votes else None))
    return torch.tensor(chosen, dtype=torch.int64)
