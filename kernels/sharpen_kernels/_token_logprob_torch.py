"""`token_logprob` and its gradient in PyTorch, on any device, in bounded memory.

Rows are taken in blocks and columns in segments, so that a block of fp32 logits stays in a core's
cache while it is looked at several times: each logit is read from memory once. Each segment leaves
a `Part`, and parts are merged from the first column to the last.

R rows of logits, S (row, target) pairs, V vocabulary.  Segments are short enough for PyTorch to
sum a row in one thread: a row has the same bits in any batch (it is their sum; tests watch it).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ._logits import LogitRows, Read
from ._rows import Pairs, finite_shift

# elements, measured by bench/token_logprob.py: 1 MiB of fp32 logits at a time on a CPU
SEGMENT = 2**14
BLOCK_ELEMENTS = 2**18
CUDA_BLOCK_ELEMENTS = 2**24
# exp of it is 0 in fp32 and fp64; what it scales must be 0 as well, whatever the power of the gap
FAR = -1e3


class Part(NamedTuple):
    """Statistics of some columns of R rows, each [R]; `None` where not asked for."""

    top: Tensor  # maximum of z, -inf where every column is masked
    mass: Tensor  # sum of e = exp(z - top)
    spread: Tensor | None = None  # sum of e (z - top)
    square: Tensor | None = None  # sum of e (z - top - spread / mass)^2
    squares: Tensor | None = None  # sum of e^2
    total: Tensor | None = None  # sum of z - top over the unmasked columns
    n_valid: Tensor | None = None  # number of unmasked columns, as a float
    column: Tensor | None = None  # int64 column of the maximum, the lowest of a tie
    second: Tensor | None = None  # the largest z but for that column


def _mean(spread: Tensor, mass: Tensor) -> Tensor:
    return spread / mass.masked_fill(mass == 0, 1.0)


def _part(z: Tensor, start: int, stats: frozenset[str]) -> Part:
    """Statistics of logits [B, v] whose first column is `start`; may overwrite them."""
    column = second = total = n_valid = spread = square = squares = None
    if stats & {"top1", "is_greedy", "margin"}:
        # documented: of equal maxima, the first
        top, at = z.max(dim=1)
        column = at + start
        if "margin" in stats:
            second = z.scatter(1, at[:, None], float("-inf")).amax(dim=1)
    else:
        top = z.amax(dim=1)
    centred = stats & {"entropy", "varentropy", "self_certainty"}
    masked = None
    # masks are slow on a CPU, and rare; a GPU would have to wait for the answer
    if centred and (z.is_cuda or z.amin(1).isneginf().any()):
        masked = z == float("-inf")
    z -= finite_shift(top)[:, None]
    e = z.exp() if centred else z.exp_()
    mass = e.sum(dim=1)
    if centred and masked is not None:
        # a masked column adds 0; 0 * -inf would add nan
        z.masked_fill_(masked, 0.0)
    if "self_certainty" in stats:
        total = z.sum(dim=1)
        n_valid = torch.full_like(top, z.shape[1])
        n_valid = n_valid if masked is None else n_valid - masked.sum(dim=1)
    if stats & {"entropy", "varentropy"}:
        spread = (e * z).sum(dim=1)
    if "varentropy" in stats and spread is not None:
        z -= _mean(spread, mass)[:, None]
        square = (e * z).mul_(z).sum(dim=1)
    if "sum_p2" in stats:
        squares = e.square_().sum(dim=1)
    return Part(top, mass, spread, square, squares, total, n_valid, column, second)


def _moved(part: Part, shift: Tensor) -> Part:
    """`part` with its sums centred on `shift` instead of on its own top."""
    gap = torch.where(part.top == float("-inf"), 0.0, part.top - shift)
    near = gap.clamp(min=FAR)
    scale = near.exp()
    moved: dict[str, Tensor] = {"mass": scale * part.mass}
    if part.spread is not None:
        moved["spread"] = scale * (part.spread + part.mass * near)
    if part.square is not None:
        moved["square"] = scale * part.square
    if part.squares is not None:
        moved["squares"] = scale * scale * part.squares
    if part.total is not None:
        assert part.n_valid is not None
        moved["total"] = part.total + part.n_valid * gap
    return part._replace(**moved)


def merge(left: Part, right: Part) -> Part:
    """The part of two neighbouring runs of columns, `left` the lower ones."""
    top = torch.maximum(left.top, right.top)
    a, b = (_moved(part, finite_shift(top)) for part in (left, right))
    summed = ("mass", "spread", "square", "squares", "total", "n_valid")
    both = {
        name: getattr(a, name) + getattr(b, name) for name in summed if getattr(a, name) is not None
    }
    if a.square is not None and a.spread is not None and b.spread is not None:
        # Chan et al. 1979: squares about two means become squares about the common one
        apart = _mean(b.spread, b.mass) - _mean(a.spread, a.mass)
        share = a.mass * _mean(b.mass, both["mass"])
        both["square"] = both["square"] + share * apart.square()
    if left.column is not None and right.column is not None:
        both["column"] = torch.where(right.top > left.top, right.column, left.column)
    if left.second is not None and right.second is not None:
        loser = torch.minimum(left.top, right.top)
        both["second"] = torch.maximum(loser, torch.maximum(left.second, right.second))
    return Part(top, **both)


def finish(part: Part) -> LogitRows:
    """Statistics of rows whose every column is in `part`."""
    log_mass = part.mass.log()
    found: dict[str, Tensor] = {}
    has_value = log_mass.isfinite()
    if part.spread is not None:
        found["entropy"] = log_mass - part.spread / part.mass
    if part.total is not None and part.n_valid is not None:
        found["n_valid"] = part.n_valid
        found["self_certainty"] = log_mass - part.total / part.n_valid - part.n_valid.log()
    if part.square is not None:
        found["varentropy"] = part.square / part.mass
    if part.squares is not None:
        found["sum_p2"] = part.squares / part.mass / part.mass
    if part.column is not None:
        found["top1"] = part.column.masked_fill(~has_value, -1)
    if part.second is not None:
        found["margin"] = (part.top - part.second).masked_fill(~has_value, float("nan"))
    return LogitRows(part.top, log_mass, **found)


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


def _ranks(logits: Tensor, read: Read, pairs: Pairs, chosen: Tensor) -> Tensor:
    """1 + the unmasked columns ahead of each pair's target [S]; any number for a pair outside."""
    S, dtype = pairs.row.shape[0], chosen.dtype
    rank = torch.ones_like(pairs.row)
    step = _rows_at_once(read, logits)
    for i in range(0, S, step):
        span = slice(i, min(i + step, S))
        row = pairs.row[span].clamp(0, logits.shape[0] - 1)
        target, own = pairs.target[span, None], chosen[span, None]
        for columns, masked in _segments(read, logits):
            z = _logits(logits[row, columns], read, masked, dtype)
            column = torch.arange(columns.start, columns.stop, device=z.device)
            ahead = (z > own) | ((z == own) & (column < target))
            rank[span] += (ahead & (z > float("-inf"))).sum(dim=1)
    return rank


