"""The (row, target) pairs, and the values that they read off finished rows.

At a fork of a prefix tree one row predicts several tokens: what a row costs is paid once.
R rows, S (row, target) pairs, V vocabulary.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from ._rows import Rows
from .stats import Wanted


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
