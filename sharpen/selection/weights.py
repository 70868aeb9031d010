"""Weights of each prompt's completions: a draw by them, and what they are worth.

N completions of all prompts together, P prompts.
"""

from itertools import accumulate, pairwise

import torch
from jaxtyping import Float64, Int64
from torch import Tensor


def draw_by_weight(
    weight: Float64[Tensor, " N"], groups: Int64[Tensor, " bounds"], generator: torch.Generator
) -> Int64[Tensor, " bounds-1"]:
    """Index of one completion of each prompt, drawn in proportion to the weights; -1 if all are 0.

    One uniform number per prompt is drawn, in input order, also where all weights are 0. A
    completion of weight 0 is never drawn.

    Args:
        weight: Of each completion, at least 0 and finite.
        groups: Where the completions of each prompt start, then N.
        generator: On the CPU.

    Example:
        >>> weight = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
        >>> draw_by_weight(weight, torch.tensor([0, 2, 3]), torch.Generator().manual_seed(0))
        tensor([ 1, -1])
    """
    weights, chosen = weight.tolist(), []
    uniform = torch.rand(len(groups) - 1, generator=generator, dtype=torch.float64).tolist()
    for u, (first, last) in zip(uniform, pairwise(groups.tolist()), strict=True):
        total = list(accumulate(weights[first:last]))
        able = [g for g, w in enumerate(weights[first:last]) if w > 0]
        # the last one, where rounding makes u * total the total itself
        hit = (g for g in able if total[g] > u * total[-1])
        chosen.append(next(hit, able[-1]) if able else -1)
    return torch.tensor(chosen, dtype=torch.int64)


def effective_samples(
    weight: Float64[Tensor, " N"], groups: Int64[Tensor, " bounds"]
) -> Float64[Tensor, " bounds-1"]:
    """How many equally weighted completions each prompt's weights are worth.

        ess[p] = (sum w)^2 / sum w^2,      1 where one has all the weight, 0 where none has any

    Source:
        Kong, Liu and Wong 1994, sequential imputations.

    Example:
        >>> weight = torch.tensor([0.5, 0.5, 0.0, 1.0], dtype=torch.float64)
        >>> effective_samples(weight, torch.tensor([0, 3, 4, 4]))
        tensor([2., 1., 0.], dtype=torch.float64)
    """
    # of the largest of each prompt: squares of small weights underflow
    top_P = torch.segment_reduce(weight, "max", offsets=groups, initial=0.0)
    scaled_N = weight / top_P.clamp(min=torch.finfo(torch.float64).tiny).repeat_interleave(
        groups.diff()
    )
    once, squared = (
        torch.segment_reduce(x, "sum", offsets=groups) for x in (scaled_N, scaled_N.square())
    )
    return torch.where(squared > 0, once.square() / squared, 0.0)
