"""`token_logprob` and its gradient in PyTorch, on any device, in bounded memory.

Rows are taken in blocks and columns in segments, so that a block of fp32 logits stays in a core's
cache while it is looked at several times: each logit is read from memory once. Each segment leaves
a `Partial`, and partials are merged from the first column to the last.

R rows of logits, S (row, target) pairs, V vocabulary.  Segments are short enough for PyTorch to
sum a row in one thread: a row has the same bits in any batch (it is their sum; tests watch it).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ._head import RowGrads, Transform, add_chosen, nonzero_grads, sum_dtype
from ._state import Pairs, Partial, merge, partial, stack
from .stats import Wanted

# elements, measured by bench/speed.py: 1 MiB of fp32 logits at a time on a CPU
SEGMENT = 2**14
BLOCK_ELEMENTS = 2**18
CUDA_BLOCK_ELEMENTS = 2**24


def forward(
    logits: Tensor, transform: Transform, pairs: Pairs, wanted: Wanted
) -> tuple[Partial, Tensor]:
    """The partial of every row, and the logit of every pair's target.  Wants R > 0.

    Workspace: a few blocks of logits.
    """
    R = logits.shape[0]
    dtype = sum_dtype(logits)
    step = _rows_at_once(transform, logits)
    chosen = logits.new_full(pairs.target.shape, float("nan"), dtype=dtype)
    found = []
    for i, span in enumerate(pairs.spans(R, step)):
        rows = slice(i * step, min((i + 1) * step, R))
        part: Partial | None = None
        for columns, masked in _segments(transform, logits):
            z = _logits(logits[rows, columns], transform, masked, dtype)
            column = pairs.target[span] - columns.start
            here = (column >= 0) & (column < z.shape[1])
            logit = z[pairs.row[span] - rows.start, column.clamp(0, z.shape[1] - 1)]
            chosen[span] = torch.where(here, logit, chosen[span])
            right = partial(z, columns.start, wanted)
            part = right if part is None else merge(part, right, wanted.renyi_order)
        assert part is not None
        found.append(part)
    return stack(found), chosen


def ranks(logits: Tensor, transform: Transform, pairs: Pairs, chosen: Tensor) -> Tensor:
    """Unmasked columns ahead of each pair's target [S] int64; any number for a pair outside."""
    S, dtype = pairs.row.shape[0], chosen.dtype
    ahead = torch.zeros_like(pairs.row)
    step = _rows_at_once(transform, logits)
    for i in range(0, S, step):
        span = slice(i, min(i + step, S))
        row = pairs.row[span].clamp(0, logits.shape[0] - 1)
        target, own = pairs.target[span, None], chosen[span, None]
        for columns, masked in _segments(transform, logits):
            z = _logits(logits[row, columns], transform, masked, dtype)
            column = torch.arange(columns.start, columns.stop, device=z.device)
            first = (z > own) | ((z == own) & (column < target))
            ahead[span] += (first & (z > float("-inf"))).sum(dim=1)
    return ahead


def backward(
    grads: Tensor, state: Tensor, logits: Tensor, transform: Transform, pairs: Pairs
) -> Tensor:
    """Gradient of the logits [R, width]; `grads` [4, S] in the order of the pairs.  Wants R > 0."""
    R = logits.shape[0]
    given = nonzero_grads(grads)
    of_row = RowGrads(given, state, pairs.row, R)
    # elsewhere p = 0 already makes the gradient of a masked column 0
    has_dead = "self_certainty" in given or transform.softcap is not None
    has_dead = has_dead or not bool(of_row.active.all())
    dlogits = logits.new_zeros(logits.shape)
    step = _rows_at_once(transform, logits)
    for i, span in enumerate(pairs.spans(R, step)):
        rows = slice(i * step, min((i + 1) * step, R))
        for columns, masked in _segments(transform, logits):
            z = _logits(logits[rows, columns], transform, masked, state.dtype)
            dz = of_row.dlogits(z, rows)
            row, column = pairs.row[span] - rows.start, pairs.target[span] - columns.start
            add_chosen(dz, z, row, column, given["logprob"][span])
            dz = transform.chain_(dz, z)
            if has_dead:
                dz.masked_fill_((z == float("-inf")) | ~of_row.active[rows], 0.0)
            dlogits[rows, columns] = dz
    return dlogits


def _segments(transform: Transform, like: Tensor) -> Iterator[tuple[slice, Tensor | None]]:
    """Columns of each segment, and which of them are masked."""
    mask = transform.vocab_mask
    for start in range(0, transform.vocab_size, SEGMENT):
        columns = slice(start, min(start + SEGMENT, transform.vocab_size))
        yield columns, None if mask is None else ~mask[columns].to(like.device)


def _rows_at_once(transform: Transform, logits: Tensor) -> int:
    elements = CUDA_BLOCK_ELEMENTS if logits.is_cuda else BLOCK_ELEMENTS
    return max(1, elements // min(transform.vocab_size, SEGMENT))


def _logits(x: Tensor, transform: Transform, masked: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A copy of some logits as they enter the distribution, in `dtype`."""
    z = x.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return transform.apply_(z, masked)
