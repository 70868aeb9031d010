"""`linear_logprob` on a CPU with AVX-512: calls of the C++ in `cpu/`, forward and backward.

The contract, the statistics and their merge law are those of `_linear_logprob_chunk.py`; logits
live only as tiles in the cores' caches, and a bf16 weight is multiplied as it is.

R hidden rows, S (row, target) pairs, V vocabulary, D hidden.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from . import _cpu_library
from ._linear_logprob_chunk import Head, RowGrads
from ._pairs import Pairs
from ._rows import Partial
from .stats import Wanted

PANEL = BLOCK = 64  # columns and rows of one product, as in `cpu/tile.h`
# bytes of a packed segment of the weight: it shares the core's second cache with a tile and a block
SEGMENT_BYTES = 2**19
MIN_COLUMNS, MAX_COLUMNS = {2: 128, 4: 64}, 512  # the least by size of an element
PARTIALS_BYTES = 16 * 2**20  # rows are taken in passes, so that their partials fit
SCRATCH_BYTES = 44 * 2**20  # of all threads: where a core needs megabytes, some cores stay idle
TASKS, MIN_CHUNK = 4, 256  # tasks a thread where rows can be cut so, and rows of the smallest
# backward: columns of a wave and rows of a pass, and elements of the weight or of hidden in one
MAX_WAVE, MAX_PASS = 512, 1024
SIDE_ELEMENTS = 2**21
TILE_BYTES = BLOCK * 256 * 4  # of fp32, as in `cpu/linear_logprob_bwd.h`
BACKWARD_SCRATCH_BYTES = 24 * 2**20


class _Partials(ctypes.Structure):
    """`Partials` of `cpu/row_statistics.h`."""

    _fields_ = [(name, ctypes.c_void_p) for name in Partial._fields]


class _Inputs(ctypes.Structure):
    """`Inputs` of `cpu/tile.h`, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("hidden", "weight", "bias", "target", "first")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "depth")),
        *((name, ctypes.c_int64) for name in ("hidden_stride", "weight_stride")),
        *((name, ctypes.c_float) for name in ("temperature", "softcap")),
    ]


class _Forward(ctypes.Structure):
    """`Forward` of `cpu/linear_logprob.cpp`."""

    _fields_ = [
        ("inputs", _Inputs),
        *((name, ctypes.c_int64) for name in ("segment_columns", "pass_rows", "chunk_rows")),
        ("threads", ctypes.c_int64),
        ("merged", _Partials),
        ("chosen", ctypes.c_void_p),
        ("partials", _Partials),
        ("scratch", ctypes.c_void_p),
        ("scratch_bytes", ctypes.c_int64),
    ]


OF_ROW = ("top", "log_mass", "prob", "entropy", "of_entropy", "uniform", "active")


class _Backward(ctypes.Structure):
    """`Backward` of `cpu/linear_logprob_bwd.h`, its `RowGrads` written out."""

    _fields_ = [
        ("inputs", _Inputs),
        *((name, ctypes.c_void_p) for name in (*OF_ROW, "of_chosen")),
        *((name, ctypes.c_int64) for name in ("wave_columns", "pass_rows", "threads")),
        *((name, ctypes.c_void_p) for name in ("dhidden", "dweight", "dbias", "memory")),
    ]


def takes(hidden: Tensor, head: Head) -> bool:
    """Whether the C++ kernel scores these tensors: their kind here, and a library that loads."""
    mkldnn: Any = torch.backends.mkldnn  # a module to type checkers, an object with more inside
    return (
        hidden.device.type == "cpu"
        and hidden.dtype == head.weight.dtype
        and hidden.dtype in (torch.float32, torch.bfloat16)
        and hidden.shape[1] > 0
        and mkldnn.enabled
        and all(x.shape[1] == 1 or x.stride(1) == 1 for x in (hidden, head.weight))
        and _cpu_library.load() is not None
    )


