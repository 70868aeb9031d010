"""`token_logprob` on a CPU: calls of the C++ in `cpu/token_logprob.cpp`.

The contract, the statistics and their merge law are those of `_token_logprob_torch.py`.

R rows of logits, S (row, target) pairs, V vocabulary.
"""

import ctypes

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
from ._head import RowGrads, Transform, nonzero_grads
from ._state import Pairs, Partial
from .stats import Wanted

# columns: logits and their exponentials, in fp32, stay in the core's first cache
SEGMENT = 4096
PARTIALS_BYTES = 4 * 2**20  # rows are taken in passes, so that their partials fit


class _TokenCut(ctypes.Structure):
    """`Cut` of `cpu/token_logprob.cpp`."""

    _fields_ = [
        ("inputs", Inputs),
        *((name, ctypes.c_int64) for name in ("column_stride", "segment_columns", "threads")),
    ]


class _TokenForward(ctypes.Structure):
    """`Forward` of `cpu/token_logprob.cpp`."""

    _fields_ = [
        ("cut", _TokenCut),
        *((name, ctypes.c_int64) for name in ("pass_rows", "k")),
        ("renyi_order", ctypes.c_float),
        ("merged", Partials),
        ("chosen", ctypes.c_void_p),
        ("partials", Partials),
    ]


class _TokenRanks(ctypes.Structure):
    """`Ranks` of `cpu/token_logprob.cpp`."""

    _fields_ = [("cut", _TokenCut), ("chosen", ctypes.c_void_p), ("ahead", ctypes.c_void_p)]


class _TokenBackward(ctypes.Structure):
    """`Backward` of `cpu/token_logprob.cpp`, its `RowGrads` written out."""

    _fields_ = [
        ("cut", _TokenCut),
        *((name, ctypes.c_void_p) for name in (*OF_ROW, "of_chosen", "dlogits")),
        ("stride", ctypes.c_int64),
    ]


def takes(logits: Tensor) -> bool:
    """Whether the C++ kernel reads these logits: their kind here, and a library that loads."""
    return (
        logits.device.type == "cpu"
        and logits.dtype in _cpu_library.TYPES
        # memory that holds something else than the values
        and not logits.is_neg()
        and _cpu_library.load() is not None
    )


def _cut(logits: Tensor, transform: Transform, pairs: Pairs) -> tuple[_TokenCut, list[Tensor]]:
    """What every pass reads, and the copies that must outlive the call."""
    V = transform.vocab_size
    mask = None if transform.vocab_mask is None else transform.vocab_mask[:V].contiguous()
    target, first = pairs.target.contiguous(), pairs.first.contiguous()
    inputs = Inputs(
        hidden=logits.data_ptr(),
        mask=pointer(mask),
        target=target.data_ptr(),
        first=first.data_ptr(),
        rows=logits.shape[0],
        columns=V,
        hidden_stride=logits.stride(0),
        temperature=transform.temperature,
        softcap=transform.softcap or 0.0,
    )
    cut = _TokenCut(
        inputs=inputs,
        column_stride=logits.stride(1),
        segment_columns=SEGMENT,
        threads=torch.get_num_threads(),
    )
    return cut, [x for x in (target, first, mask) if x is not None]


def forward(
    logits: Tensor, transform: Transform, pairs: Pairs, wanted: Wanted
) -> tuple[Partial, Tensor]:
    """The partial of every row, and the logit of every pair's target (NaN outside the vocabulary).

    Wants R > 0 and what `takes` says. Workspace: the partials of a pass of rows.
    """
    R = logits.shape[0]
    cut, _kept = _cut(logits, transform, pairs)
    n_segments = -(-transform.vocab_size // SEGMENT)
    names = partial_names(wanted.fields)
    # the best columns are kept by each thread, everything else by each segment
    sizes = [cut.threads * wanted.k if name in BEST else n_segments for name in names]
    pass_rows = min(R, max(1, PARTIALS_BYTES // (4 * sum(sizes))))
    chosen = logits.new_full(pairs.target.shape, float("nan"), dtype=torch.float32)
    merged = {name: empty_field(name, R * wanted.k if name in BEST else R) for name in names}
    partials = {
        name: empty_field(name, n * pass_rows) for name, n in zip(names, sizes, strict=True)
    }
    problem = _TokenForward(
        cut=cut,
        pass_rows=pass_rows,
        k=wanted.k,
        renyi_order=wanted.renyi_order,
        merged=Partials.of(merged),
        chosen=chosen.data_ptr(),
        partials=Partials.of(partials),
    )
    _cpu_library.loaded().run("token_logprob_forward", problem, logits.dtype)
    return Partial(**in_torch(merged, wanted.k)), chosen


def ranks(logits: Tensor, transform: Transform, pairs: Pairs, chosen: Tensor) -> Tensor:
    """Unmasked columns ahead of each pair's target [S] int64; any number for a pair outside.

    `chosen` [S] are the targets' logits, from the `forward` above: these are the same bits.
    """
    cut, _kept = _cut(logits, transform, pairs)
    ahead = torch.zeros_like(pairs.target, memory_format=torch.contiguous_format)
    chosen = chosen.contiguous()
    problem = _TokenRanks(cut=cut, chosen=chosen.data_ptr(), ahead=ahead.data_ptr())
    _cpu_library.loaded().run("token_logprob_ranks", problem, logits.dtype)
    return ahead


def backward(
    grads: Tensor, state: Tensor, logits: Tensor, transform: Transform, pairs: Pairs
) -> Tensor:
    """Gradient of the logits [R, V], contiguous, in their dtype.

    `grads` [4, S] are of `DIFFERENTIABLE`, in the order of the pairs, 0 where a pair does not
    count; `state` [4, R] as `Rows.state` leaves it.
    """
    R = logits.shape[0]
    given = nonzero_grads(grads)
    of_row = RowGrads(given, state, pairs.row, R)
    of_chosen = given["logprob"].contiguous()
    dlogits = torch.empty(logits.shape, dtype=logits.dtype)
    cut, _kept = _cut(logits, transform, pairs)
    problem = _TokenBackward(
        cut=cut,
        of_chosen=of_chosen.data_ptr(),
        dlogits=dlogits.data_ptr(),
        stride=logits.shape[1],
        **{name: pointer(getattr(of_row, name)) for name in OF_ROW},
    )
    _cpu_library.loaded().run("token_logprob_backward", problem, logits.dtype)
    return dlogits
