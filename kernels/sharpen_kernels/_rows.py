"""The state that a row of logits leaves behind, and its merge law: each formula once.

A row's vocabulary is cut into fixed segments; each leaves a `Partial`, and partials are merged
from the first column to the last, so that a row's bits do not depend on its batch.
Exponentials are centred on the running maximum: exact for logits of any offset, entropy >= 0.

R rows, V vocabulary, k the best columns of a row that are kept.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .stats import Wanted

# exp of it is 0 in fp32 and fp64; what it scales must be 0 as well, whatever the power of the gap
FAR = -1e3


class Partial(NamedTuple):
    """Statistics of some columns of R rows, [R] each; `None` where not asked for."""

    top: Tensor  # maximum of z, -inf where every column is masked
    mass: Tensor  # sum of e = exp(z - top)
    spread: Tensor | None = None  # sum of e (z - top)
    square: Tensor | None = None  # sum of e (z - top - spread / mass)^2
    squares: Tensor | None = None  # sum of e^2
    powers: Tensor | None = None  # sum of exp(a (z - top)), a the order of `renyi`
    total: Tensor | None = None  # sum of z - top over the unmasked columns
    n_valid: Tensor | None = None  # number of unmasked columns, as a float
    column: Tensor | None = None  # int64 column of the maximum, the lowest of a tie
    second: Tensor | None = None  # the largest z but for that column
    best: Tensor | None = None  # [R, k] largest z, falling; -inf past the unmasked columns
    best_column: Tensor | None = None  # [R, k] int64 their columns, lowest first of a tie


class Rows(NamedTuple):
    """Finished statistics of R rows; `None` where not asked for.  lse = top + log_mass."""

    top: Tensor
    log_mass: Tensor  # NaN where the row holds a NaN
    entropy: Tensor | None = None
    self_certainty: Tensor | None = None
    n_valid: Tensor | None = None
    varentropy: Tensor | None = None
    sum_p2: Tensor | None = None
    renyi: Tensor | None = None
    top1: Tensor | None = None  # int64, -1 where there is none
    margin: Tensor | None = None
    topk: Tensor | None = None  # [R, k]
    topk_id: Tensor | None = None  # [R, k] int64, -1 where there is none
    topk_mean: Tensor | None = None

    def state(self) -> Tensor:
        """What backward reads [4, R]: top, log_mass, entropy, n_valid; 0 where not computed."""
        zero = torch.zeros_like(self.top)
        kept = (self.top, self.log_mass, self.entropy, self.n_valid)
        return torch.stack([zero if x is None else x for x in kept])


def finite_shift(top: Tensor) -> Tensor:
    """What to subtract from logits: their maximum, or 0 where all are masked (-inf - -inf)."""
    return torch.where(top == float("-inf"), 0.0, top)


def _mean(spread: Tensor, mass: Tensor) -> Tensor:
    return spread / mass.masked_fill(mass == 0, 1.0)


def partial(z: Tensor, start: int, wanted: Wanted) -> Partial:
    """The partial of logits [B, v] whose first column is `start`; may overwrite them."""
    fields = wanted.fields
    found: dict[str, Tensor] = {}
    if "best" in fields:
        best, at = largest(z, wanted.k)
        found |= {"best": best, "best_column": at + start}
    if "column" in fields:
        # documented: of equal maxima, the first
        top, at = z.max(dim=1)
        found["column"] = at + start
        if "second" in fields:
            found["second"] = z.scatter(1, at[:, None], float("-inf")).amax(dim=1)
    else:
        top = z.amax(dim=1)
    centred = fields & {"spread", "total", "powers"}
    masked = None
    # masks are slow on a CPU, and rare; a GPU would have to wait for the answer
    if centred and (z.is_cuda or z.amin(1).isneginf().any()):
        masked = z == float("-inf")
    z -= finite_shift(top)[:, None]
    if "powers" in fields:
        found["powers"] = (wanted.renyi_order * z).exp_().sum(dim=1)
    e = z.exp() if centred else z.exp_()
    mass = e.sum(dim=1)
    if centred and masked is not None:
        # a masked column adds 0; 0 * -inf would add nan
        z.masked_fill_(masked, 0.0)
    if "total" in fields:
        found["total"] = z.sum(dim=1)
        n_valid = torch.full_like(top, z.shape[1])
        found["n_valid"] = n_valid if masked is None else n_valid - masked.sum(dim=1)
    if "spread" in fields:
        spread = found["spread"] = (e * z).sum(dim=1)
        if "square" in fields:
            z -= _mean(spread, mass)[:, None]
            found["square"] = (e * z).mul_(z).sum(dim=1)
    if "squares" in fields:
        found["squares"] = e.square_().sum(dim=1)
    return Partial(top, mass, **found)


def largest(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of `z` [B, v], falling, and their columns, lowest first of a tie.

    Where v < k the rest is -inf, of any column.
    """
    n = min(k, z.shape[1])
    if z.dtype == torch.float64:
        values, column = z.sort(dim=1, descending=True, stable=True)
        values, column = values[:, :n], column[:, :n]
    else:
        # topk leaves ties open: rank by (value, -column) in one integer; + 0 makes 0 of -0
        bits = (z + 0.0).view(torch.int32)
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        last = 2**31 - 1
        key = (ordered.long() << 32) + (last - torch.arange(z.shape[1], device=z.device))
        column = last - (key.topk(n, dim=1).values & 0xFFFFFFFF)
        values = z.gather(1, column)
    pad = (0, k - n)
    return (
        torch.nn.functional.pad(values, pad, value=float("-inf")),
        torch.nn.functional.pad(column, pad),
    )


