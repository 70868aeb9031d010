"""`linear_logprob` forward on a CPU with AVX-512: one call of the C++ in `cpu/`.

The contract, the statistics and their merge law are those of `_linear_logprob_torch.py`; logits
live only as tiles in the cores' caches, and a bf16 weight is multiplied as it is.

R hidden rows, S (row, target) pairs, V vocabulary, D hidden.
"""

import ctypes
from typing import cast

import torch
from torch import Tensor

from . import _cpu_library
from ._linear_logprob_torch import Head
from ._rows import Pairs, Partial, Rows, finish

# bytes of a packed segment of the weight: it shares the core's second cache with a tile and a block
SEGMENT_BYTES = 2**19
PARTIALS_BYTES = 16 * 2**20  # rows are taken in passes, so that their partials fit
SCRATCH_BYTES = 44 * 2**20  # of all threads: where a core needs megabytes, some cores stay idle
BLOCK_ROWS = 64
MIN_COLUMNS, MAX_COLUMNS = 64, 512


class _Partials(ctypes.Structure):
    """`Partials` of `cpu/row_statistics.h`."""

    _fields_ = [(name, ctypes.c_void_p) for name in Partial._fields]


class _Problem(ctypes.Structure):
    """`Problem` of `cpu/linear_logprob.cpp`, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("hidden", "weight", "bias", "target", "first")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "depth")),
        *((name, ctypes.c_int64) for name in ("hidden_stride", "weight_stride")),
        *((name, ctypes.c_float) for name in ("temperature", "softcap")),
        *((name, ctypes.c_int64) for name in ("segment_columns", "block_rows", "pass_rows")),
        ("threads", ctypes.c_int64),
        ("merged", _Partials),
        ("chosen", ctypes.c_void_p),
        ("partials", _Partials),
        ("scratch", ctypes.c_void_p),
        ("scratch_bytes", ctypes.c_int64),
    ]


def takes(hidden: Tensor, head: Head) -> bool:
    """Whether the C++ kernel scores these tensors: their kind here, and a library that loads."""
    return (
        hidden.device.type == "cpu"
        and hidden.dtype == head.weight.dtype
        and hidden.dtype in (torch.float32, torch.bfloat16)
        and hidden.shape[1] > 0
        and all(x.shape[1] == 1 or x.stride(1) == 1 for x in (hidden, head.weight))
        and _cpu_library.load() is not None
    )


def segment_columns(D: int, itemsize: int, panel: int) -> int:
    """Columns of a segment: set by D and the dtype, never by the number of rows or threads."""
    fitting = SEGMENT_BYTES // (D * itemsize) // panel * panel
    return max(MIN_COLUMNS, min(MAX_COLUMNS, fitting))


def forward(hidden: Tensor, head: Head, pairs: Pairs, stats: list[str]) -> tuple[Rows, Tensor]:
    """Statistics of every row, and the logit of every pair's target (NaN outside the vocabulary).

    Wants R > 0 and what `takes` says. Workspace: partials of a pass over rows, and for each thread
    a packed segment, a tile of logits and a block of rows.
    """
    library = _cpu_library.load()
    assert library is not None
    R, D = hidden.shape
    itemsize = hidden.element_size()
    columns = segment_columns(D, itemsize, library.panel)
    n_segments = -(-head.vocab_size // columns)
    fields = _asked(stats)
    blocks = PARTIALS_BYTES // (4 * n_segments * len(fields) * BLOCK_ROWS)
    pass_rows = min(max(1, blocks), -(-R // BLOCK_ROWS)) * BLOCK_ROWS
    deep = (D + 1) // 2 * 2
    parts = (columns * deep * itemsize, BLOCK_ROWS * columns * 4, BLOCK_ROWS * deep * itemsize)
    scratch_bytes = sum(-(-n // 64) * 64 for n in parts)
    threads = min(torch.get_num_threads(), n_segments, max(1, SCRATCH_BYTES // scratch_bytes))

    bias = None if head.bias is None else head.bias[: head.vocab_size].float().contiguous()
    target, first = pairs.target.contiguous(), pairs.first.contiguous()
    chosen = hidden.new_full(pairs.target.shape, float("nan"), dtype=torch.float32)
    merged = {name: _empty(name, R) for name in fields}
    partials = {name: _empty(name, n_segments * pass_rows) for name in fields}
    scratch = torch.empty(threads * scratch_bytes, dtype=torch.uint8)
    problem = _Problem(
        hidden=hidden.data_ptr(),
        weight=head.weight.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        target=target.data_ptr(),
        first=first.data_ptr(),
        rows=R,
        columns=head.vocab_size,
        depth=D,
        hidden_stride=hidden.stride(0),
        weight_stride=head.weight.stride(0),
        temperature=head.temperature,
        softcap=head.softcap or 0.0,
        segment_columns=columns,
        block_rows=BLOCK_ROWS,
        pass_rows=pass_rows,
        threads=threads,
        merged=_Partials(**{name: x.data_ptr() for name, x in merged.items()}),
        chosen=chosen.data_ptr(),
        partials=_Partials(**{name: x.data_ptr() for name, x in partials.items()}),
        scratch=scratch.data_ptr(),
        scratch_bytes=scratch_bytes,
    )
    library.forward(problem, hidden.dtype)
    found: dict[str, Tensor | None] = dict.fromkeys(Partial._fields)
    found |= merged
    if (greedy := found["greedy"]) is not None:
        found["greedy"] = greedy.to(torch.int64)
    return finish(Partial(**cast(dict[str, Tensor], found))), chosen


def _asked(stats: list[str]) -> list[str]:
    fields = ["top", "mass"]
    if "entropy" in stats:
        fields.append("spread")
    if "self_certainty" in stats:
        fields += ["mean", "n_valid"]
    if "is_greedy" in stats:
        fields.append("greedy")
    return fields


def _empty(name: str, n: int) -> Tensor:
    return torch.empty(n, dtype=torch.int32 if name == "greedy" else torch.float32)
