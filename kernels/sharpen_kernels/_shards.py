"""One shard of a head: the rows it holds, and what it reads off them for every row and pair.

R hidden rows, S (row, target) pairs.  A shard is read by the same route as a whole head, its
targets shifted to its own columns; its segments begin anew at its first row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._launch import exact_matmul
from ._linear_logprob_chunk import Head
from ._pairs import Pairs
from ._rows import Partial
from .linear_logprob import _route, _wide
from .stats import DIFFERENTIABLE, Wanted

COLUMNS = {"column", "best_column"}  # the fields of a `Partial` that are ids


class Call(NamedTuple):
    """What all shards of one call have in common."""

    target: Tensor  # [S] int64
    rows: Tensor | None  # [S] int64
    n_rows: int  # R
    vocab_size: int
    ignore_index: int
    wanted: Wanted

    def pairs(self) -> Pairs:
        """The pairs, their targets columns of the whole head."""
        return Pairs.of(self.target, self.rows, self.n_rows)


class Shard(NamedTuple):
    """Rows start, start + 1, ... of a head; those past the vocabulary are padding."""

    start: int
    head: Head  # its `vocab_size` counts the columns of this shard that are in the vocabulary

    @classmethod
    def of(cls, start: int, vocab_size: int, weight: Tensor, *rest) -> "Shard":
        """The shard of `weight`; `rest` is (bias, vocab_mask, temperature, softcap)."""
        bias, vocab_mask, temperature, softcap = rest
        n_columns = max(0, min(weight.shape[0], vocab_size - start))
        return cls(start, Head(weight, bias, temperature, softcap, n_columns, vocab_mask))

    def local(self, pairs: Pairs) -> Pairs:
        """`pairs` with targets as columns of this shard: -1 left of it, its width right of it."""
        low, high = self.start - 1, self.start + self.head.vocab_size
        return pairs._replace(target=pairs.target.clamp(low, high) - self.start)

    @property
    def stop(self) -> int:
        """One past its last row, padding included."""
        return self.start + self.head.weight.shape[0]

    def read(self, hidden: Tensor, call: Call) -> tuple[Partial, Tensor]:
        """The partial of each row, and the logit of each pair's target [S], NaN if not here."""
        dtype = _wide(hidden, self.head.weight)
        pairs = call.pairs()
        if self.head.vocab_size == 0 or 0 in (call.n_rows, call.target.shape[0]):
            state = _no_columns(call.wanted, call.n_rows, hidden, dtype)
            chosen = hidden.new_full(call.target.shape, float("nan"), dtype=dtype)
        else:
            with exact_matmul(hidden.device):
                state, chosen = _route(hidden, self.head).forward(
                    hidden, self.head, self.local(pairs), call.wanted
                )
        found = {name: getattr(state, name) for name in call.wanted.fields}
        columns = {name: found[name] + self.start for name in COLUMNS & found.keys()}
        return Partial(state.top, state.mass, **found | columns), pairs.unsort(chosen)

    def ahead(self, hidden: Tensor, call: Call, chosen: Tensor) -> Tensor:
        """Unmasked columns of this shard ahead of each pair's target [S] int64.

        `chosen` [S] are the targets' logits, from the shard that has each.
        """
        if self.head.vocab_size == 0 or 0 in (call.n_rows, call.target.shape[0]):
            return torch.zeros_like(call.target)
        pairs = call.pairs()
        chosen = pairs.sort(chosen[None])[0]
        with exact_matmul(hidden.device):
            found = _route(hidden, self.head).ranks(hidden, self.head, self.local(pairs), chosen)
        return pairs.unsort(found)

    def backward(
        self, dvalues: Tensor, state: Tensor, hidden: Tensor, call: Call, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What the shard adds to the gradient of hidden, and its gradients of weight and bias.

        `dvalues` [K, S] are those of the statistics of one float a token, `state` [4, R] that of
        rows of the whole head. The first is in the dtype of the sums, to be summed over shards.
        """
        pairs = call.pairs()
        counts, _ = pairs.counted(call.n_rows, call.vocab_size, call.ignore_index)
        dvalues = torch.where(counts, pairs.sort(dvalues.to(state.dtype)), 0.0)
        named = zip(call.wanted.numbers, dvalues, strict=True)
        grads = {name: g for name, g in named if name in DIFFERENTIABLE}
        if self.head.vocab_size == 0 or 0 in (call.n_rows, call.target.shape[0]) or not grads:
            dhidden = hidden.new_zeros(hidden.shape, dtype=state.dtype)
            leaves = dhidden, self.head.weight, self.head.bias
            zeros = (torch.zeros_like(x) if x is not None else None for x in leaves)
            dhidden, dweight, dbias = (x if n else None for x, n in zip(zeros, needs, strict=True))
            return dhidden, dweight, dbias
        with exact_matmul(hidden.device):
            return _route(hidden, self.head).backward(
                grads, state, hidden, self.head, self.local(pairs), needs
            )


def _no_columns(wanted: Wanted, R: int, like: Tensor, dtype: torch.dtype) -> Partial:
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
