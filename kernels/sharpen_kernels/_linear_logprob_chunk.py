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

from ._pairs import Pairs
from ._rows import Partial, cut, finite_shift, merge, partial, stack
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


class Head(NamedTuple):
    """What turns hidden rows into logits: softcap(x W^T + b) / temperature, then the mask."""

    weight: Tensor
    bias: Tensor | None
    temperature: float
    softcap: float | None
    vocab_size: int
    vocab_mask: Tensor | None = None  # [>= vocab_size] bool, True where a column counts

    def segments(self, dtype: torch.dtype) -> Iterator[Segment]:
        """The columns, a few at a time, from the first to the last."""
        D = self.weight.shape[1]
        width = max(64, min(4096, SEGMENT_ELEMENTS // max(D, 1) // 64 * 64))
        for start in range(0, self.vocab_size, width):
            columns = slice(start, min(start + width, self.vocab_size))
            bias = None if self.bias is None else self.bias[columns].to(dtype)
            masked = None if self.vocab_mask is None else ~self.vocab_mask[columns]
            yield Segment(start, self.weight[columns].to(dtype), bias, masked)

    def block_rows(self) -> int:
        """Rows of a block: set by V, D and the kind of device, never by the number of rows."""
        if self.weight.is_cuda:
            return CUDA_BLOCK_ROWS
        V, D = self.vocab_size, self.weight.shape[1]
        return max(64, min(256, BLOCK_ELEMENTS // min(V, 4096), 8 * BLOCK_ELEMENTS // max(D, 1)))

    def logits(self, x: Tensor, segment: Segment) -> Tensor:
        """Logits of some blocks of rows over one segment, one product a block."""
        z = x.new_empty(x.shape[0], segment.weight.shape[0])
        step = self.block_rows()
        for block in range(0, x.shape[0], step):
            torch.mm(x[block : block + step], segment.weight.T, out=z[block : block + step])
        if segment.bias is not None:
            z += segment.bias
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.temperature != 1.0:
            z.div_(self.temperature)
        return z if segment.masked is None else z.masked_fill_(segment.masked, float("-inf"))

    def chain(self, dz: Tensor, z: Tensor) -> Tensor:
        """Gradient of x W^T + b from that of the logits, in place."""
        if self.softcap is not None:
            dz *= 1 - (z * (self.temperature / self.softcap)).square_()
            if self.vocab_mask is not None:
                # z = -inf there, and 0 * -inf is nan
                dz.masked_fill_(z == float("-inf"), 0.0)
        if self.temperature != 1.0:
            dz /= self.temperature
        return dz


def _block(x: Tensor, rows: slice, size: int, dtype: torch.dtype) -> Tensor:
    """Rows of `x` [R, D] in `dtype`, followed by zeros up to `size` rows."""
    part = x[rows].to(dtype)
    if part.shape[0] == size:
        return part
    padded = part.new_zeros(size, *part.shape[1:])
    padded[: part.shape[0]] = part
    return padded


def forward(hidden: Tensor, head: Head, pairs: Pairs, wanted: Wanted) -> tuple[Partial, Tensor]:
    """The partial of every row, and the logit of every pair's target (NaN outside the vocabulary).

    Wants R > 0. Workspace: one segment of the weight unless it is fp32 already, three blocks of
    logits, and a few values a row and segment.
    """
    R = hidden.shape[0]
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, head.weight.dtype), torch.float32)
    step = head.block_rows()
    spans = pairs.spans(R, step)
    chosen = hidden.new_full(pairs.target.shape, float("nan"), dtype=dtype)
    merged: list[Partial | None] = [None] * len(spans)
    for segment in head.segments(dtype):
        v = segment.weight.shape[0]
        for i, span in enumerate(spans):
            rows = slice(i * step, min((i + 1) * step, R))
            z = head.logits(_block(hidden, rows, step, dtype), segment)
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
    step = head.block_rows()
    spans = pairs.spans(R, step)
    ahead = torch.zeros_like(pairs.target)
    for segment in head.segments(dtype):
        column = torch.arange(segment.weight.shape[0], device=hidden.device) + segment.start
        for i, span in enumerate(spans):
            rows = slice(i * step, min((i + 1) * step, R))
            z = head.logits(_block(hidden, rows, step, dtype), segment)
            # as many pairs at a time as there are rows: a fork may have any number
            for j in range(span.start, span.stop, step):
                some = slice(j, min(j + step, span.stop))
                of_pair = z[pairs.row[some] - rows.start]
                own, target = chosen[some, None], pairs.target[some, None]
                first = (of_pair > own) | ((of_pair == own) & (column < target))
                ahead[some] += (first & (of_pair > float("-inf"))).sum(dim=1)
    return ahead


def _add_at(out: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """`out[index] += value` for 1-D tensors; repeated indices are summed in a fixed order."""
    if out.is_cuda:
        # index_add_ there is atomic; this sorts first
        return out.index_put_((index,), value, accumulate=True)
    return out.index_add_(0, index, value)


def _add_chosen(dz: Tensor, z: Tensor, row: Tensor, column: Tensor, grad: Tensor) -> None:
    """Add `grad` at the targets that lie in this segment; a masked target gets none."""
    v = z.shape[1]
    here = (column >= 0) & (column < v)
    index = row * v + column.clamp(0, v - 1)
    here &= z.view(-1)[index] > float("-inf")
    _add_at(dz.view(-1), index, torch.where(here, grad, 0.0))


class RowGrads:
    """Coefficients of one logit's gradient, a value a row, padded to whole blocks of rows.

    A row that no gradient reaches gets log_mass = inf, so p = 0: it adds exact zeros to every
    sum, NaN in its hidden row or not.
    """

    def __init__(self, grads: dict[str, Tensor], state: Tensor, row: Tensor, size: int):
        R = state.shape[1]
        safe = row.clamp(0, R - 1)

        def per_row(x: Tensor) -> Tensor:
            return _add_at(state.new_zeros(R), safe, x)

        reached = torch.stack(list(grads.values())) != 0
        active = per_row(reached.any(dim=0).to(state.dtype)) > 0

        def padded(x: Tensor, fill: float = 0.0) -> Tensor:
            out = state.new_full((size, 1), fill)
            out[:R, 0] = torch.where(active, x, fill)
            return out

        top, log_mass, entropy, n_valid = state
        sums = {name: per_row(g) for name, g in grads.items()}
        zero = state.new_zeros(R)
        prob = sums.get("lse", zero) + sums.get("self_certainty", zero)
        self.active = padded(active.to(state.dtype)) > 0  # [size, 1], as all below
        self.top = padded(finite_shift(top))
        self.log_mass = padded(log_mass, float("inf"))
        self.prob = padded(prob - sums.get("logprob", zero))
        self.entropy = padded(entropy)
        self.of_entropy = padded(sums["entropy"]) if "entropy" in sums else None
        certain = "self_certainty" in sums
        self.uniform = padded(sums["self_certainty"] / n_valid) if certain else None

    def dlogits(self, z: Tensor, block: slice) -> Tensor:
        """Gradient of the logits `z` [B, v] of a block, but for the targets' own term."""
        log_p = (z - self.top[block]).sub_(self.log_mass[block])
        p = log_p.exp()
        dz = p * self.prob[block]
        if self.of_entropy is not None:
            # dH / dz = -p (log p + H), 0 in a masked column, where log p = -inf
            log_p.clamp_(min=torch.finfo(z.dtype).min).add_(self.entropy[block])
            dz -= p.mul_(log_p).mul_(self.of_entropy[block])
        if self.uniform is not None:
            dz -= (z > float("-inf")) * self.uniform[block]
        return dz


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
    step = head.block_rows()
    size = -(-R // step) * step
    need_hidden, need_weight, need_bias = needs
    dhidden = hidden.new_zeros((size, D), dtype=dtype) if need_hidden else None
    dweight = torch.zeros_like(head.weight) if need_weight else None
    dbias = torch.zeros_like(head.bias) if need_bias and head.bias is not None else None
    if R > 0 and pairs.row.shape[0] > 0 and grads:
        spans = pairs.spans(R, BACKWARD_BLOCKS * step)
        of_row = RowGrads(grads, state, pairs.row, size)
        for segment in head.segments(dtype):
            start, weight = segment.start, segment.weight
            dweight_v = None if dweight is None else weight.new_zeros(weight.shape)
            dbias_v = None if dbias is None else weight.new_zeros(weight.shape[0])
            for i, span in enumerate(spans):
                block = slice(
                    i * BACKWARD_BLOCKS * step, min((i + 1) * BACKWARD_BLOCKS * step, size)
                )
                n = block.stop - block.start
                x = _block(hidden, slice(block.start, min(block.stop, R)), n, dtype)
                x = torch.where(of_row.active[block], x, 0.0)
                z = head.logits(x, segment)
                dz = of_row.dlogits(z, block)
                if "logprob" in grads:
                    row, column = pairs.row[span] - block.start, pairs.target[span] - start
                    _add_chosen(dz, z, row, column, grads["logprob"][span])
                dz = head.chain(dz, z)
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
