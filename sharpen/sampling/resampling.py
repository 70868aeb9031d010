"""Weighted particles: how many they are worth, and a redraw that wastes none.

G groups, N particles of each, n draws.
"""

import math

import torch
from jaxtyping import Float64, Int64
from torch import Tensor


def effective_size(log_weight: Float64[Tensor, "G N"]) -> Float64[Tensor, " G"]:
    """(sum w)^2 / sum w^2: N for equal weights, 1 where one weighs all, 0 where none weighs.

    Source: Kong, Liu & Wong 1994.

    Example:
        >>> effective_size(torch.tensor([[0.0, 0.0, -math.inf, 0.0]]).double())
        tensor([3.], dtype=torch.float64)
    """
    return (1 / log_weight.softmax(dim=1).square().sum(dim=1)).nan_to_num(nan=0.0)


def log_mean(log_weight: Float64[Tensor, "G N"]) -> Float64[Tensor, " G"]:
    """The log of the mean weight; -inf where none weighs."""
    return log_weight.logsumexp(dim=1) - math.log(log_weight.shape[1])


def systematic(
    log_weight: Float64[Tensor, "G N"], uniform: Float64[Tensor, " G"], n: int
) -> Int64[Tensor, "G n"]:
    """Draw n particles of each group: one of weight share W comes floor(n W) or ceil(n W) times.

    In their order. The mean over the uniform number is n W. Where no particle weighs anything, all
    weigh the same.

    Args:
        log_weight: -inf for a particle that must not be drawn.
        uniform: In (0, 1), one a group.
        n: Draws of each group.

    Source: Carpenter, Clifford & Fearnhead 1999.

    Example:
        >>> weight = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).double()
        >>> systematic(weight.log(), torch.tensor([0.5]).double(), 4)
        tensor([[0, 0, 2, 3]])
    """
    share_GN = log_weight.softmax(dim=1).nan_to_num(nan=1 / log_weight.shape[1])
    below_GN = share_GN.cumsum(dim=1)
    # the last sum is 1 to the bit, so that a point below 1 has a particle of some weight
    below_GN = below_GN / below_GN[:, -1:]
    place_n = torch.arange(n, device=log_weight.device)
    # a sum of a half and a uniform number could round to n
    point_Gn = ((place_n + uniform[:, None]) / n).clamp_(max=1 - 2.0**-53)
    return torch.searchsorted(below_GN, point_Gn, right=True)
