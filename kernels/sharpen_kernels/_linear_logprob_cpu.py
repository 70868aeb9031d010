"""`linear_logprob` on a CPU with AVX-512: calls of the C++ in `cpu/`, forward and backward.

The contract, the statistics and their merge law are those of `_linear_logprob_chunk.py`; logits
live only as tiles in the cores' caches, and a bf16 weight is multiplied as it is.

R hidden rows, S (row, target) pairs, V vocabulary, D hidden.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

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
BEST = ("best", "best_column")  # fields of k values a row
COLUMNS = ("column", "best_column")  # int32 in C++


class _Partials(ctypes.Structure):
    """`Partials` of `cpu/row_statistics.h`."""

    _fields_ = [(name, ctypes.c_void_p) for name in Partial._fields]


class _Inputs(ctypes.Structure):
    """`Inputs` of `cpu/tile.h`, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("hidden", "weight", "bias", "mask")),
        *((name, ctypes.c_void_p) for name in ("target", "first")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "depth")),
        *((name, ctypes.c_int64) for name in ("hidden_stride", "weight_stride")),
        *((name, ctypes.c_float) for name in ("temperature", "softcap")),
    ]


class _Cut(ctypes.Structure):
    """`Cut` of `cpu/linear_logprob.cpp`."""

    _fields_ = [
        ("inputs", _Inputs),
        *((name, ctypes.c_int64) for name in ("segment_columns", "chunk_rows", "threads")),
        ("scratch", ctypes.c_void_p),
        ("scratch_bytes", ctypes.c_int64),
    ]


class _Forward(ctypes.Structure):
    """`Forward` of `cpu/linear_logprob.cpp`."""

    _fields_ = [
        ("cut", _Cut),
        ("pass_rows", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("renyi_order", ctypes.c_float),
        ("merged", _Partials),
        ("chosen", ctypes.c_void_p),
        ("partials", _Partials),
    ]


class _Ranks(ctypes.Structure):
    """`Ranks` of `cpu/linear_logprob.cpp`."""

    _fields_ = [("cut", _Cut), ("chosen", ctypes.c_void_p), ("ahead", ctypes.c_void_p)]


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
        # memory that holds something else than the values
        and not any(x.is_neg() for x in (hidden, head.weight))
        and _cpu_library.load() is not None
    )


