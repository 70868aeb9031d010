"""What both ops hand to the C++ in `cpu/`: its structures, field by field."""

import ctypes

import torch
from torch import Tensor

from ._rows import Partial

BEST = ("best", "best_column")  # fields of k values a row
COLUMNS = ("column", "best_column")  # int32 in C++
# `RowGrads` of `cpu/logit_gradient.h`
OF_ROW = ("top", "log_mass", "prob", "entropy", "of_entropy", "uniform", "active")


class Partials(ctypes.Structure):
    """`Partials` of `cpu/row_statistics.h`."""

    _fields_ = [(name, ctypes.c_void_p) for name in Partial._fields]


class Inputs(ctypes.Structure):
    """`Inputs` of `cpu/tile.h`, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("hidden", "weight", "bias", "mask")),
        *((name, ctypes.c_void_p) for name in ("target", "first")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "depth")),
        *((name, ctypes.c_int64) for name in ("hidden_stride", "weight_stride")),
        *((name, ctypes.c_float) for name in ("temperature", "softcap")),
    ]


def pointer(x: Tensor | None) -> int | None:
    """Address of the first element; null for None."""
    return None if x is None else x.data_ptr()


def empty_field(name: str, n: int) -> Tensor:
    """Memory for `n` values of a field of a partial."""
    return torch.empty(n, dtype=torch.int32 if name in COLUMNS else torch.float32)


def in_torch(merged: dict[str, Tensor], k: int) -> Partial:
    """The partial of every row from the fields that C++ has written."""
    found = {name: x.long() if name in COLUMNS else x for name, x in merged.items()}
    return Partial(**{name: x.view(-1, k) if name in BEST else x for name, x in found.items()})
