"""Training without dropout: a log-ratio to the base model must not be noise."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# of rates that a module, or a configuration it reads in its forward, holds as a plain number
NOISY = ("drop", "jitter")


@contextmanager
def without_noise(model: nn.Module) -> Iterator[None]:
    """While open, every rate of dropout and of router jitter in `model` is 0.

    Rates are found by name, in `nn.Dropout` layers, in modules that hold a number, and in
    configurations. They come back in the end, so a saved configuration keeps its own.
    """
    before: list[tuple[Any, str, float]] = []
    for holder in _holders(model):
        is_layer = isinstance(holder, nn.modules.dropout._DropoutNd)
        for name, value in vars(holder).items():
            is_rate = any(word in name for word in NOISY) or (is_layer and name == "p")
            if is_rate and isinstance(value, float) and value != 0:
                before.append((holder, name, value))
    for holder, name, _ in before:
        setattr(holder, name, 0.0)
    try:
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)


# Any: configurations of any class
def _holders(model: nn.Module) -> list[Any]:
    """Modules and their configurations, each once."""
    modules = list(model.modules())
    configs = [vars(module).get("config") for module in modules]
    # a model of several modalities holds one configuration in another
    inner = [value for config in configs if config is not None for value in vars(config).values()]
    every = [*modules, *configs, *(value for value in inner if hasattr(value, "to_diff_dict"))]
    return list({id(holder): holder for holder in every if hasattr(holder, "__dict__")}.values())
