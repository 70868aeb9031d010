"""`linear_logprob` on a GPU by the vendor's GEMM: blocks of logits in fp32, then one read of each.

A block of rows times a segment of the weight goes into one workspace, which the kernels of
`token_logprob` read as they read any logits (bias, softcap, temperature and mask are theirs); the
partials of all segments are merged by one more kernel. Half-precision inputs are multiplied as
they are, into fp32: there is no wide copy of the weight.

Every block has BLOCK_R rows, the last one padded with zeros, and the columns of a segment depend
on V, D and the dtypes: so the vendor's library is asked for the same products whatever the batch,
and picks the same kernel each time (given one build and one GPU). That a row's bits do not depend
on its batch rests on this choice and is watched by tests on a GPU; it is not so by construction,
as in the fused route. What follows the product is.

R hidden rows, S (row, target) pairs, V vocabulary, D hidden.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _linear_logprob_torch as blocked
from . import _triton_state as state
from ._head import Head
from ._linear_logprob_torch import block_of
from ._state import Pairs, Partial, cut, finish
from ._token_logprob_triton import (
    Reading,
    ahead,
    best,
    merged,
    n_segments,
    put_chosen,
    put_partials,
)
from .stats import Wanted

BLOCK_R = 1024
# elements: 256 MiB of fp32 logits; as much again for a segment of a weight that must be widened
WORKSPACE = 2**26
# columns of a segment are a multiple of it
ALIGN_V = 4096


class Block(NamedTuple):
    """The logits of some rows over some columns."""

    logits: Reading
    rows: slice
    span: slice  # the pairs of these rows
    start: int  # of the columns
    segment: int  # of the row kernel, the first in these columns


def _is_native(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the library multiplies these dtypes exactly, into fp32, without a wide copy."""
    return hidden.dtype == weight.dtype and (hidden.is_cuda or hidden.dtype == torch.float32)


def _width(hidden: Tensor, head: Head) -> int:
    """Columns of a segment."""
    width = WORKSPACE // BLOCK_R
    if not _is_native(hidden, head.weight):
        width = min(width, WORKSPACE // max(hidden.shape[1], 1))
    return min(head.vocab_size, max(width // ALIGN_V, 1) * ALIGN_V)


def _multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write `x` [BLOCK_R, D] times `weight` [v, D] transposed into `out`, fp32."""
    if _is_native(x, weight) and x.dtype != torch.float32:
        torch.mm(x, weight.T, out_dtype=torch.float32, out=out)
    else:
        torch.mm(x.float(), weight.T.float(), out=out)


def _blocks(hidden: Tensor, head: Head, pairs: Pairs) -> Iterator[Block]:
    """Each block of logits in turn, in the same memory."""
    R = hidden.shape[0]
    width = _width(hidden, head)
    spans = pairs.spans(R, BLOCK_R)
    workspace = hidden.new_empty(BLOCK_R * width, dtype=torch.float32)
    segment = 0
    for start in range(0, head.vocab_size, width):
        columns = slice(start, min(start + width, head.vocab_size))
        v = columns.stop - start
        weight = head.weight[columns]
        if not _is_native(hidden, weight):
            weight = weight.float()
        bias = None if head.bias is None else head.bias[columns]
        mask = head.transform.vocab_mask
        mask = None if mask is None else mask[columns]
        z = workspace[: BLOCK_R * v].view(BLOCK_R, v)
        x = Reading(z, head.transform._replace(vocab_size=v, vocab_mask=mask), bias)
        for i, span in enumerate(spans):
            rows = slice(i * BLOCK_R, min((i + 1) * BLOCK_R, R))
            _multiply(block_of(hidden, rows, BLOCK_R, hidden.dtype), weight, z)
            yield Block(x, rows, span, start, segment)
        segment += n_segments(v)


def forward(hidden: Tensor, head: Head, pairs: Pairs, wanted: Wanted) -> tuple[Partial, Tensor]:
    """The partial of every row, and the logit of every pair's target (NaN outside the vocabulary).

    Wants R > 0. Workspace: 256 MiB of logits, a few values a row and segment, what `best` says
    for the best columns and, where dtypes must be widened, 256 MiB of weight.
    """
    R = hidden.shape[0]
    width = _width(hidden, head)
    rest = head.vocab_size % width
    n = head.vocab_size // width * n_segments(width) + n_segments(rest)
    padded = -(-R // BLOCK_R) * BLOCK_R
    part = hidden.new_empty((len(state.FIELDS), n, padded), dtype=torch.float32)
    chosen = hidden.new_full(pairs.target.shape, float("nan"), dtype=torch.float32)
    leaders: dict[int, list[tuple[Tensor, Tensor]]] = {}
    with torch.cuda.device_of(hidden):  # Triton launches on the current device, not the tensor's
        for block in _blocks(hidden, head, pairs):
            x, first = block.logits, block.rows.start
            segments = slice(block.segment, block.segment + n_segments(x.V))
            put_partials(x, part[:, segments, first : first + BLOCK_R], wanted)
            row, target = pairs.row[block.span] - first, pairs.target[block.span]
            put_chosen(x, row, target, block.start, chosen[block.span])
            if "best" in wanted.fields:
                values, columns = best(x, wanted.k)
                leaders.setdefault(first, []).append((values, columns + block.start))
        found = merged(part, wanted)
    if leaders:
        of_blocks = [_leaders(found, wanted.k) for found in leaders.values()]
        values, columns = (torch.cat(each) for each in zip(*of_blocks, strict=True))
        found = found._replace(best=values, best_column=columns)
    return cut(found, R), chosen


def _leaders(found: list[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The k best columns of the segments' own, given from left to right."""
    values, columns = (torch.cat(each, dim=1) for each in zip(*found, strict=True))
    # stable: of a tie the one further left stays first
    values, at = values.sort(dim=1, descending=True, stable=True)
    return values[:, :k], columns.gather(1, at[:, :k])


def ranks(hidden: Tensor, head: Head, pairs: Pairs, chosen: Tensor) -> Tensor:
    """Unmasked columns ahead of each pair's target [S] int64; any number for a pair outside.

    `chosen` [S] are the targets' logits, from the `forward` above: these are the same bits.
    """
    found = torch.zeros_like(pairs.target)
    with torch.cuda.device_of(hidden):
        for block in _blocks(hidden, head, pairs):
            row, target = pairs.row[block.span] - block.rows.start, pairs.target[block.span]
            found[block.span] += ahead(block.logits, row, target, block.start, chosen[block.span])
    return found


def backward(
    grads: dict[str, Tensor],
    state: Tensor,
    hidden: Tensor,
    head: Head,
    pairs: Pairs,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by PyTorch's blocks, `_linear_logprob_torch.backward`, and its own forward first.

    One product's rounding must serve p and lse: for p near 1, 1 - p is but rounding.
    """
    part, _ = blocked.forward(hidden, head, pairs, Wanted(tuple(grads)))
    return blocked.backward(grads, finish(part).state().to(state.dtype), hidden, head, pairs, needs)
