"""The state that a row of logits leaves behind, how two states merge, what a pair reads off them.

The vocabulary of a row is cut into fixed segments. Each leaves a `Partial`, and the partials are
merged from the first column to the last, so that a row's bits do not depend on its batch.
Exponentials are centred on the running maximum: exact for logits of any offset, entropy >= 0.

In this order: the state and its merge (each formula once), finished rows, the (row, target) pairs,
the values an op returns. At a fork of a prefix tree one row predicts several tokens: what a row
costs is paid once.

R rows, S (row, target) pairs, V vocabulary, k the best columns of a row that are kept.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from .stats import Wanted

# exp of it is 0 in fp32 and fp64; what it scales must be 0 as well, whatever the power of the gap
FAR = -1e3
COLUMNS = frozenset(("column", "best_column"))  # the fields of a `Partial` that are ids


class Partial(NamedTuple):
    """Statistics of some columns of R rows, [R] each; `None` where not asked for."""

    top: Tensor  # maximum of z, -inf where every column is masked
    mass: Tensor  # sum of e = exp(z - top)
    sum_ez: Tensor | None = None  # sum of e (z - top)
    m2: Tensor | None = None  # sum of e (z - top - sum_ez / mass)^2
    sum_e2: Tensor | None = None  # sum of e^2
    sum_pow: Tensor | None = None  # sum of exp(a (z - top)), a the order of `renyi`
    sum_z: Tensor | None = None  # sum of z - top over the unmasked columns
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


def _mean(sum_ez: Tensor, mass: Tensor) -> Tensor:
    return sum_ez / mass.masked_fill(mass == 0, 1.0)


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
    centred = fields & {"sum_ez", "sum_z", "sum_pow"}
    masked = None
    # masks are slow on a CPU, and rare; a GPU would have to wait for the answer
    if centred and (z.is_cuda or z.amin(1).isneginf().any()):
        masked = z == float("-inf")
    z -= finite_shift(top)[:, None]
    if "sum_pow" in fields:
        found["sum_pow"] = (wanted.renyi_order * z).exp_().sum(dim=1)
    e = z.exp() if centred else z.exp_()
    mass = e.sum(dim=1)
    if centred and masked is not None:
        # a masked column adds 0; 0 * -inf would add nan
        z.masked_fill_(masked, 0.0)
    if "sum_z" in fields:
        found["sum_z"] = z.sum(dim=1)
        n_valid = torch.full_like(top, z.shape[1])
        found["n_valid"] = n_valid if masked is None else n_valid - masked.sum(dim=1)
    if "sum_ez" in fields:
        sum_ez = found["sum_ez"] = (e * z).sum(dim=1)
        if "m2" in fields:
            z -= _mean(sum_ez, mass)[:, None]
            found["m2"] = (e * z).mul_(z).sum(dim=1)
    if "sum_e2" in fields:
        found["sum_e2"] = e.square_().sum(dim=1)
    return Partial(top, mass, **found)


def no_columns(wanted: Wanted, R: int, like: Tensor, dtype: torch.dtype) -> Partial:
    """The partial of no column at all: merged with another, it leaves that as it is."""
    low = like.new_full((R,), float("-inf"), dtype=dtype)
    best = like.new_full((R, wanted.k), float("-inf"), dtype=dtype)
    zero, ids = torch.zeros_like(low), torch.zeros_like(low, dtype=torch.int64)
    special = {
        "column": ids,
        "second": low,
        "best": best,
        "best_column": torch.zeros_like(best, dtype=torch.int64),
    }
    return Partial(low, zero, **{name: special.get(name, zero) for name in wanted.fields})


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
    if part.sum_ez is not None:
        moved["sum_ez"] = scale * (part.sum_ez + part.mass * near)
    if part.m2 is not None:
        moved["m2"] = scale * part.m2
    if part.sum_e2 is not None:
        moved["sum_e2"] = scale * scale * part.sum_e2
    if part.sum_pow is not None:
        moved["sum_pow"] = (order * gap).exp() * part.sum_pow
    if part.sum_z is not None:
        assert part.n_valid is not None
        moved["sum_z"] = part.sum_z + part.n_valid * gap
    return part._replace(**moved)


def merge(left: Partial, right: Partial, order: float = 2.0) -> Partial:
    """The partial of two neighbouring runs of columns, `left` the lower ones.

    `order` is the a of `renyi`.
    """
    top = torch.maximum(left.top, right.top)
    a, b = (_moved(part, finite_shift(top), order) for part in (left, right))
    summed = ("mass", "sum_ez", "m2", "sum_e2", "sum_pow", "sum_z", "n_valid")
    both = {
        name: getattr(a, name) + getattr(b, name) for name in summed if getattr(a, name) is not None
    }
    if a.m2 is not None and a.sum_ez is not None and b.sum_ez is not None:
        # Chan et al. 1979: squares about two means become squares about the common one
        apart = _mean(b.sum_ez, b.mass) - _mean(a.sum_ez, a.mass)
        share = a.mass * _mean(b.mass, both["mass"])
        both["m2"] = both["m2"] + share * apart.square()
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
    if part.sum_ez is not None:
        found["entropy"] = log_mass - part.sum_ez / part.mass
    if part.sum_z is not None and part.n_valid is not None:
        found["n_valid"] = part.n_valid
        found["self_certainty"] = log_mass - part.sum_z / part.n_valid - part.n_valid.log()
    if part.m2 is not None:
        found["varentropy"] = part.m2 / part.mass
    if part.sum_e2 is not None:
        found["sum_p2"] = part.sum_e2 / part.mass / part.mass
    if part.sum_pow is not None:
        found["renyi"] = (part.sum_pow.log() - order * log_mass).exp()
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
            # kernels walk the targets by their addresses
            return cls(bounds[:R], target.contiguous(), bounds, None)
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
        """`x` [S, ...], given in the order of the pairs, in that of the caller."""
        if self.order is None:
            return x
        out = torch.empty_like(x)
        out[self.order] = x
        return out

    def counted(self, R: int, V: int, ignore_index: int) -> tuple[Tensor, Tensor]:
        """Which pairs [S] are inside the rows and the vocabulary, and which are ignored."""
        ignored = self.target == ignore_index
        inside = (self.target >= 0) & (self.target < V) & (self.row >= 0) & (self.row < R)
        return inside & ~ignored, ignored


class Values(NamedTuple):
    """What an op returns, in the caller's order; tensors of 0 elements where not asked for."""

    numbers: Tensor  # [K, S] the statistics of one float a token, in the order asked for
    top1: Tensor  # [S] int64
    topk: Tensor  # [S, k]
    topk_id: Tensor  # [S, k] int64

    @classmethod
    def empty(cls, wanted: Wanted, S: int, like: Tensor, dtype: torch.dtype) -> "Values":
        """Unwritten values: shapes and dtypes alone."""
        ids = torch.int64
        k = wanted.k
        return cls(
            like.new_empty((len(wanted.numbers), S), dtype=dtype),
            like.new_empty(S if "top1" in wanted.names else 0, dtype=ids),
            like.new_empty((S, k) if "topk" in wanted.names else (0, k), dtype=dtype),
            like.new_empty((S, k) if "topk_id" in wanted.names else (0, k), dtype=ids),
        )

    @classmethod
    def of_no_row(
        cls, wanted: Wanted, target: Tensor, ignore_index: int, dtype: torch.dtype
    ) -> "Values":
        """Values of pairs of which none has a row."""
        found = cls.empty(wanted, target.shape[0], target, dtype)
        ignored = target == ignore_index
        for x in (found.numbers, found.topk.T):
            x.fill_(float("nan"))
            x[:, ignored[: x.shape[1]]] = 0.0
        for x in (found.top1, found.topk_id):
            x.fill_(-1)
        return found

    def all(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The fields, as an op returns them."""
        return self.numbers, self.top1, self.topk, self.topk_id

    def by_name(self, wanted: Wanted) -> dict[str, Tensor]:
        """Fields of a `TokenStats`."""
        found = dict(zip(wanted.numbers, self.numbers, strict=True))
        lists = {name: getattr(self, name) for name in ("top1", "topk", "topk_id")}
        return found | {name: x for name, x in lists.items() if name in wanted.names}


def pair_values(
    wanted: Wanted,
    rows: Rows,
    chosen: Tensor,
    rank: Tensor | None,
    pairs: Pairs,
    V: int,
    ignore_index: int,
) -> Values:
    """Values of all pairs; `chosen` and `rank` [S] are of the target, in the order of the pairs."""
    R = rows.top.shape[0]
    row = pairs.row.clamp(0, R - 1)

    def of_pair(x: Tensor | None) -> Tensor:
        assert x is not None
        return x if pairs.order is None else x[row]

    nan = float("nan")
    inside, ignored = pairs.counted(R, V, ignore_index)
    nothing = ~of_pair(rows.log_mass).isfinite()
    values = []
    for name in wanted.numbers:
        if name == "logprob":
            # both terms come from one set of logits: the first is <= 0, the second >= 0
            value = (chosen - of_pair(rows.top)) - of_pair(rows.log_mass)
        elif name == "lse":
            value = of_pair(rows.top + rows.log_mass)
        elif name == "is_greedy":
            value = (of_pair(rows.top1) == pairs.target).to(chosen.dtype).masked_fill(nothing, nan)
        elif name == "rank":
            assert rank is not None
            value = rank.to(chosen.dtype).masked_fill(nothing, nan)
        else:
            value = of_pair(getattr(rows, name))
        values.append(value)
    found = Values.empty(wanted, pairs.target.shape[0], chosen, chosen.dtype)
    if values:
        numbers = torch.stack(values).masked_fill(~inside, nan).masked_fill(ignored, 0.0)
        found = found._replace(numbers=pairs.unsort(numbers.T).T)
    lists = {}
    if "top1" in wanted.names:
        lists["top1"] = of_pair(rows.top1).masked_fill(~inside, -1)
    if "topk" in wanted.names:
        topk = of_pair(rows.topk).masked_fill(~inside[:, None], nan)
        lists["topk"] = topk.masked_fill(ignored[:, None], 0.0)
    if "topk_id" in wanted.names:
        lists["topk_id"] = of_pair(rows.topk_id).masked_fill(~inside[:, None], -1)
    return found._replace(**{name: pairs.unsort(x) for name, x in lists.items()})
