"""What every op needs before it computes: input checks, the choice of device, exact products."""

import contextlib
import functools
import importlib.util
import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# read once: Triton itself reads it when the kernels are decorated
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

logger = logging.getLogger(__name__)


def check_shape(name: str, x: Tensor, **dims: int) -> None:
    """Raise `ValueError` unless `x.shape` equals the sizes in `dims`, in order."""
    want = tuple(dims.values())
    if tuple(x.shape) != want:
        names = ", ".join(dims)
        raise ValueError(f"`{name}` must have shape ({names})={want}, got {tuple(x.shape)}.")


def check_dtype(name: str, x: Tensor, *allowed: torch.dtype) -> None:
    """Raise `TypeError` unless `x.dtype` is one of `allowed`."""
    if x.dtype not in allowed:
        names = ", ".join(str(d) for d in allowed)
        fix = str(allowed[-1]).removeprefix("torch.")
        raise TypeError(
            f"`{name}` must be one of {names}, got {x.dtype}; convert it with `.to(torch.{fix})`."
        )


def check_device(name: str, x: Tensor, device: torch.device, like: str = "hidden") -> None:
    """Raise `ValueError` unless `x` lives on `device`, as the argument `like` does."""
    if x.device != device:
        raise ValueError(
            f"`{name}` must be on {device} as `{like}` is, got {x.device}; "
            f'move it with `.to("{device}")`.'
        )


def check_options(
    stats: Sequence[str], known: Sequence[str], temperature: float, softcap: float | None
) -> tuple[str, ...]:
    """Raise `ValueError` unless the options have a meaning; the names in `stats`, each once."""
    if isinstance(stats, str) or not stats or not set(stats) <= set(known):
        raise ValueError(f"`stats` must be a tuple of names out of {known}, got {stats!r}.")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(
            f"`temperature` must be finite and above 0, got {temperature}; "
            "for the greedy choice ask for `is_greedy`."
        )
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"`softcap` must be finite and above 0, got {softcap}; None is no cap.")
    return tuple(dict.fromkeys(stats))


def runs_triton(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a Triton kernel that accumulates in `dtype` can run where `x` lives."""
    if dtype == torch.float64 or not (x.is_cuda or INTERPRETED):
        return False
    return _has_triton()


@functools.cache
def _has_triton() -> bool:
    if importlib.util.find_spec("triton") is not None:
        return True
    logger.warning("Triton is not installed: GPU tensors are scored by PyTorch, more slowly.")
    return False


@contextlib.contextmanager
def exact_matmul(device: torch.device):
    """Products of fp32 matrices in IEEE fp32, whatever autocast, TF32 and bf16 settings say."""
    mkldnn: Any = torch.backends.mkldnn  # a module to type checkers, an object with more inside
    backends = (torch.backends.cuda.matmul, mkldnn.matmul)
    lowered = [(b, b.fp32_precision) for b in backends if b.fp32_precision in ("tf32", "bf16")]
    for backend, _ in lowered:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in lowered:
            backend.fp32_precision = precision
