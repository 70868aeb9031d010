"""The state that a row of logits leaves behind, its merge law, and the pairs that read it.

A row's vocabulary is cut into fixed segments; each leaves a `Partial`, and partials are merged
from the first column to the last, so that a row's bits do not depend on its batch.
Exponentials are centred on the running maximum: exact for logits of any offset, entropy >= 0.
The mean is merged as a mean (Chan et al. 1979), not as a sum: its error does not grow with V.

R hidden rows, S (row, target) pairs, V vocabulary.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """Statistics of some columns of R rows; `None` where not asked for."""

    top: Tensor  # [R] maximum of z, -inf where every column is masked
    mass: Tensor  # [R] sum of exp(z - top)
    spread: Tensor | None  # [R] sum of exp(z - top) (z - top)
    mean: Tensor | None  # [R] mean of z over the unmasked columns, 0 where there is none
    n_valid: Tensor | None  # [R] number of unmasked columns, as a float
    greedy: Tensor | None  # [R] int64 column of the maximum, the lowest of a tie


class Rows(NamedTuple):
    """Finished statistics of R rows; `None` where not asked for.  lse = top + log_mass."""

    top: Tensor
    log_mass: Tensor
    entropy: Tensor | None
    self_certainty: Tensor | None
    n_valid: Tensor | None
    greedy: Tensor | None


def finite_shift(top: Tensor) -> Tensor:
    """What to subtract from logits: their maximum, or 0 where all are masked (-inf - -inf)."""
    return torch.where(top == float("-inf"), 0.0, top)


def merge(left: Partial, right: Partial) -> Partial:
    """The partial of two neighbouring runs of columns, `left` the lower ones."""
    top = torch.maximum(left.top, right.top)
    shift = finite_shift(top)
    # an empty side is 0 in every sum; a finite gap keeps 0 * gap from being nan
    lowest = torch.finfo(top.dtype).min
    gap_left = (left.top - shift).clamp(min=lowest)
    gap_right = (right.top - shift).clamp(min=lowest)
    scale_left, scale_right = gap_left.exp(), gap_right.exp()
    spread = mean = n_valid = greedy = None
    if left.spread is not None and right.spread is not None:
        spread = scale_left * (left.spread + left.mass * gap_left)
        spread += scale_right * (right.spread + right.mass * gap_right)
    if left.mean is not None and right.mean is not None:
        assert left.n_valid is not None
        assert right.n_valid is not None
        n_valid = left.n_valid + right.n_valid
        mean = left.mean + (right.mean - left.mean) * (right.n_valid / n_valid.clamp(min=1))
    if left.greedy is not None and right.greedy is not None:
        greedy = torch.where(right.top > left.top, right.greedy, left.greedy)
    mass = left.mass * scale_left + right.mass * scale_right
    return Partial(top, mass, spread, mean, n_valid, greedy)


def finish(part: Partial) -> Rows:
    """Statistics of rows whose every column is in `part`."""
    log_mass = part.mass.log()
    entropy = self_certainty = None
    if part.spread is not None:
        entropy = log_mass - part.spread / part.mass
    if part.mean is not None:
        assert part.n_valid is not None
        self_certainty = (part.top - part.mean) - part.n_valid.log() + log_mass
    return Rows(part.top, log_mass, entropy, self_certainty, part.n_valid, part.greedy)


class Pairs(NamedTuple):
    """The (row, target) pairs, sorted by row; the pairs of row r are first[r] ... first[r + 1]."""

    row: Tensor  # [S] int64
    target: Tensor  # [S] int64
    first: Tensor  # [R + 1] int64
    order: Tensor | None  # [S] int64: where each pair stood; None if it has not moved

    @classmethod
    def of(cls, target: Tensor, rows: Tensor | None, R: int) -> "Pairs":
        """Pairs of `target` with `rows`, or with every row in turn where `rows` is None."""
        bounds = torch.arange(R + 1, device=target.device)
        if rows is None:
            return cls(bounds[:R], target, bounds, None)
        row, order = rows.sort(stable=True)
        return cls(row, target[order], torch.searchsorted(row, bounds), order)

    def spans(self, R: int, step: int) -> list[slice]:
        """Which pairs belong to each block of `step` rows.  Waits for the device if they moved."""
        starts = [*range(0, R, step), R]
        edges = starts if self.order is None else self.first[starts].tolist()
        return [slice(a, b) for a, b in itertools.pairwise(edges)]

    def sort(self, x: Tensor) -> Tensor:
        """`x` [K, S], given in the caller's order, in that of the pairs."""
        return x if self.order is None else x[:, self.order]

    def unsort(self, x: Tensor) -> Tensor:
        """`x` [K, S], given in the order of the pairs, in that of the caller."""
        if self.order is None:
            return x
        out = torch.empty_like(x)
        out[:, self.order] = x
        return out

    def counted(self, R: int, V: int, ignore_index: int) -> tuple[Tensor, Tensor]:
        """Which pairs [S] are inside the rows and the vocabulary, and which are ignored."""
        ignored = self.target == ignore_index
        inside = (self.target >= 0) & (self.target < V) & (self.row >= 0) & (self.row < R)
        return inside & ~ignored, ignored


def token_values(
    stats: list[str], rows: Rows, chosen: Tensor, pairs: Pairs, V: int, ignore_index: int
) -> Tensor:
    """Values [K, S] of the asked statistics; `chosen` [S] is the target's logit, pairs' order."""
    R = rows.top.shape[0]

    def of_pair(x: Tensor | None) -> Tensor:
        assert x is not None
        return x if pairs.order is None else x[pairs.row.clamp(0, R - 1)]

    values = []
    for name in stats:
        if name == "logprob":
            # both terms come from one set of logits: the first is <= 0, the second >= 0
            value = (chosen - of_pair(rows.top)) - of_pair(rows.log_mass)
        elif name == "lse":
            value = of_pair(rows.top + rows.log_mass)
        elif name == "is_greedy":
            value = (of_pair(rows.greedy) == pairs.target).to(chosen.dtype)
            value = value.masked_fill(~of_pair(rows.log_mass).isfinite(), float("nan"))
        else:
            value = of_pair(getattr(rows, name))
        values.append(value)
    inside, ignored = pairs.counted(R, V, ignore_index)
    out = torch.stack(values).masked_fill(~inside, float("nan")).masked_fill(ignored, 0.0)
    return pairs.unsort(out)
