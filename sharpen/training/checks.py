"""What a loss refuses: numbers out of their range, and tensors that do not belong together.

Numbers are checked. Of tensors the shapes are, and the values where the tensor is on the CPU: on a
GPU each look at them would wait for the device, so there a bad value goes through.
"""

import math
from numbers import Integral
from typing import Any, get_args

import torch
from torch import Tensor

from sharpen.errors import InputError


def check_beta(beta: float) -> None:
    """Refuse a beta without an optimum.

    Raises:
        InputError: If it is not above 0 and finite.
    """
    if not 0 < beta < math.inf:
        raise InputError(f"`beta` must be above 0 and finite, got {beta}; try 1.")


def check_optimism(name: str, value: float) -> None:
    """Refuse pessimism.

    Raises:
        InputError: If it is not at least 0 and finite.
    """
    if not 0 <= value < math.inf:
        raise InputError(f"`{name}` must be at least 0 and finite, got {value}.")


def check_rounds(rounds: int) -> None:
    """Refuse a count that is none.

    Raises:
        InputError: If it is not a whole number of at least 1.
    """
    if not isinstance(rounds, Integral) or rounds < 1:
        raise InputError(f"`rounds` must be a whole number of at least 1, got {rounds}.")


def check_choice(name: str, value: object, choices: Any) -> None:
    """Refuse what is not one of a `Literal`.

    Raises:
        InputError: If it is none of them.
    """
    if value not in get_args(choices):
        raise InputError(f"`{name}` must be one of {', '.join(get_args(choices))}, got {value!r}.")


def check_lengths(**tensors: Tensor) -> None:
    """Refuse tensors that are not one number a completion, of the same completions.

    Raises:
        InputError: If one is not a vector, or not as long as the first.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    first = next(iter(shapes.values()))
    if len(first) != 1 or any(shape != first for shape in shapes.values()):
        got = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise InputError(
            f"{', '.join(f'`{x}`' for x in shapes)} must hold one number a completion, got {got}."
        )


def check_pairs(pairs: Tensor, n: int) -> None:
    """Refuse pairs of nothing: their mean would be NaN.

    Args:
        pairs: Indices.
        n: Completions.

    Raises:
        InputError: If it is not [Q, 2] with Q at least 1, or an index on the CPU is not in [0, n).
    """
    if pairs.ndim != 2 or pairs.shape[1] != 2 or len(pairs) == 0:
        raise InputError(
            f"`pairs` must be of shape [Q, 2] with Q at least 1, got {list(pairs.shape)}; "
            "leave out a batch that has none."
        )
    if pairs.device.type == "cpu":
        low, high = pairs.min().item(), pairs.max().item()
        if low < 0 or high >= n:
            raise InputError(
                f"`pairs` must hold indices in [0, {n}), got {low if low < 0 else high}."
            )


def check_weights(weight: Tensor, offsets: Tensor) -> None:
    """Refuse weights that have no mean.

    Raises:
        InputError: If there is not one for each completion, or, on the CPU, one is negative, NaN
            or infinite, or none is above 0.
    """
    if weight.ndim != 1 or len(weight) != len(offsets) - 1:
        raise InputError(
            f"`weight` must hold one number for each of N={len(offsets) - 1} completions, got "
            f"shape {list(weight.shape)}."
        )
    if weight.device.type == "cpu":
        good = weight.isfinite() & (weight >= 0)
        if not bool(good.all()):
            got = weight[~good][0].item()
            raise InputError(f"`weight` must be finite and at least 0, got {got}; leave that out.")
        if not bool(torch.any(weight > 0)):
            raise InputError("`weight` must be above 0 somewhere, got 0 everywhere.")
