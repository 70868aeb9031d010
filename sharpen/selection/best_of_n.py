"""Scores to choices: which completion of each prompt to keep."""

from itertools import pairwise

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from sharpen.errors import InputError
from sharpen.scoring import Scores


def best_of_n(
    scores: Scores, reward: str | Float32[Tensor, " N"] = "logprob"
) -> Int64[Tensor, " P"]:
    """Index of the completion of highest reward among those of each prompt.

        chosen[p] = argmax_g reward[groups[p] + g] over eligible g

    Never eligible: a completion that is not `valid`, that is empty, or whose reward is NaN. Of
    equal rewards the first wins.

    Args:
        scores: Scored completions of P prompts.
        reward: The name of a reward without options, or one reward per completion.

    Returns:
        An index into the completions of each prompt, -1 where none is eligible.

    Raises:
        InputError: If the reward is unknown, cannot be computed, or has not N entries.

    Source:
        Huang et al. 2024, arXiv:2412.01951, appendix C.

    Example:
        >>> scores = Scores.from_logprobs([[[-1.0, -2.0], [-0.5]], []])
        >>> best_of_n(scores)
        tensor([ 1, -1])
    """
    N = len(scores.valid)
    reward_N = scores.reward(reward) if isinstance(reward, str) else reward
    if reward_N.shape != (N,):
        raise InputError(
            f"`reward` must hold one number for each of N={N} completions, "
            f"got shape {tuple(reward_N.shape)}."
        )
    reward_N = reward_N.cpu()
    eligible_N = scores.eligible & ~reward_N.isnan()
    values, eligible = reward_N.tolist(), eligible_N.tolist()
    bounds = scores.groups.tolist()
    chosen = []
    for first, last in pairwise(bounds):
        candidates = [n for n in range(first, last) if eligible[n]]
        # max() keeps the first of equals
        best = max(candidates, key=values.__getitem__, default=first - 1)
        chosen.append(best - first)
    return torch.tensor(chosen, dtype=torch.int64)