def forward(
    logits: Tensor, read: Read, pairs: Pairs, stats: list[str]
) -> tuple[LogitRows, Tensor, Tensor | None]:
    """Statistics of every row; logit and (if asked) rank of every pair's target.  Wants R > 0.

    Workspace: a few blocks of logits.
    """
    R = logits.shape[0]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    step = _rows_at_once(read, logits)
    chosen = logits.new_full(pairs.target.shape, float("nan"), dtype=dtype)
    wanted = frozenset(stats)
    found = []
    for i, span in enumerate(pairs.spans(R, step)):
        rows = slice(i * step, min((i + 1) * step, R))
        part: Part | None = None
        for columns, masked in _segments(read, logits):
            z = _logits(logits[rows, columns], read, masked, dtype)
            column = pairs.target[span] - columns.start
            here = (column >= 0) & (column < z.shape[1])
            logit = z[pairs.row[span] - rows.start, column.clamp(0, z.shape[1] - 1)]
            chosen[span] = torch.where(here, logit, chosen[span])
            right = _part(z, columns.start, wanted)
            part = right if part is None else merge(part, right)
        assert part is not None
        found.append(finish(part))
    fields = zip(*found, strict=True)
    rows = LogitRows._make(None if x[0] is None else torch.cat(x) for x in fields)
    return rows, chosen, _ranks(logits, read, pairs, chosen) if "rank" in stats else None


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
