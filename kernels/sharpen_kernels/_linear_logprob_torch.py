"""`linear_logprob` and its gradients in PyTorch, on any device, in bounded memory.

Rows are taken in blocks and the vocabulary in segments, so the largest tensor is one block of
logits or one segment of the weight in fp32: a few MiB on a CPU, whatever R and V, and never a
wide copy of the whole weight. Accumulates in fp32 (fp64 for fp64 inputs).

R hidden rows, S (row, target) pairs, V vocabulary, D hidden.  The last block is padded with zero
rows: every product has one shape, so the vendor's GEMM takes one path and a row scores the same
bits in any batch (given one build, one number of threads; it is their kernel, tests watch it).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._head import Head, RowGrads, add_chosen, sum_dtype
from ._state import Pairs, Partial, cut, merge, partial, stack
from .stats import Wanted

# elements, chosen: 16 MiB of fp32 weight, 1 MiB of fp32 logits that stay in a core's cache
SEGMENT_ELEMENTS = 2**22
BLOCK_ELEMENTS = 2**18
CUDA_BLOCK_ROWS = 1024
BACKWARD_BLOCKS = 4  # at a time: the weight's gradient is read and written once for so many


class Segment(NamedTuple):
    """Some neighbouring columns of a head, in the dtype of the sums."""

    start: int
    weight: Tensor  # [v, D]
    bias: Tensor | None  # [v]
    masked: Tensor | None  # [v] bool


def forward(hidden: Tensor, head: Head, pairs: Pairs, wanted: Wanted) -> tuple[Partial, Tensor]:
    """The partial of every row, and the logit of every pair's target (NaN outside the vocabulary).

    Wants R > 0. Workspace: one segment of the weight unless it is fp32 already, three blocks of
    logits, and a few values a row and segment.
    """
    R = hidden.shape[0]
    dtype = sum_dtype(hidden, head.weight)
    step = _block_rows(head)
    spans = pairs.spans(R, step)
    chosen = hidden.new_full(pairs.target.shape, float("nan"), dtype=dtype)
    merged: list[Partial | None] = [None] * len(spans)
    for segment in _segments(head, dtype):
        v = segment.weight.shape[0]
        for i, span in enumerate(spans):
            rows = slice(i * step, min((i + 1) * step, R))
            z = _logits(block_of(hidden, rows, step, dtype), head, segment)
            column = pairs.target[span] - segment.start
            logit = z[pairs.row[span] - rows.start, column.clamp(0, v - 1)]
            chosen[span] = torch.where((column >= 0) & (column < v), logit, chosen[span])
            right = partial(z, segment.start, wanted)
            left = merged[i]
            merged[i] = right if left is None else merge(left, right, wanted.renyi_order)
    return cut(stack([part for part in merged if part is not None]), R), chosen


def ranks(hidden: Tensor, head: Head, pairs: Pairs, chosen: Tensor) -> Tensor:
    """Unmasked columns ahead of each pair's target [S] int64; any number for a pair outside.

    `chosen` [S] are the targets' logits, from the `forward` above: these are the same bits.
    """
    R = hidden.shape[0]
    dtype = chosen.dtype
    step = _block_rows(head)
    spans = pairs.spans(R, step)
    ahead = torch.zeros_like(pairs.target)
    for segment in _segments(head, dtype):
        column = torch.arange(segment.weight.shape[0], device=hidden.device) + segment.start
        for i, span in enumerate(spans):
            rows = slice(i * step, min((i + 1) * step, R))
            z = _logits(block_of(hidden, rows, step, dtype), head, segment)
            # as many pairs at a time as there are rows: a fork may have any number
            for j in range(span.start, span.stop, step):
                some = slice(j, min(j + step, span.stop))
                of_pair = z[pairs.row[some] - rows.start]
                own, target = chosen[some, None], pairs.target[some, None]
                first = (of_pair > own) | ((of_pair == own) & (column < target))
                ahead[some] += (first & (of_pair > float("-inf"))).sum(dim=1)
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

    `grads` [S] and `pairs` are in the order of the pairs, and 0 where a pair does not count;
    `state` [4, R] is (top, log_mass, entropy, n_valid), and the gradient of hidden has its dtype.
    Workspace: that of `forward`, and a segment's gradient.
    """
    R, D = hidden.shape
    dtype = state.dtype
    step = _block_rows(head)
    size = -(-R // step) * step
    need_hidden, need_weight, need_bias = needs
    dhidden = hidden.new_zeros((size, D), dtype=dtype) if need_hidden else None
    dweight = torch.zeros_like(head.weight) if need_weight else None
    dbias = torch.zeros_like(head.bias) if need_bias and head.bias is not None else None
    if R > 0 and pairs.row.shape[0] > 0 and grads:
        spans = pairs.spans(R, BACKWARD_BLOCKS * step)
        of_row = RowGrads(grads, state, pairs.row, size)
        for segment in _segments(head, dtype):
            start, weight = segment.start, segment.weight
            dweight_v = None if dweight is None else weight.new_zeros(weight.shape)
            dbias_v = None if dbias is None else weight.new_zeros(weight.shape[0])
            for i, span in enumerate(spans):
                block = slice(
                    i * BACKWARD_BLOCKS * step, min((i + 1) * BACKWARD_BLOCKS * step, size)
                )
                n = block.stop - block.start
                x = block_of(hidden, slice(block.start, min(block.stop, R)), n, dtype)
                x = torch.where(of_row.active[block], x, 0.0)
                z = _logits(x, head, segment)
                dz = of_row.dlogits(z, block)
                if "logprob" in grads:
                    row, column = pairs.row[span] - block.start, pairs.target[span] - start
                    add_chosen(dz, z, row, column, grads["logprob"][span])
                dz = head.transform.chain_(dz, z)
                if dhidden is not None:
                    dhidden[block].addmm_(dz, weight)
                if dweight_v is not None:
                    dweight_v.addmm_(dz.T, x)
                if dbias_v is not None:
                    dbias_v += dz.sum(dim=0)
            if dweight is not None and dweight_v is not None:
                dweight[start : start + weight.shape[0]] = dweight_v
            if dbias is not None and dbias_v is not None:
                dbias[start : start + weight.shape[0]] = dbias_v
    return None if dhidden is None else dhidden[:R], dweight, dbias


def _segments(head: Head, dtype: torch.dtype) -> Iterator[Segment]:
    """The columns of a head, a few at a time, from the first to the last."""
    D = head.weight.shape[1]
    mask = head.transform.vocab_mask
    width = max(64, min(4096, SEGMENT_ELEMENTS // max(D, 1) // 64 * 64))
    for start in range(0, head.vocab_size, width):
        columns = slice(start, min(start + width, head.vocab_size))
        bias = None if head.bias is None else head.bias[columns].to(dtype)
        masked = None if mask is None else ~mask[columns]
        yield Segment(start, head.weight[columns].to(dtype), bias, masked)


def _block_rows(head: Head) -> int:
    """Rows of a block: set by V, D and the kind of device, never by the number of rows."""
    if head.weight.is_cuda:
        return CUDA_BLOCK_ROWS
    V, D = head.vocab_size, head.weight.shape[1]
    return max(64, min(256, BLOCK_ELEMENTS // min(V, 4096), 8 * BLOCK_ELEMENTS // max(D, 1)))


def _logits(x: Tensor, head: Head, segment: Segment) -> Tensor:
    """Logits of some blocks of rows over one segment, one product a block."""
    z = x.new_empty(x.shape[0], segment.weight.shape[0])
    step = _block_rows(head)
    for block in range(0, x.shape[0], step):
        torch.mm(x[block : block + step], segment.weight.T, out=z[block : block + step])
    if segment.bias is not None:
        z += segment.bias
    return head.transform.apply_(z, segment.masked)


def block_of(x: Tensor, rows: slice, size: int, dtype: torch.dtype) -> Tensor:
    """Rows of `x` [R, D] in `dtype`, followed by zeros up to `size` rows."""
    part = x[rows].to(dtype)
    if part.shape[0] == size:
        return part
    padded = part.new_zeros(size, *part.shape[1:])
    padded[: part.shape[0]] = part
    return padded
