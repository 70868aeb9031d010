"""What every op asks before it computes: checks of inputs, whether Triton runs, exact products."""

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

from .stats import MAX_K, NAMES, Wanted

FLOATS = (torch.float16, torch.bfloat16, torch.float64, torch.float32)
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


def check_pairs(
    target: Tensor, rows: Tensor | None, R: int, device: torch.device, like: str
) -> None:
    """Raise unless `target` and `rows` [S] can pair targets with the R rows of `like`."""
    if target.ndim != 1:
        raise ValueError(
            f"`target` must be 1-D, got shape {tuple(target.shape)}; call `.flatten()`."
        )
    check_dtype("target", target, torch.int64)
    check_device("target", target, device, like)
    if rows is None:
        check_shape("target", target, R=R)
    else:
        check_dtype("rows", rows, torch.int64)
        check_shape("rows", rows, S=target.shape[0])
        check_device("rows", rows, device, like)


def check_head(
    hidden: Tensor, weight: Tensor, target: Tensor, rows: Tensor | None, bias: Tensor | None
) -> int:
    """Raise unless hidden rows, pairs and a head fit together; the number of rows of the weight."""
    for name, x in (("hidden", hidden), ("weight", weight)):
        if x.ndim != 2:
            fix = "flatten the leading dimensions" if x.ndim > 2 else "unsqueeze it"
            raise ValueError(f"`{name}` must be 2-D, got shape {tuple(x.shape)}; {fix}.")
        check_dtype(name, x, *FLOATS)
    R, D = hidden.shape
    V = weight.shape[0]
    check_shape("weight", weight, V=V, D=D)
    check_device("weight", weight, hidden.device)
    check_pairs(target, rows, R, hidden.device, "hidden")
    if bias is not None:
        check_dtype("bias", bias, *FLOATS)
        check_shape("bias", bias, V=V)
        check_device("bias", bias, hidden.device)
    return V


def check_vocabulary(
    vocab_size: int | None, vocab_mask: Tensor | None, V: int, like: Tensor, columns: str
) -> int:
    """Raise unless both name columns out of V; the number of columns that count."""
    n_columns = V if vocab_size is None else vocab_size
    if not 1 <= n_columns <= V:
        raise ValueError(f"`vocab_size` must be in 1..{V}, the {columns}, got {n_columns}.")
    if vocab_mask is not None:
        check_dtype("vocab_mask", vocab_mask, torch.bool)
        check_shape("vocab_mask", vocab_mask, V=V)
        check_device("vocab_mask", vocab_mask, like.device, columns.split("`")[1])
    return n_columns


def check_options(
    stats: Sequence[str], temperature: float, softcap: float | None, renyi_order: float, k: int
) -> Wanted:
    """Raise `ValueError` unless the options have a meaning; what is wanted, each name once."""
    if isinstance(stats, str) or not stats or not set(stats) <= set(NAMES):
        raise ValueError(f"`stats` must be a tuple of names out of {NAMES}, got {stats!r}.")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(
            f"`temperature` must be finite and above 0, got {temperature}; "
            "for the greedy choice ask for `is_greedy`."
        )
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"`softcap` must be finite and above 0, got {softcap}; None is no cap.")
    if not (math.isfinite(renyi_order) and renyi_order > 0):
        raise ValueError(f"`renyi_order` must be finite and above 0, got {renyi_order}.")
    if isinstance(k, bool) or not 1 <= k <= MAX_K:
        raise ValueError(f"`k` must be in 1..{MAX_K}, got {k}; for more, sort the logits.")
    return Wanted(tuple(dict.fromkeys(stats)), float(renyi_order), k)


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
