"""Borda's vote: completions vote for their answer with more weight the higher they rank.

N completions of all prompts together, P prompts.
"""

import math
from collections.abc import Sequence
from itertools import groupby

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sharpen.errors import InputError
from sharpen.scoring import Scores
from sharpen.scoring.votes import check_one_each

from .candidates import candidates
from .vote import weighted_vote


def borda_vote(
    scores: Scores,
    answers: Sequence[str | None],
    *,
    reward: str | Float[Tensor, " N"] = "self_certainty",
    p: float = 1.2,
) -> Int64[Tensor, " P"]:
    """Index of the completion that stands for the answer of most votes, weighted by rank.

        V(a) = sum over eligible n with answers[n] = a of (G - rank[n] + 1)^p

    rank 1 is the highest reward of the prompt's G eligible completions; those without an answer
    rank last and do not vote. Completions of equal reward share their votes evenly. p = 0 is the
    majority vote; as p grows the vote becomes best-of-N. Only the order of the rewards counts, not
    their scale. Ties, and prompts without an answer: as in `weighted_vote`.

    Args:
        scores: Scored completions of P prompts.
        answers: What each of the N completions answers, None where nothing could be read.
        reward: Ranks the completions, and says which one stands for the answer.
        p: At least 0 and finite. The source takes 0.3 for up to 16 completions, 1.2 from 32 on.

    Returns:
        An index into the completions of each prompt, -1 where none is eligible.

    Raises:
        InputError: If `p` is out of range, the reward cannot be computed, or there is not one
            answer per completion.

    Source:
        Kang, Zhao and Song 2025, arXiv:2502.18581.

    Example:
        >>> scores = Scores.from_logprobs([[[-1.0], [-2.0], [-3.0], [-4.0]]])
        >>> answers = ["7", "7", "24", "24"]
        >>> borda_vote(scores, answers, reward="logprob", p=1.0)  # 4 + 3 against 2 + 1
        tensor([0])
    """
    if not (0 <= p < math.inf):
        raise InputError(f"`p` must be at least 0 and finite, got {p}.")
    check_one_each("answers", answers, len(scores.valid))
    weight_N = torch.zeros(len(scores.valid), dtype=torch.float64)
    for group in candidates(scores, reward):
        reward_of = dict(zip(group.members, group.rewards, strict=True))
        voters = [n for n in group.members if answers[n] is not None]
        ranked = sorted(voters, key=reward_of.__getitem__, reverse=True)
        left = G = len(group.members)
        for _, tied in groupby(ranked, key=reward_of.__getitem__):
            members = list(tied)
            # of the largest: powers of whole numbers would overflow
            votes = [((left - i) / G) ** p for i in range(len(members))]
            weight_N[members] = math.fsum(votes) / len(votes)
            left -= len(members)
    return weighted_vote(scores, answers, weight_N, reward=reward)