def _inputs(hidden: Tensor, head: Head, pairs: Pairs) -> tuple[_Inputs, list[Tensor]]:
    """What every pass reads, and the copies that must outlive the call."""
    V = head.vocab_size
    bias = None if head.bias is None else head.bias[:V].float().resolve_neg().contiguous()
    mask = None if head.vocab_mask is None else head.vocab_mask[:V].contiguous()
    target, first = pairs.target.contiguous(), pairs.first.contiguous()
    inputs = _Inputs(
        hidden=hidden.data_ptr(),
        weight=head.weight.data_ptr(),
        bias=_pointer(bias),
        mask=_pointer(mask),
        target=target.data_ptr(),
        first=first.data_ptr(),
        rows=hidden.shape[0],
        columns=V,
        depth=hidden.shape[1],
        hidden_stride=hidden.stride(0),
        weight_stride=head.weight.stride(0),
        temperature=head.temperature,
        softcap=head.softcap or 0.0,
    )
    return inputs, [x for x in (target, first, bias, mask) if x is not None]


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _whole(n: int, unit: int = BLOCK) -> int:
    """`n` rounded up to a multiple of `unit`."""
    return -(-n // unit) * unit


def _cut(hidden: Tensor, head: Head, pairs: Pairs) -> tuple[_Cut, list[Tensor]]:
    """Segments, threads and their memory, and the tensors that must outlive the call."""
    R, D = hidden.shape
    size = hidden.element_size()
    # set by D and the dtype, never by the number of rows or threads
    fitting = SEGMENT_BYTES // (D * size) // PANEL * PANEL
    columns = max(MIN_COLUMNS[size], min(MAX_COLUMNS, fitting))
    deep = _whole(D, 2)
    of_thread = (columns * deep * size, BLOCK * columns * 4, BLOCK * deep * size, columns * 4)
    scratch_bytes = sum(_whole(n, 64) for n in of_thread)
    threads = min(torch.get_num_threads(), max(1, SCRATCH_BYTES // scratch_bytes))
    # few segments for many threads: each is packed by several, for some of the rows
    chunks = -(-TASKS * threads // -(-head.vocab_size // columns)) if threads > 1 else 1
    scratch = torch.empty(threads * scratch_bytes // 4, dtype=torch.float32)
    inputs, kept = _inputs(hidden, head, pairs)
    cut = _Cut(
        inputs=inputs,
        segment_columns=columns,
        chunk_rows=max(MIN_CHUNK, _whole(-(-R // chunks))),
        threads=threads,
        scratch=scratch.data_ptr(),
        scratch_bytes=scratch_bytes,
    )
    return cut, [scratch, *kept]


def forward(hidden: Tensor, head: Head, pairs: Pairs, wanted: Wanted) -> tuple[Partial, Tensor]:
    """The partial of every row, and the logit of every pair's target (NaN outside the vocabulary).

    Wants R > 0 and what `takes` says. Workspace: partials of a pass over rows, and for each thread
    a packed segment, a tile of logits, a block of rows and the best columns of the pass.
    """
    library = _cpu_library.load()
    assert library is not None
    R = hidden.shape[0]
    cut, _kept = _cut(hidden, head, pairs)
    n_segments = -(-head.vocab_size // cut.segment_columns)
    names = [name for name in Partial._fields if name in {"top", "mass", *wanted.fields}]
    # the best columns are kept by each thread, everything else by each segment
    sizes = [cut.threads * wanted.k if name in BEST else n_segments for name in names]
    pass_rows = min(max(1, PARTIALS_BYTES // (4 * sum(sizes) * BLOCK)) * BLOCK, _whole(R))
    chosen = hidden.new_full(pairs.target.shape, float("nan"), dtype=torch.float32)
    merged = {name: _empty(name, R * wanted.k if name in BEST else R) for name in names}
    partials = {name: _empty(name, n * pass_rows) for name, n in zip(names, sizes, strict=True)}
    problem = _Forward(
        cut=cut,
        pass_rows=pass_rows,
        k=wanted.k,
        renyi_order=wanted.renyi_order,
        merged=_Partials(**{name: x.data_ptr() for name, x in merged.items()}),
        chosen=chosen.data_ptr(),
        partials=_Partials(**{name: x.data_ptr() for name, x in partials.items()}),
    )
    library.forward(problem, hidden.dtype)
    shaped = {name: x.view(R, wanted.k) if name in BEST else x for name, x in merged.items()}
    return Partial(
        **{name: x.long() if name in COLUMNS else x for name, x in shaped.items()}
    ), chosen


def ranks(hidden: Tensor, head: Head, pairs: Pairs, chosen: Tensor) -> Tensor:
    """Unmasked columns ahead of each pair's target [S] int64; any number for a pair outside.

    `chosen` [S] are the targets' logits, from the `forward` above: these are the same bits.
    """
    library = _cpu_library.load()
    assert library is not None
    cut, _kept = _cut(hidden, head, pairs)
    ahead = torch.zeros_like(pairs.target, memory_format=torch.contiguous_format)
    chosen = chosen.contiguous()
    problem = _Ranks(cut=cut, chosen=chosen.data_ptr(), ahead=ahead.data_ptr())
    library.ranks(problem, hidden.dtype)
    return ahead


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
        dhidden = dhidden[:R]
    if dbias is not None and head.bias is not None:
        dbias = dbias.to(head.bias.dtype)
    return dhidden, dweight, dbias


def _fitting(D: int, most: int) -> int:
    """Rows of D elements that fit SIDE_ELEMENTS, in whole blocks."""
    return max(BLOCK, min(most, SIDE_ELEMENTS // D // BLOCK * BLOCK))


def _empty(name: str, n: int) -> Tensor:
    return torch.empty(n, dtype=torch.int32 if name in COLUMNS else torch.float32)
