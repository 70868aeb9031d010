"""Completions end to end to groups of one prompt, and group statistics of their rewards.

N completions, P groups.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

# added to a group's deviation, as TRL does for its advantages
EPSILON = 1e-4


# prompts are texts, messages or ids
def group_sizes(prompts: Sequence[Any]) -> list[int]:
    """How many equal prompts follow one another, each time.

    Example:
        >>> group_sizes(["a", "a", "b", "a"])
        [2, 1, 1]
    """
    return [len(list(run)) for _, run in groupby(prompts)]


def cut(values: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    """`values` in groups of these sizes.

    Example:
        >>> cut([1, 2, 3], [2, 1])
        [[1, 2], [3]]
    """
    rest = iter(values)
    return [[next(rest) for _ in range(size)] for size in sizes]


def normalised(
    reward: Float32[Tensor, " N"], groups: Int64[Tensor, " bounds"]
) -> Float32[Tensor, " N"]:
    """Rewards less their group's mean, over its deviation (of a sample: over n - 1).

    Those that are not finite stay as they are and count in no group. A group of one is 0.

    Args:
        reward: Of all groups end to end.
        groups: Where each group starts, then N.

    Example:
        >>> normalised(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 2, 3]))
        tensor([-0.7071,  0.7071,  0.0000])
    """
    return torch.cat([_standard(part) for part in reward.split(groups.diff().tolist())])


def group_deviation(reward: Float32[Tensor, " N"], groups: Int64[Tensor, " bounds"]) -> float:
    """The mean over groups of their deviation; what a group-relative loss can learn from."""
    parts = [part[part.isfinite()] for part in reward.split(groups.diff().tolist())]
    stds = [part.std().item() for part in parts if len(part) > 1]
    return sum(stds) / len(stds) if stds else 0.0


def _standard(reward: Tensor) -> Tensor:
    finite = reward[reward.isfinite()]
    if len(finite) == 0:
        return reward
    std = finite.std() if len(finite) > 1 else torch.tensor(0.0)
    return (reward - finite.mean()) / (std + EPSILON)
