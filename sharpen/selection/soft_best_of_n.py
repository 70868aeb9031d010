"""Soft best-of-N: a draw from the softmax of the rewards.

N completions of all prompts together, P prompts.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from sharpen.errors import InputError
from sharpen.scoring import Scores

from .candidates import candidates
from .weights import draw_by_weight, effective_samples


class SoftChoice(NamedTuple):
    """A completion drawn for each prompt, and what it was drawn from.

    Attributes:
        chosen: An index into the completions of each prompt, -1 where none is eligible.
        weight: Probability of each completion to be chosen, given the completions; 0 for those
            that are not eligible.
        effective_samples: How many equally weighted completions the weights of each prompt are
            worth, `weights.effective_samples`. Near 1 the draw is best-of-N, whatever was aimed at.
    """

    chosen: Int64[Tensor, " P"]
    weight: Float64[Tensor, " N"]
    effective_samples: Float64[Tensor, " P"]


def soft_best_of_n(
    scores: Scores,
    reward: str | Float[Tensor, " N"] = "logprob",
    *,
    temperature: float,
    generator: torch.Generator,
) -> SoftChoice:
    """A completion of each prompt, drawn with probability softmax(reward / temperature).

        weight[n] = exp(reward[n] / temperature) / sum over the eligible m of the same prompt

    temperature -> 0 is best-of-N, temperature -> infinity a random eligible completion. With
    completions drawn from the model itself (temperature 1, no top-p) this is self-normalised
    importance sampling: as N grows its choice follows

        pi(y | x) proportional to pi_base(y | x) exp(reward(y) / temperature),

    the optimum of E[reward] - temperature KL(pi || pi_base). For the reward "logprob" that is the
    power distribution pi_base^(1 + 1 / temperature). Completions drawn twice count twice, as they
    must. Ineligible completions have no mass: what is sampled is pi given that y is eligible.

    Args:
        scores: Scored completions of P prompts.
        reward: The name of a reward without options, or one reward per completion.
        temperature: Of the softmax, in the reward's unit; finite and above 0.
        generator: On the CPU; one number per prompt is drawn from it.

    Raises:
        InputError: If the temperature is out of range, the reward is unknown, cannot be computed,
            or has not N entries.

    Source:
        Verdun et al. 2025, arXiv:2505.03156.

    Example:
        >>> scores = Scores.from_logprobs([[[-1.0], [-2.0]]])
        >>> soft = soft_best_of_n(scores, temperature=1.0, generator=torch.Generator())
        >>> soft.weight
        tensor([0.7311, 0.2689], dtype=torch.float64)
        >>> soft.effective_samples
        tensor([1.6481], dtype=torch.float64)
    """
    weight_N = soft_weights(scores, reward, temperature)
    return SoftChoice(
        draw_by_weight(weight_N, scores.groups, generator),
        weight_N,
        effective_samples(weight_N, scores.groups),
    )


def soft_weights(
    scores: Scores, reward: str | Float[Tensor, " N"], temperature: float
) -> Float64[Tensor, " N"]:
    """softmax(reward / temperature) over the eligible completions of each prompt, 0 for others.

    Where the highest reward is infinite, all that have it weigh the same: the limit.

    Raises:
        InputError: As `soft_best_of_n`.

    Example:
        >>> soft_weights(Scores.from_logprobs([[[-1.0], [-1.0]], [[-3.0]]]), "logprob", 0.5)
        tensor([0.5000, 0.5000, 1.0000], dtype=torch.float64)
    """
    if not 0 < temperature < math.inf:
        raise InputError(f"`temperature` must be finite and above 0, got {temperature}.")
    weight_N = torch.zeros(len(scores.valid), dtype=torch.float64)
    for group in candidates(scores, reward):
        top = max(group.rewards, default=0.0)
        if math.isinf(top):
            weights = [float(x == top) for x in group.rewards]
        else:
            weights = [math.exp((x - top) / temperature) for x in group.rewards]
        total = math.fsum(weights)
        weight_N[group.members] = torch.tensor([w / total for w in weights], dtype=torch.float64)
    return weight_N