def _moved(part: Partial, shift: Tensor, order: float) -> Partial:
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
    if part.powers is not None:
        moved["powers"] = (order * gap).exp() * part.powers
    if part.total is not None:
        assert part.n_valid is not None
        moved["total"] = part.total + part.n_valid * gap
    return part._replace(**moved)


def merge(left: Partial, right: Partial, order: float = 2.0) -> Partial:
    """The partial of two neighbouring runs of columns, `left` the lower ones.

    `order` is the a of `renyi`.
    """
    top = torch.maximum(left.top, right.top)
    a, b = (_moved(part, finite_shift(top), order) for part in (left, right))
    summed = ("mass", "spread", "square", "squares", "powers", "total", "n_valid")
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
    if left.best is not None and right.best is not None:
        assert left.best_column is not None
        assert right.best_column is not None
        # stable: of a tie the left one stays first
        best, at = torch.cat([left.best, right.best], dim=1).sort(
            dim=1, descending=True, stable=True
        )
        k = left.best.shape[1]
        both["best"] = best[:, :k]
        columns = torch.cat([left.best_column, right.best_column], dim=1)
        both["best_column"] = columns.gather(1, at[:, :k])
    return Partial(top, **both)


def finish(part: Partial, order: float = 2.0) -> Rows:
    """Statistics of rows whose every column is in `part`; `order` is the a of `renyi`."""
    log_mass = part.mass.log()
    found: dict[str, Tensor] = {}
    nothing = ~log_mass.isfinite()
    if part.spread is not None:
        found["entropy"] = log_mass - part.spread / part.mass
    if part.total is not None and part.n_valid is not None:
        found["n_valid"] = part.n_valid
        found["self_certainty"] = log_mass - part.total / part.n_valid - part.n_valid.log()
    if part.square is not None:
        found["varentropy"] = part.square / part.mass
    if part.squares is not None:
        found["sum_p2"] = part.squares / part.mass / part.mass
    if part.powers is not None:
        found["renyi"] = (part.powers.log() - order * log_mass).exp()
    if part.column is not None:
        found["top1"] = part.column.masked_fill(nothing, -1)
    if part.second is not None:
        found["margin"] = (part.top - part.second).masked_fill(nothing, float("nan"))
    if part.best is not None and part.best_column is not None:
        absent = part.best == float("-inf")
        # both terms come from one set of logits: the first is <= 0, the second >= 0
        topk = (part.best - part.top[:, None]) - log_mass[:, None]
        found["topk"] = topk.masked_fill(nothing[:, None], float("nan"))
        found["topk_id"] = part.best_column.masked_fill(absent | nothing[:, None], -1)
        found["topk_mean"] = found["topk"].masked_fill(absent, 0.0).sum(1) / (~absent).sum(1)
    return Rows(part.top, log_mass, **found)


def cut(part: Partial, n: int) -> Partial:
    """The first `n` rows of `part`."""
    return Partial._make(None if x is None else x[:n] for x in part)


def stack(parts: list[Partial]) -> Partial:
    """The rows of `parts`, one after another."""
    fields = zip(*parts, strict=True)
    return Partial._make(None if x[0] is None else torch.cat(x) for x in fields)
