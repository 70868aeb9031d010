"""`token_logprob` on a CPU: calls of the C++ in `cpu/token_logprob.cpp`.

The contract, the statistics and their merge law are those of `_token_logprob_torch.py`.

R rows of logits, S (row, target) pairs, V vocabulary.
"""

import ctypes

import torch
from torch import Tensor

from . import _cpu_library
from ._cpu_structures import BEST, OF_ROW, Inputs, Partials, empty_field, in_torch, pointer
from ._linear_logprob_chunk import RowGrads
from ._logits import Read
from ._pairs import Pairs
from ._rows import Partial
from .stats import DIFFERENTIABLE, Wanted

# columns: logits and their exponentials, in fp32, stay in the core's first cache
SEGMENT = 4096
PARTIALS_BYTES = 4 * 2**20  # rows are taken in passes, so that their partials fit


class _Cut(ctypes.Structure):
    """`Cut` of `cpu/token_logprob.cpp`."""

    _fields_ = [
        ("inputs", Inputs),
        *((name, ctypes.c_int64) for name in ("column_stride", "segment_columns", "threads")),
    ]


class _Forward(ctypes.Structure):
    """`Forward` of `cpu/token_logprob.cpp`."""

    _fields_ = [
        ("cut", _Cut),
        *((name, ctypes.c_int64) for name in ("pass_rows", "k")),
        ("renyi_order", ctypes.c_float),
        ("merged", Partials),
        ("chosen", ctypes.c_void_p),
        ("partials", Partials),
    ]


class _Ranks(ctypes.Structure):
    """`Ranks` of `cpu/token_logprob.cpp`."""

    _fields_ = [("cut", _Cut), ("chosen", ctypes.c_void_p), ("ahead", ctypes.c_void_p)]


class _Backward(ctypes.Structure):
    """`Backward` of `cpu/token_logprob.cpp`, its `RowGrads` written out."""

    _fields_ = [
        ("cut", _Cut),
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


def _library() -> _cpu_library.Library:
    library = _cpu_library.load()
    assert library is not None, "`takes` says whether there is one"
    return library


def _cut(logits: Tensor, read: Read, pairs: Pairs) -> tuple[_Cut, list[Tensor]]:
    """What every pass reads, and the copies that must outlive the call."""
    V = read.vocab_size
    mask = None if read.vocab_mask is None else read.vocab_mask[:V].contiguous()
    target, first = pairs.target.contiguous(), pairs.first.contiguous()
    inputs = Inputs(
        hidden=logits.data_ptr(),
        mask=pointer(mask),
        target=target.data_ptr(),
        first=first.data_ptr(),
        rows=logits.shape[0],
        columns=V,
        hidden_stride=logits.stride(0),
        temperature=read.temperature,
        softcap=read.softcap or 0.0,
    )
    cut = _Cut(
        inputs=inputs,
        column_stride=logits.stride(1),
        segment_columns=SEGMENT,
        threads=torch.get_num_threads(),
    )
    return cut, [x for x in (target, first, mask) if x is not None]


def forward(logits: Tensor, read: Read, pairs: Pairs, wanted: Wanted) -> tuple[Partial, Tensor]:
    """The partial of every row, and the logit of every pair's target (NaN outside the vocabulary).

    Wants R > 0 and what `takes` says. Workspace: the partials of a pass of rows.
    """
    R = logits.shape[0]
    cut, _kept = _cut(logits, read, pairs)
    n_segments = -(-read.vocab_size // SEGMENT)
    names = [name for name in Partial._fields if name in {"top", "mass", *wanted.fields}]
    # the best columns are kept by each thread, everything else by each segment
    sizes = [cut.threads * wanted.k if name in BEST else n_segments for name in names]
    pass_rows = min(R, max(1, PARTIALS_BYTES // (4 * sum(sizes))))
    chosen = logits.new_full(pairs.target.shape, float("nan"), dtype=torch.float32)
    merged = {name: empty_field(name, R * wanted.k if name in BEST else R) for name in names}
    partials = {
        name: empty_field(name, n * pass_rows) for name, n in zip(names, sizes, strict=True)
    }
    problem = _Forward(
        cut=cut,
        pass_rows=pass_rows,
        k=wanted.k,
        renyi_order=wanted.renyi_order,
        merged=Partials(**{name: x.data_ptr() for name, x in merged.items()}),
        chosen=chosen.data_ptr(),
        partials=Partials(**{name: x.data_ptr() for name, x in partials.items()}),
    )
    _library().run("token_logprob_forward", problem, logits.dtype)
    return in_torch(merged, wanted.k), chosen


def ranks(logits: Tensor, read: Read, pairs: Pairs, chosen: Tensor) -> Tensor:
    """Unmasked columns ahead of each pair's target [S] int64; any number for a pair outside.

    `chosen` [S] are the targets' logits, from the `forward` above: these are the same bits.
    """
    cut, _kept = _cut(logits, read, pairs)
    ahead = torch.zeros_like(pairs.target, memory_format=torch.contiguous_format)
    chosen = chosen.contiguous()
    problem = _Ranks(cut=cut, chosen=chosen.data_ptr(), ahead=ahead.data_ptr())
    _library().run("token_logprob_ranks", problem, logits.dtype)
    return ahead


def backward(grads: Tensor, state: Tensor, logits: Tensor, read: Read, pairs: Pairs) -> Tensor:
    """Gradient of the logits [R, V], contiguous, in their dtype.

    `grads` [4, S] are of `DIFFERENTIABLE`, in the order of the pairs, 0 where a pair does not
    count; `state` [4, R] as `Rows.state` leaves it.
    """
    R = logits.shape[0]
    given = dict(zip(DIFFERENTIABLE, grads, strict=True))
    given = {name: x for name, x in given.items() if name == "logprob" or bool(x.any())}
    of_row = RowGrads(given, state, pairs.row, R)
    of_chosen = given["logprob"].contiguous()
    dlogits = torch.empty(logits.shape, dtype=logits.dtype)
    cut, _kept = _cut(logits, read, pairs)
    problem = _Backward(
        cut=cut,
        of_chosen=of_chosen.data_ptr(),
        dlogits=dlogits.data_ptr(),
        stride=logits.shape[1],
        **{name: pointer(getattr(of_row, name)) for name in OF_ROW},
    )
    _library().run("token_logprob_backward", problem, logits.dtype)
    return dlogits
