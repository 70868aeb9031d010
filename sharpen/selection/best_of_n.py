"""The completion of highest reward of each prompt."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sharpen.scoring import Scores

from .candidates import candidates


def best_of_n(scores: Scores, reward: str | Float[Tensor, " N"] = "logprob") -> Int64[Tensor, " P"]:
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
    chosen = [group.best() for group in candidates(scores, reward)]
    return torch.tensor(chosen, dtype=torch.int64)
