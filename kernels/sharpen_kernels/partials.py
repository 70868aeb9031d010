"""What one shard of a head knows of every row and pair, and the merge of shards.

    z[r] = softcap(hidden[r] W^T + b) / temperature,    W rows start, start + 1, ... of the head

A shard reads its own columns and leaves a `Partial` a row and the target's logit a pair, a few
floats each; neighbours merge by the law of `_rows`. Any transport will do: `pack` is one tensor
of floats. `vocab_parallel` does this over `torch.distributed`, with gradients.

R hidden rows, S (row, target) pairs, V vocabulary, v rows of a shard, D hidden.  A row's bits
depend on where the head is cut, since segments begin anew at each shard, and on nothing else.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from . import _rows
from ._launch import check_device, check_dtype, check_options, check_shape
from ._pairs import Values, pair_values
from ._rows import Partial
from ._shards import Call, Shard
from .linear_logprob import _check_tensors
from .stats import Statistic, TokenStats

# a column is packed as two floats, column // ID_UNIT and column % ID_UNIT: fp32 holds both exactly
ID_UNIT = 2**24


@dataclasses.dataclass(frozen=True, eq=False)
class Partials:
    """What columns start ... stop - 1 of a head know of every row and pair of a call.

    Attributes:
        start: The first column.
        stop: One past the last, padding included.
        state: A few numbers a row, [R] each; columns are those of the whole head.
        chosen: The logit of each pair's target [S], NaN where it is not among these columns.
        call: What the shards of a call have in common.
    """

    start: int
    stop: int
    state: Partial
    chosen: Tensor
    call: Call

    def pack(self) -> Tensor:
        """Everything but the place and the call, in one tensor [n] for any collective to carry.

        fp32, or fp64 where an input is. First the fields of `state` that are set, in the order
        of `Partial`: R values each, R k in `best`; a field of columns is all its
        column // 2^24 and then all its column % 2^24. Last the S values of `chosen`.
        """
        dtype = self.chosen.dtype
        fields = [x for x in self.state if x is not None]
        parts = [
            y for x in fields for y in ((x,) if x.dtype == dtype else (x // ID_UNIT, x % ID_UNIT))
        ]
        return torch.cat([y.reshape(-1).to(dtype) for y in (*parts, self.chosen)])

    def unpack(self, packed: Tensor, start: int, stop: int) -> "Partials":
        """The partials of columns start ... stop - 1 of the same call, from their `pack`.

        Raises:
            ValueError: If `packed` is not as long as a pack of this call.
        """
        fields = [x for x in self.state if x is not None]
        dtype = self.chosen.dtype
        sizes = [n for x in fields for n in [x.numel()] * (1 if x.dtype == dtype else 2)]
        check_shape("packed", packed, n=sum(sizes) + self.chosen.shape[0])
        *parts, chosen = packed.split([*sizes, self.chosen.shape[0]])
        left = iter(parts)
        found: list[Tensor | None] = []
        for x in self.state:
            if x is None or x.dtype == dtype:
                found.append(None if x is None else next(left).view(x.shape))
            else:
                high, low = next(left).long(), next(left).long()
                found.append((high * ID_UNIT + low).view(x.shape))
        return Partials(start, stop, Partial._make(found), chosen, self.call)

    def finish(self, ahead: Int64[Tensor, " S"] | None = None) -> TokenStats:
        """The statistics, once every column is in here; no graph.

        Args:
            ahead: For `rank` alone: the sum of `ranks_ahead` over all shards.

        Raises:
            ValueError: If columns are missing, or `ahead` is for `rank`.
        """
        call = self.call
        if self.start > 0 or self.stop < call.vocab_size:
            raise ValueError(
                f"partials must cover columns 0..{call.vocab_size - 1} to finish, got "
                f"{self.start}..{self.stop - 1}; `merge` those of every shard first."
            )
        if ahead is None and "rank" in call.wanted.names:
            raise ValueError(
                "`ahead` must be a tensor where `rank` is asked for, got None; "
                "add up `ranks_ahead` of every shard."
            )
        return TokenStats.of(self.values(ahead)[0].by_name(call.wanted))

    def values(self, ahead: Tensor | None) -> tuple[Values, Tensor]:
        """The values of all pairs, and what backward needs of each row [4, R]."""
        call = self.call
        rows = _rows.finish(self.state, call.wanted.renyi_order)
        if 0 in (call.n_rows, call.target.shape[0]):
            dtype = self.chosen.dtype
            empty = Values.of_no_row(call.wanted, call.target, call.ignore_index, dtype)
            return empty, rows.state()
        pairs = call.pairs()
        chosen = pairs.sort(self.chosen[None])[0]
        rank = None if ahead is None else pairs.sort(1 + ahead[None])[0]
        asked = call.wanted, rows, chosen, rank, pairs, call.vocab_size, call.ignore_index
        return pair_values(*asked), rows.state()


def partials(
    hidden: Float[Tensor, "R D"],
    weight: Float[Tensor, "v D"],
    target: Int64[Tensor, " S"],
    *,
    start: int,
    vocab_size: int,
    rows: Int64[Tensor, " S"] | None = None,
    bias: Float[Tensor, " v"] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_mask: Bool[Tensor, " v"] | None = None,
    ignore_index: int = -100,
    stats: Sequence[Statistic] = ("logprob",),
    renyi_order: float = 2.0,
    k: int = 20,
) -> Partials:
    """What one shard of a head knows; `merge` and `finish` make statistics of all shards.

    Not differentiable; `vocab_parallel_linear_logprob` is.

    Args:
        hidden: As in `linear_logprob`, the same for every shard; so are `target`, `rows` and all
            options.
        weight: Rows start ... start + v - 1 of the head; v may be 0.
        target: Columns of the whole head.
        start: The place of the first row of `weight` in the head.
        vocab_size: Columns of the whole vocabulary; rows of the head from there on are padding
            and never read. A shard may be all padding.
        rows: As in `linear_logprob`.
        bias: Of this shard.
        temperature: As in `linear_logprob`.
        softcap: As in `linear_logprob`.
        vocab_mask: Of this shard; it may mask it all.
        ignore_index: As in `linear_logprob`.
        stats: As in `linear_logprob`; `rank` takes a second step, `ranks_ahead`.
        renyi_order: As in `linear_logprob`.
        k: As in `linear_logprob`.

    Raises:
        ValueError: If a shape, device, number or name of a statistic is not as above.
        TypeError: If a dtype is not.

    Example:
        >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [2.0, 5.0]])
        >>> target = torch.tensor([1])
        >>> left = partials(hidden, weight[:1], target, start=0, vocab_size=2)
        >>> right = partials(hidden, weight[1:], target, start=1, vocab_size=2)
        >>> merge([left, right]).finish().logprob
        tensor([-0.6931])
    """
    wanted = check_options(stats, temperature, softcap, renyi_order, k)
    _check_tensors(hidden, weight, target, rows, bias)
    check_mask(vocab_mask, weight)
    if start < 0:
        raise ValueError(f"`start` must be at least 0, got {start}; it counts rows of the head.")
    check_size(vocab_size)
    call = Call(target, rows, hidden.shape[0], vocab_size, ignore_index, wanted)
    shard = Shard.of(start, vocab_size, weight, bias, vocab_mask, float(temperature), softcap)
    with torch.no_grad():
        return Partials(start, shard.stop, *shard.read(hidden, call), call)


def check_mask(vocab_mask: Tensor | None, weight: Tensor) -> None:
    """Raise unless `vocab_mask` is that of the shard `weight`."""
    if vocab_mask is not None:
        check_dtype("vocab_mask", vocab_mask, torch.bool)
        check_shape("vocab_mask", vocab_mask, v=weight.shape[0])
        check_device("vocab_mask", vocab_mask, weight.device, "weight")


def check_size(vocab_size: int) -> None:
    """Raise `ValueError` unless a vocabulary may have this size."""
    if vocab_size < 1:
        raise ValueError(
            f"`vocab_size` must be at least 1, got {vocab_size}; it counts the whole vocabulary."
        )


def merge(parts: Sequence[Partials]) -> Partials:
    """Partials of all columns of `parts`: neighbours of one call, the lowest columns first.

    Merged from left to right, so that every place that merges the same parts gets the same bits.

    Raises:
        ValueError: If there is no part, a part does not begin where the one before it stops, or
            they are of different calls.
    """
    if not parts:
        raise ValueError("`parts` must hold partials of at least one shard, got none.")
    for left, right in itertools.pairwise(parts):
        if left.stop != right.start:
            raise ValueError(
                f"`parts` must be neighbours, the lowest columns first, got one that stops before "
                f"{left.stop} followed by one from {right.start}; sort them by `start`."
            )
        if left.call[2:] != right.call[2:] or left.chosen.shape != right.chosen.shape:
            raise ValueError(
                f"`parts` must be of one call, got {left.call[2:]} of {left.chosen.shape[0]} pairs "
                f"and {right.call[2:]} of {right.chosen.shape[0]}; give all the same options."
            )
    return functools.reduce(_merge_two, parts)


def _merge_two(left: Partials, right: Partials) -> Partials:
    state = _rows.merge(left.state, right.state, left.call.wanted.renyi_order)
    # of a target in neither part, or whose logit is nan, both are nan
    chosen = torch.where(left.chosen.isnan(), right.chosen, left.chosen)
    return Partials(left.start, right.stop, state, chosen, left.call)


def ranks_ahead(
    hidden: Float[Tensor, "R D"],
    weight: Float[Tensor, "v D"],
    merged: Partials,
    *,
    start: int,
    bias: Float[Tensor, " v"] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_mask: Bool[Tensor, " v"] | None = None,
) -> Int64[Tensor, " S"]:
    """Columns of one shard ahead of each target: the second step of `rank`.

    The sum over all shards goes to `merged.finish`; a rank is 1 + that. Ahead are unmasked columns
    of larger z, and those of equal z further left.

    Args:
        hidden: As `partials` had it; so are all that follow but `merged`.
        weight: The shard.
        merged: Partials of all shards, for the logits of the targets.
        start: The place of the first row of `weight` in the head.
        bias: Of this shard.
        temperature: As in `linear_logprob`.
        softcap: As in `linear_logprob`.
        vocab_mask: Of this shard.

    Raises:
        ValueError: If a shape, device or number is not as above.
        TypeError: If a dtype is not.
    """
    call = merged.call
    _check_tensors(hidden, weight, call.target, call.rows, bias)
    check_mask(vocab_mask, weight)
    rest = bias, vocab_mask, float(temperature), softcap
    with torch.no_grad():
        return Shard.of(start, call.vocab_size, weight, *rest).ahead(hidden, call, merged.chosen)