def _inputs(hidden: Tensor, head: Head, pairs: Pairs) -> tuple[_Inputs, list[Tensor]]:
    """What both passes read, and the copies that must outlive the call."""
    bias = None if head.bias is None else head.bias[: head.vocab_size].float().contiguous()
    target, first = pairs.target.contiguous(), pairs.first.contiguous()
    inputs = _Inputs(
        hidden=hidden.data_ptr(),
        weight=head.weight.data_ptr(),
        bias=_pointer(bias),
        target=target.data_ptr(),
        first=first.data_ptr(),
        rows=hidden.shape[0],
        columns=head.vocab_size,
        depth=hidden.shape[1],
        hidden_stride=hidden.stride(0),
        weight_stride=head.weight.stride(0),
        temperature=head.temperature,
        softcap=head.softcap or 0.0,
    )
    return inputs, [target, first, *([] if bias is None else [bias])]


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _whole(n: int, unit: int = BLOCK) -> int:
    """`n` rounded up to a multiple of `unit`."""
    return -(-n // unit) * unit


def forward(hidden: Tensor, head: Head, pairs: Pairs, wanted: Wanted) -> tuple[Partial, Tensor]:
    """Statistics of every row, and the logit of every pair's target (NaN outside the vocabulary).

    Wants R > 0 and what `takes` says. Workspace: partials of a pass over rows, and for each thread
    a packed segment, a tile of logits and a block of rows.
    """
    library = _cpu_library.load()
    assert library is not None
    R, D = hidden.shape
    size = hidden.element_size()
    # set by D and the dtype, never by the number of rows or threads
    fitting = SEGMENT_BYTES // (D * size) // PANEL * PANEL
    columns = max(MIN_COLUMNS[size], min(MAX_COLUMNS, fitting))
    n_segments = -(-head.vocab_size // columns)
    fields = _asked(stats)
    blocks = PARTIALS_BYTES // (4 * n_segments * len(fields) * BLOCK)
    pass_rows = min(max(1, blocks) * BLOCK, _whole(R))
    deep = _whole(D, 2)
    of_thread = (columns * deep * size, BLOCK * columns * 4, BLOCK * deep * size)
    scratch_bytes = sum(_whole(n, 64) for n in of_thread)
    threads = min(torch.get_num_threads(), max(1, SCRATCH_BYTES // scratch_bytes))
    # few segments for many threads: each is packed by several, for some of the rows
    chunks = -(-TASKS * threads // n_segments) if threads > 1 else 1
    chunk_rows = max(MIN_CHUNK, _whole(-(-pass_rows // chunks)))

    inputs, _kept = _inputs(hidden, head, pairs)
    chosen = hidden.new_full(pairs.target.shape, float("nan"), dtype=torch.float32)
    merged = {name: _empty(name, R) for name in fields}
    partials = {name: _empty(name, n_segments * pass_rows) for name in fields}
    scratch = torch.empty(threads * scratch_bytes // 4, dtype=torch.float32)
    problem = _Forward(
        inputs=inputs,
        segment_columns=columns,
        pass_rows=pass_rows,
        chunk_rows=chunk_rows,
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


def backward(
    grads: dict[str, Tensor],
    state: Tensor,
    hidden: Tensor,
    head: Head,
    pairs: Pairs,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, those that `needs` names; logits are recomputed.

    `state` must come from `forward` above: the logits here are the same bits as there. Arguments
    and workspace as in `_linear_logprob_chunk.backward`.
    """
    library = _cpu_library.load()
    assert library is not None
    R, D = hidden.shape
    need_hidden, need_weight, need_bias = needs
    padded = _whole(R)
    dhidden = state.new_zeros((padded, D)) if need_hidden else None
    dweight = dbias = None
    if need_weight:
        dweight = torch.empty_like(head.weight, memory_format=torch.contiguous_format)
        dweight[head.vocab_size :] = 0
    if need_bias and head.bias is not None:
        dbias = state.new_zeros(head.bias.shape)
    of_row = RowGrads(grads, state, pairs.row, padded)
    of_chosen = grads["logprob"].contiguous() if "logprob" in grads else None
    of_thread = TILE_BYTES + BLOCK * _whole(D, 2) * hidden.element_size()
    inputs, _kept = _inputs(hidden, head, pairs)
    problem = _Backward(
        inputs=inputs,
        of_chosen=_pointer(of_chosen),
        wave_columns=min(_fitting(D, MAX_WAVE), _whole(head.vocab_size)),
        pass_rows=min(_fitting(D, MAX_PASS), padded),
        threads=min(torch.get_num_threads(), max(1, BACKWARD_SCRATCH_BYTES // of_thread)),
        dhidden=_pointer(dhidden),
        dweight=_pointer(dweight),
        dbias=_pointer(dbias),
        **{name: _pointer(getattr(of_row, name)) for name in OF_ROW},
    )
    n_bytes = library.backward_bytes(problem, hidden.dtype)
    memory = torch.empty(n_bytes // 4, dtype=torch.float32)
    problem.memory = memory.data_ptr()
    library.backward(problem, hidden.dtype)
    if dhidden is not None:
        dhidden = dhidden[:R].to(hidden.dtype)
    if dbias is not None and head.bias is not None:
        dbias = dbias.to(head.bias.dtype)
    return dhidden, dweight, dbias


def _fitting(D: int, most: int) -> int:
    """Rows of D elements that fit SIDE_ELEMENTS, in whole blocks."""
    return max(BLOCK, min(most, SIDE_ELEMENTS // D // BLOCK * BLOCK))


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
