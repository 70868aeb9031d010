"""`token_logprob` and its gradient in PyTorch, on any device, in bounded memory.

Rows are taken in blocks and columns in segments, so that a block of fp32 logits stays in a core's
cache while it is looked at several times: each logit is read from memory once. Each segment leaves
a `Part`, and parts are merged from the first column to the last.

R rows of logits, S (row, target) pairs, V vocabulary.  Segments are short enough for PyTorch to
sum a row in one thread: a row has the same bits in any batch (it is their sum; tests watch it).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ._logits import Read
from ._pairs import Pairs
from ._rows import Partial, finite_shift, merge, partial, stack
from .stats import Wanted

# elements, measured by bench/speed.py: 1 MiB of fp32 logits at a time on a CPU
SEGMENT = 2**14
BLOCK_ELEMENTS = 2**18
CUDA_BLOCK_ELEMENTS = 2**24


def _segments(read: Read, like: Tensor) -> Iterator[tuple[slice, Tensor | None]]:
    """Columns of each segment, and which of them are masked."""
    for start in range(0, read.vocab_size, SEGMENT):
        columns = slice(start, min(start + SEGMENT, read.vocab_size))
        mask = read.vocab_mask
        yield columns, None if mask is None else ~mask[columns].to(like.device)


def _rows_at_once(read: Read, logits: Tensor) -> int:
    elements = CUDA_BLOCK_ELEMENTS if logits.is_cuda else BLOCK_ELEMENTS
    return max(1, elements // min(read.vocab_size, SEGMENT))


def _logits(x: Tensor, read: Read, masked: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A copy of some logits as they enter the distribution, in `dtype`."""
    z = x.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if read.softcap is not None:
        z.div_(read.softcap).tanh_().mul_(read.softcap)
    if read.temperature != 1.0:
        z.div_(read.temperature)
    return z if masked is None else z.masked_fill_(masked, float("-inf"))


def ranks(logits: Tensor, read: Read, pairs: Pairs, chosen: Tensor) -> Tensor:
    """Unmasked columns ahead of each pair's target [S] int64; any number for a pair outside."""
    S, dtype = pairs.row.shape[0], chosen.dtype
    ahead = torch.zeros_like(pairs.row)
    step = _rows_at_once(read, logits)
    for i in range(0, S, step):
        span = slice(i, min(i + step, S))
        row = pairs.row[span].clamp(0, logits.shape[0] - 1)
        target, own = pairs.target[span, None], chosen[span, None]
        for columns, masked in _segments(read, logits):
            z = _logits(logits[row, columns], read, masked, dtype)
            column = torch.arange(columns.start, columns.stop, device=z.device)
            first = (z > own) | ((z == own) & (column < target))
            ahead[span] += (first & (z > float("-inf"))).sum(dim=1)
    return ahead


def forward(logits: Tensor, read: Read, pairs: Pairs, wanted: Wanted) -> tuple[Partial, Tensor]:
    """The partial of every row, and the logit of every pair's target.  Wants R > 0.

    Workspace: a few blocks of logits.
    """
    R = logits.shape[0]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    step = _rows_at_once(read, logits)
    chosen = logits.new_full(pairs.target.shape, float("nan"), dtype=dtype)
    found = []
    for i, span in enumerate(pairs.spans(R, step)):
        rows = slice(i * step, min((i + 1) * step, R))
        part: Partial | None = None
        for columns, masked in _segments(read, logits):
            z = _logits(logits[rows, columns], read, masked, dtype)
            column = pairs.target[span] - columns.start
            here = (column >= 0) & (column < z.shape[1])
            logit = z[pairs.row[span] - rows.start, column.clamp(0, z.shape[1] - 1)]
            chosen[span] = torch.where(here, logit, chosen[span])
            right = partial(z, columns.start, wanted)
            part = right if part is None else merge(part, right, wanted.renyi_order)
        assert part is not None
        found.append(part)
    return stack(found), chosen


def backward(grads: Tensor, state: Tensor, logits: Tensor, read: Read, pairs: Pairs) -> Tensor:
    """Gradient of the logits [R, width]; `grads` [4, S] in the order of the pairs.  Wants R > 0."""
    R = logits.shape[0]
    row = pairs.row.clamp(0, R - 1)
    active = _per_row((grads != 0).any(dim=0).to(state.dtype)[None], row, R)[0] > 0
    of_logprob, of_lse, of_entropy, certain = _per_row(grads, row, R)[:, :, None]
    top, log_mass, entropy, n_valid = state[:, :, None]
    prob = of_lse + certain - of_logprob
    uniform = certain / n_valid.clamp(min=1)
    has_entropy, has_certainty = bool(grads[2].any()), bool(grads[3].any())
    # elsewhere p = 0 already makes the gradient of a masked column 0
    has_dead = has_certainty or read.softcap is not None or not bool(active.all())
    dlogits = logits.new_zeros(logits.shape)
    step = _rows_at_once(read, logits)
    for i, span in enumerate(pairs.spans(R, step)):
        rows = slice(i * step, min((i + 1) * step, R))
        for columns, masked in _segments(read, logits):
            z = _logits(logits[rows, columns], read, masked, state.dtype)
            column = pairs.target[span] - columns.start
            here = (column >= 0) & (column < z.shape[1])
            index = (row[span] - rows.start) * z.shape[1] + column.clamp(0, z.shape[1] - 1)
            here &= z.view(-1)[index] > float("-inf")
            dead = slope = None
            if has_dead:
                dead = (z == float("-inf")) | ~active[rows, None]
            if read.softcap is not None:
                slope = 1 - (z * (read.temperature / read.softcap)).square_()
            log_p = z.sub_(finite_shift(top[rows])).sub_(log_mass[rows])
            p = log_p.exp() if has_entropy else log_p.exp_()
            dz = p * prob[rows] if has_entropy else p.mul_(prob[rows])
            if has_entropy:
                # dH / dz = -p (log p + H), 0 in a masked column, where log p = -inf
                log_p.clamp_(min=torch.finfo(z.dtype).min).add_(entropy[rows])
                dz -= p.mul_(log_p).mul_(of_entropy[rows])
            if has_certainty:
                dz -= uniform[rows]
            _add_at(dz.view(-1), index, torch.where(here, grads[0, span], 0.0))
            if slope is not None:
                dz *= slope
            if read.temperature != 1.0:
                dz /= read.temperature
            dlogits[rows, columns] = dz if dead is None else dz.masked_fill_(dead, 0.0)
    return dlogits


def _add_at(out: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """`out[index] += value` for 1-D tensors; repeated indices are summed in a fixed order."""
    if out.is_cuda:
        # index_add_ there is atomic; this sorts first
        return out.index_put_((index,), value, accumulate=True)
    return out.index_add_(0, index, value)


def _per_row(x: Tensor, row: Tensor, R: int) -> Tensor:
    """Sums [K, R] of `x` [K, S] over the pairs of each row."""
    return torch.stack([_add_at(x.new_zeros(R), row, each) for each in x])
