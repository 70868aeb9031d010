"""`linear_logprob` on a CPU: calls of the C++ in `cpu/`, forward and backward.

The contract, the statistics and their merge law are those of `_linear_logprob_torch.py`; logits
live only as tiles in the cores' caches, and a bf16 weight is never copied as a whole. Where the CPU
has matrix units (AMX) they multiply fp32 as well, as exactly; where it has AVX-512, oneDNN's
micro-kernels multiply bf16 and fp32; elsewhere, AVX2 given, fused multiply-adds of fp32.

R hidden rows, S (row, target) pairs, V vocabulary, D hidden.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _cpu_library
from ._cpu_library import (
    BEST,
    OF_ROW,
    Inputs,
    Partials,
    empty_field,
    in_torch,
    partial_names,
    pointer,
)
from ._head import Head, RowGrads
from ._state import Pairs, Partial
from .stats import Wanted

PANEL = BLOCK = 64  # columns and rows of one product, as in `cpu/tile.h`
# bytes of a packed segment of the weight: it shares the core's second cache with a tile and rows
SEGMENT_BYTES = 2**19
MIN_COLUMNS, MAX_COLUMNS = {2: 128, 4: 64}, 512  # the least by size of an input's element
# forward: rows are taken in passes, so that they and their partials fit
PARTIALS_BYTES = 16 * 2**20
HIDDEN_BYTES = 20 * 2**20
SCRATCH_BYTES = 24 * 2**20  # of all threads: where a core needs megabytes, some cores stay idle
TASKS, MIN_CHUNK = 4, 256  # tasks a thread where rows can be cut so, and rows of the smallest
# backward: columns of a wave and rows of a pass, and bytes of the weight or of hidden in one
MAX_WAVE, MAX_PASS = 512, 2048
WAVE_BYTES, PASS_BYTES = 3 * 2**20, 12 * 2**20
TILE_BYTES = BLOCK * 256 * 4  # of fp32, the most of any kind of product
BACKWARD_SCRATCH_BYTES = 8 * 2**20


class _LinearCut(ctypes.Structure):
    """`Cut` of `cpu/linear_logprob.cpp`."""

    _fields_ = [
        ("inputs", Inputs),
        *((name, ctypes.c_int64) for name in ("segment_columns", "pass_rows", "chunk_rows")),
        ("threads", ctypes.c_int64),
        ("hidden", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
    ]


class _LinearForward(ctypes.Structure):
    """`Forward` of `cpu/linear_logprob.cpp`."""

    _fields_ = [
        ("cut", _LinearCut),
        ("k", ctypes.c_int64),
        ("renyi_order", ctypes.c_float),
        ("merged", Partials),
        ("chosen", ctypes.c_void_p),
        ("partials", Partials),
    ]


class _LinearRanks(ctypes.Structure):
    """`Ranks` of `cpu/linear_logprob.cpp`."""

    _fields_ = [("cut", _LinearCut), ("chosen", ctypes.c_void_p), ("ahead", ctypes.c_void_p)]


class _LinearBackward(ctypes.Structure):
    """`Backward` of `cpu/linear_logprob_bwd.h`, its `RowGrads` written out."""

    _fields_ = [
        ("inputs", Inputs),
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
        and hidden.dtype in _cpu_library.TYPES
        and hidden.shape[1] > 0
        and mkldnn.enabled
        and all(x.shape[1] == 1 or x.stride(1) == 1 for x in (hidden, head.weight))
        # memory that holds something else than the values
        and not any(x.is_neg() for x in (hidden, head.weight))
        and _cpu_library.load() is not None
    )


def _inputs(hidden: Tensor, head: Head, pairs: Pairs) -> tuple[Inputs, list[Tensor]]:
    """What every pass reads, and the copies that must outlive the call."""
    V = head.vocab_size
    bias = None if head.bias is None else head.bias[:V].float().resolve_neg().contiguous()
    mask = head.transform.vocab_mask
    mask = None if mask is None else mask[:V].contiguous()
    target, first = pairs.target.contiguous(), pairs.first.contiguous()
    inputs = Inputs(
        hidden=hidden.data_ptr(),
        weight=head.weight.data_ptr(),
        bias=pointer(bias),
        mask=pointer(mask),
        target=target.data_ptr(),
        first=first.data_ptr(),
        rows=hidden.shape[0],
        columns=V,
        depth=hidden.shape[1],
        hidden_stride=hidden.stride(0),
        weight_stride=head.weight.stride(0),
        temperature=head.transform.temperature,
        softcap=head.transform.softcap or 0.0,
    )
    return inputs, [x for x in (target, first, bias, mask) if x is not None]


def _whole(n: int, unit: int = BLOCK) -> int:
    """`n` rounded up to a multiple of `unit`."""
    return -(-n // unit) * unit


def _cut(
    library: _cpu_library.Library, hidden: Tensor, head: Head, pairs: Pairs
) -> tuple[_LinearCut, list[Tensor]]:
    """Segments, threads and their memory; and the tensors that must outlive the call."""
    D = hidden.shape[1]
    # set by D and the dtype, never by the number of rows or threads
    # the matrix units outrun the third cache, which hidden rows come from: twice as many columns
    budget = SEGMENT_BYTES * (2 if library.products == _cpu_library.AMX else 1)
    fitting = budget // (D * library.word_bytes(hidden.dtype)) // PANEL * PANEL
    columns = max(MIN_COLUMNS[hidden.element_size()], min(MAX_COLUMNS, fitting))
    inputs, kept = _inputs(hidden, head, pairs)
    cut = _LinearCut(inputs=inputs, segment_columns=columns)
    of_thread = library.n_bytes("scratch", cut, hidden.dtype)
    cut.threads = min(torch.get_num_threads(), max(1, SCRATCH_BYTES // of_thread))
    scratch = torch.empty(cut.threads * of_thread // 4, dtype=torch.float32)
    cut.scratch = scratch.data_ptr()
    return cut, [scratch, *kept]


def _cut_rows(
    library: _cpu_library.Library, hidden: Tensor, cut: _LinearCut, partial_bytes: int
) -> Tensor:
    """Passes and chunks of rows, each with so many bytes of partials; memory of packed rows."""
    R = hidden.shape[0]
    row_bytes = library.n_bytes("row", cut, hidden.dtype)
    fitting = min(PARTIALS_BYTES // max(1, partial_bytes), HIDDEN_BYTES // row_bytes)
    cut.pass_rows = min(max(1, fitting // BLOCK) * BLOCK, _whole(R))
    # few segments for many threads: each is packed by several, for some of the rows
    n_segments = -(-cut.inputs.columns // cut.segment_columns)
    chunks = -(-TASKS * cut.threads // n_segments) if cut.threads > 1 else 1
    cut.chunk_rows = max(MIN_CHUNK, _whole(-(-cut.pass_rows // chunks)))
    packed = torch.empty(cut.pass_rows * row_bytes // 4, dtype=torch.float32)
    cut.hidden = packed.data_ptr()
    return packed


def forward(hidden: Tensor, head: Head, pairs: Pairs, wanted: Wanted) -> tuple[Partial, Tensor]:
    """The partial of every row, and the logit of every pair's target (NaN outside the vocabulary).

    Wants R > 0 and what `takes` says. Workspace: rows of a pass and their partials, and for each
    thread a packed segment, a tile of logits and the best columns of the pass.
    """
    library = _cpu_library.loaded()
    R = hidden.shape[0]
    cut, _kept = _cut(library, hidden, head, pairs)
    n_segments = -(-head.vocab_size // cut.segment_columns)
    names = partial_names(wanted.fields)
    # the best columns are kept by each thread, everything else by each segment
    sizes = [cut.threads * wanted.k if name in BEST else n_segments for name in names]
    _packed = _cut_rows(library, hidden, cut, 4 * sum(sizes))
    chosen = hidden.new_full(pairs.target.shape, float("nan"), dtype=torch.float32)
    merged = {name: empty_field(name, R * wanted.k if name in BEST else R) for name in names}
    partials = {
        name: empty_field(name, n * cut.pass_rows) for name, n in zip(names, sizes, strict=True)
    }
    problem = _LinearForward(
        cut=cut,
        k=wanted.k,
        renyi_order=wanted.renyi_order,
        merged=Partials.of(merged),
        chosen=chosen.data_ptr(),
        partials=Partials.of(partials),
    )
    library.run("linear_logprob_forward", problem, hidden.dtype)
    return Partial(**in_torch(merged, wanted.k)), chosen


def ranks(hidden: Tensor, head: Head, pairs: Pairs, chosen: Tensor) -> Tensor:
    """Unmasked columns ahead of each pair's target [S] int64; any number for a pair outside.

    `chosen` [S] are the targets' logits, from the `forward` above: these are the same bits.
    """
    library = _cpu_library.loaded()
    cut, _kept = _cut(library, hidden, head, pairs)
    _packed = _cut_rows(library, hidden, cut, 0)
    ahead = torch.zeros_like(pairs.target, memory_format=torch.contiguous_format)
    chosen = chosen.contiguous()
    problem = _LinearRanks(cut=cut, chosen=chosen.data_ptr(), ahead=ahead.data_ptr())
    library.run("linear_logprob_ranks", problem, hidden.dtype)
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
    and workspace as in `_linear_logprob_torch.backward`.
    """
    library = _cpu_library.loaded()
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
    bytes_of_row = D * library.word_bytes(hidden.dtype)
    wave, rows = (n // bytes_of_row // BLOCK * BLOCK for n in (WAVE_BYTES, PASS_BYTES))
    inputs, _kept = _inputs(hidden, head, pairs)
    problem = _LinearBackward(
        inputs=inputs,
        of_chosen=pointer(of_chosen),
        wave_columns=max(BLOCK, min(MAX_WAVE, wave, _whole(head.vocab_size))),
        pass_rows=max(BLOCK, min(MAX_PASS, rows, padded)),
        threads=min(torch.get_num_threads(), BACKWARD_SCRATCH_BYTES // TILE_BYTES),
        dhidden=pointer(dhidden),
        dweight=pointer(dweight),
        dbias=pointer(dbias),
        **{name: pointer(getattr(of_row, name)) for name in OF_ROW},
    )
    n_bytes = library.n_bytes("backward", problem, hidden.dtype)
    memory = torch.empty(n_bytes // 4, dtype=torch.float32)
    problem.memory = memory.data_ptr()
    library.run("linear_logprob_backward", problem, hidden.dtype)
    if dhidden is not None:
        dhidden = dhidden[:R]
    if dbias is not None and head.bias is not None:
        dbias = dbias.to(head.bias.dtype)
    return dhidden, dweight, dbias
