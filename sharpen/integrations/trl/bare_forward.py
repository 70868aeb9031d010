"""A model's own forward, under what a trainer wrapped around it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def bare_forward(model: nn.Module) -> Iterator[None]:
    """While open the forward is the class's own, outside what a trainer wrapped around it.

    accelerate's wrapper turns autocast on: probed through it, a head would seem to be another.
    """
    is_placed = hasattr(model, "_hf_hook")  # by device_map, whose wrapper moves tensors
    wrapped = None if is_placed else vars(model).pop("forward", None)
    try:
        yield
    finally:
        if wrapped is not None:
            model.forward = wrapped
