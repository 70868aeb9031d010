"""`linear_logprob` of a head whose rows are spread over the ranks of a process group.

Every rank reads its own rows of the head, sends a few floats a row and a pair to all others, and
merges what all sent from the first rank to the last: all hold the same bits, which depend on where
the head is cut (segments begin anew at each shard) and on nothing else. Backward needs nothing sent
but the gradient of hidden, summed over ranks where hidden is replicated (the f and g of
Megatron-LM, Shoeybi et al. 2019, arXiv:1909.08053, section 3).

In this order: the op, the public function, what ranks agree on, one shard and its partials,
DTensors. A DTensor is never gathered, and never read in part as if it were the whole.

R hidden rows, S (row, target) pairs, V vocabulary, v rows of a rank, D hidden.
"""

import itertools
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ._checks import (
    check_device,
    check_dtype,
    check_head,
    check_options,
    check_shape,
    exact_matmul,
)
from ._head import Head, Transform, sum_dtype
from ._linear_logprob_op import Gradients, needed, pair_grads, returned, route_of, unwritten
from ._state import COLUMNS, Pairs, Partial, Values, finish, merge, no_columns, pair_values
from .stats import Statistic, TokenStats, Wanted

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# a column is packed as two floats, column // ID_UNIT and column % ID_UNIT: fp32 holds both exactly
ID_UNIT = 2**24
SAME = (
    "give every rank the same rows, targets and options. Ranks with rows of their own (FSDP, data "
    "parallelism) need the whole weight: `module.unshard()` or `weight.full_tensor()`"
)
GATHER = (
    "gather it with `.full_tensor()`, or let FSDP do so: call inside the forward of the module "
    "that was wrapped, or after its `unshard()`"
)


@torch.library.custom_op("sharpen::vocab_parallel_linear_logprob", mutates_args=())
def _vocab_parallel(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    vocab_mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab_size: int | None,
    ignore_index: int,
    stats: str,
    renyi_order: float,
    k: int,
    group: str,
    shards: Sequence[int] | None,
    check_replicated: bool,
    reduce_hidden_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Values`, the state of each row [4, R], and (start, vocab_size) on the CPU."""
    ranks = _resolved(group)
    R, D = hidden.shape
    if shards is None or check_replicated:
        dtypes = hidden.dtype, sum_dtype(hidden, weight)
        options = temperature, softcap, vocab_size, ignore_index, stats, renyi_order, k
        options = zlib.crc32(repr((dtypes, options, rows is None, bias is None)).encode())
        contents = _checksum(hidden, target, rows) if check_replicated else 0
        header = _Header(weight.shape[0], R, D, target.shape[0], options, contents)
        shards = _agreed(header.exchange(hidden.device, ranks))
    edges = list(itertools.accumulate(shards, initial=0))
    if vocab_size is not None and edges[-1] < vocab_size:
        raise ValueError(
            f"the rows of `weight` over all ranks must add up to `vocab_size`={vocab_size} or "
            f"more, got {list(shards)}, {edges[-1]} in all; pass the shard of every rank."
        )
    vocab_size = edges[-1] if vocab_size is None else vocab_size
    wanted = Wanted(tuple(stats.split(",")), renyi_order, k)
    call = _Call(target, rows, R, vocab_size, ignore_index, wanted)
    start = edges[dist.get_rank(ranks)]
    transform = Transform(temperature, softcap, vocab_size, vocab_mask)
    shard = _Shard.of(start, Head(weight, bias, transform))
    mine = shard.read(hidden, call)
    # every rank merges all parts in one order
    parts = [mine.unpack(x) for x in _gather(mine.pack(), ranks)]
    whole = _merged(parts, renyi_order)
    ahead = None
    if "rank" in wanted.names:
        ahead = shard.ahead(hidden, call, whole.chosen)
        dist.all_reduce(ahead, group=ranks)
    values, state = whole.values(ahead, call)
    return *values.all(), state, torch.tensor([start, vocab_size])


@_vocab_parallel.register_fake
def _(hidden, weight, target, rows, bias, vocab_mask, *options):
    dtype = sum_dtype(hidden, weight)
    stats, renyi_order, k = options[4:7]
    wanted = Wanted(tuple(stats.split(",")), renyi_order, k)
    values = Values.empty(wanted, target.shape[0], hidden, dtype)
    state = hidden.new_empty((4, hidden.shape[0]), dtype=dtype)
    return *values.all(), state, torch.empty(2, dtype=torch.int64, device="cpu")


@torch.library.custom_op("sharpen::vocab_parallel_linear_logprob_bwd", mutates_args=())
def _vocab_parallel_bwd(
    dvalues: Tensor,
    state: Tensor,
    place: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    vocab_mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    stats: str,
    group: str,
    reduce_hidden_grad: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; an empty tensor for each that `needs` leaves out.

    `stats` names the rows of `dvalues` [K, S].
    """
    start, vocab_size = place.tolist()
    wanted = Wanted(tuple(stats.split(",")))
    call = _Call(target, rows, hidden.shape[0], vocab_size, ignore_index, wanted)
    transform = Transform(temperature, softcap, vocab_size, vocab_mask)
    shard = _Shard.of(start, Head(weight, bias, transform))
    found = shard.backward(dvalues, state, hidden, call, needs)
    if found[0] is not None and reduce_hidden_grad:
        # in the dtype of the sums: parts that cancel would lose their half-precision bits
        summed = found[0].to(state.dtype).contiguous()
        dist.all_reduce(summed, group=_resolved(group))
        found = summed, *found[1:]
    return returned(found, hidden)


@_vocab_parallel_bwd.register_fake
def _(dvalues, state, place, hidden, weight, target, rows, bias, *options):
    return unwritten(hidden, weight, bias, options[-1])


def _save(ctx, inputs, output):
    *tensors, temperature, softcap, _, ignore_index, stats, renyi_order, k = inputs[:13]
    group, _, _, reduce_hidden_grad = inputs[13:]
    numbers = ",".join(Wanted(tuple(stats.split(",")), renyi_order, k).numbers)
    ctx.options = temperature, softcap, ignore_index, numbers, group, reduce_hidden_grad
    ctx.mark_non_differentiable(*output[1:4], output[5])
    ctx.save_for_backward(*output[4:], *tensors)


def _backward(ctx, dvalues, *_):
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
    found = _vocab_parallel_bwd(dvalues, *ctx.saved_tensors, *ctx.options, needs)
    dhidden, dweight, dbias = needed(found, needs)
    return dhidden, dweight, None, None, dbias, *[None] * 12


_vocab_parallel.register_autograd(_backward, setup_context=_save)


def vocab_parallel_linear_logprob(
    hidden: Float[Tensor, "R D"],
    weight: Float[Tensor, "v D"],
    target: Int64[Tensor, " S"],
    *,
    group: "dist.ProcessGroup | None" = None,
    rows: Int64[Tensor, " S"] | None = None,
    bias: Float[Tensor, " v"] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    vocab_mask: Bool[Tensor, " v"] | None = None,
    ignore_index: int = -100,
    stats: Sequence[Statistic] = ("logprob",),
    renyi_order: float = 2.0,
    k: int = 20,
    shards: Sequence[int] | None = None,
    check_replicated: bool = False,
    reduce_hidden_grad: bool = True,
) -> TokenStats:
    """`linear_logprob` of a head whose rows lie on the ranks of `group`, in their order.

    Every rank calls it, with the same rows, targets and options and its own rows of the head.

    Sent: a header of six integers (none where `shards` is given), then in one all_gather a few
    floats a row and one a pair, and for `rank` an all_reduce of one integer a
    pair; in backward an all_reduce of the gradient of hidden.

    Args:
        hidden: As in `linear_logprob`, the same on every rank, as `target` and `rows` are.
        weight: Rows of this rank; ranks may hold different numbers of them, or none.
        target: Columns of the whole head.
        group: The ranks that share the head; None for the default group.
        rows: As in `linear_logprob`.
        bias: Of this rank's rows; on all ranks or on none.
        temperature: As in `linear_logprob`.
        softcap: As in `linear_logprob`.
        vocab_size: Columns of the whole vocabulary, where the last ranks' rows end in padding;
            None if all rows count.
        vocab_mask: Of this rank's rows; None if all count.
        ignore_index: As in `linear_logprob`.
        stats: As in `linear_logprob`.
        renyi_order: As in `linear_logprob`.
        k: As in `linear_logprob`.
        shards: Rows of the weight on each rank, if known: saves the header, its wait for the
            device and the check that all ranks make the same call.
        check_replicated: Raise where the bits of `hidden`, `target` or `rows` are not the same on
            every rank, at the price of one read of them; otherwise only their shapes are compared.
        reduce_hidden_grad: Sum the gradient of hidden over ranks; False leaves each rank its own
            part, for a caller that sums (or scatters) it.

    Returns:
        `TokenStats`, the same bits on every rank. Differentiable as in `linear_logprob`, if every
        rank propagates back the same gradients of them: those of weight and bias are of this
        rank's rows, that of hidden is whole.

    Raises:
        ValueError: If a shape, device, number or name of a statistic is not as above, ranks do
            not agree, or there is no such group. All ranks raise, unless `shards` is given.
        TypeError: If a dtype is not.
    """
    group = _group(group)
    try:
        wanted = check_options(stats, temperature, softcap, renyi_order, k)
        check_head(hidden, weight, target, rows, bias)
        _check_mask(vocab_mask, weight)
        if vocab_size is not None:
            _check_size(vocab_size)
        _check_shards(shards, weight, group)
    except (TypeError, ValueError):
        if shards is None or check_replicated:
            # the others wait for this rank's header
            _Header(-1).exchange(hidden.device, group)
        raise
    tensors = hidden, weight, target, rows, bias, vocab_mask
    options = float(temperature), softcap, vocab_size, ignore_index, ",".join(wanted.names)
    over = group.group_name, shards, check_replicated, reduce_hidden_grad
    *values, _, _ = _vocab_parallel(*tensors, *options, *wanted[1:], *over)
    return TokenStats.of(Values(*values).by_name(wanted))


def _group(group: "dist.ProcessGroup | None") -> "dist.ProcessGroup":
    """The group, or the default one; `ValueError` unless this process is in it."""
    if group is None and not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "`group` must be a process group, got None and no default group; call "
            "`torch.distributed.init_process_group` first, or `linear_logprob` with a whole weight."
        )
    found = dist.group.WORLD if group is None else group
    if found is None or dist.get_rank(found) < 0:
        raise ValueError(
            "`group` must have this process in it, got one without; call on its ranks."
        )
    return found


def _check_shards(shards: Sequence[int] | None, weight: Tensor, group: "dist.ProcessGroup") -> None:
    """Raise `ValueError` unless `shards` fits the group and this rank's weight."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if shards is not None and (len(shards) != world or shards[rank] != weight.shape[0]):
        raise ValueError(
            f"`shards` must be the rows of `weight` on each of {world} ranks, "
            f"{weight.shape[0]} on rank {rank}, got {list(shards)}; leave it out to ask the ranks."
        )


def _check_mask(vocab_mask: Tensor | None, weight: Tensor) -> None:
    """Raise unless `vocab_mask` is that of the shard `weight`."""
    if vocab_mask is not None:
        check_dtype("vocab_mask", vocab_mask, torch.bool)
        check_shape("vocab_mask", vocab_mask, v=weight.shape[0])
        check_device("vocab_mask", vocab_mask, weight.device, "weight")


def _check_size(vocab_size: int) -> None:
    """Raise `ValueError` unless a vocabulary may have this size."""
    if vocab_size < 1:
        raise ValueError(
            f"`vocab_size` must be at least 1, got {vocab_size}; it counts the whole vocabulary."
        )


class _Header(NamedTuple):
    """What each rank says of its call before it computes; all but `shard` must be the same."""

    shard: int  # rows of its weight, or -1: its arguments are wrong
    R: int = 0
    D: int = 0
    S: int = 0
    options: int = 0  # checksum of dtypes and options
    contents: int = 0  # checksum of hidden, target and rows; 0 where they are not compared

    def exchange(self, device: torch.device, group: "dist.ProcessGroup") -> list["_Header"]:
        """The headers of all ranks."""
        found = _gather(torch.tensor(self, dtype=torch.int64, device=device), group)
        return [_Header(*row) for row in found.tolist()]


def _agreed(headers: list[_Header]) -> list[int]:
    """The rows of the weight on each rank; `ValueError`, on all ranks, if they do not agree."""
    wrong = [rank for rank, header in enumerate(headers) if header.shard < 0]
    if wrong:
        raise ValueError(f"the arguments of ranks {wrong} are wrong; their own messages say why.")
    for name, of in (
        ("the shape of `hidden`", lambda h: (h.R, h.D)),
        ("the length of `target`", lambda h: h.S),
    ):
        found = [of(header) for header in headers]
        if len(set(found)) > 1:
            raise ValueError(f"{name} must be the same on every rank, got {found}; {SAME}.")
    if len({header.options for header in headers}) > 1:
        raise ValueError(f"dtypes and options must be the same on every rank, got others; {SAME}.")
    if len({header.contents for header in headers}) > 1:
        raise ValueError(
            f"`hidden`, `target` and `rows` must be the same on every rank, got others; {SAME}."
        )
    return [header.shard for header in headers]


def _gather(x: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """`x` [n] of every rank [world, n]."""
    out = x.new_empty(dist.get_world_size(group), x.shape[0])
    dist.all_gather(list(out), x, group=group)
    return out


def _checksum(*tensors: Tensor | None) -> int:
    """Changes where a bit of any tensor does, or the order of its rows; waits for the device."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    total = 0
    for x in tensors:
        if x is not None and x.numel() > 0:
            rows = x.view(kinds[x.element_size()]).reshape(x.shape[0], -1).sum(1, dtype=torch.int64)
            odd = 2 * torch.arange(x.shape[0], device=x.device) + 1
            total = 31 * total + int((rows * odd).sum())
    return zlib.crc32(str(total).encode())


def _resolved(name: str) -> "dist.ProcessGroup":
    """The process group of that name: an op takes strings, no groups."""
    # private, and what PyTorch's own functional collectives call
    of_name: Any = dist.distributed_c10d._resolve_process_group  # pyright: ignore[reportPrivateImportUsage]
    return of_name(name)


class _Call(NamedTuple):
    """What all shards of one call have in common."""

    target: Tensor  # [S] int64
    rows: Tensor | None  # [S] int64
    n_rows: int  # R
    vocab_size: int
    ignore_index: int
    wanted: Wanted

    @property
    def is_empty(self) -> bool:
        """Whether there is no row, or no pair."""
        return 0 in (self.n_rows, self.target.shape[0])

    def pairs(self) -> Pairs:
        """The pairs, their targets columns of the whole head."""
        return Pairs.of(self.target, self.rows, self.n_rows)


class _ShardState(NamedTuple):
    """What some neighbouring columns of a head know of every row and pair of a call."""

    state: Partial  # of each row; columns are those of the whole head
    chosen: Tensor  # [S] the logit of each pair's target, NaN where it is not among these columns

    def pack(self) -> Tensor:
        """All of it in one tensor [n] for a collective to carry; fp32, or fp64 where an input is.

        First the fields of `state` that are set, in the order of `Partial`: R values each, R k in
        `best`; a field of columns is all its column // 2^24 and then all its column % 2^24. Last
        the S values of `chosen`.
        """
        dtype = self.chosen.dtype
        fields = [x for x in self.state if x is not None]
        parts = [
            y for x in fields for y in ((x,) if x.dtype == dtype else (x // ID_UNIT, x % ID_UNIT))
        ]
        return torch.cat([y.reshape(-1).to(dtype) for y in (*parts, self.chosen)])

    def unpack(self, packed: Tensor) -> "_ShardState":
        """The partials of other columns for the same call, from their `pack`."""
        fields = [x for x in self.state if x is not None]
        dtype = self.chosen.dtype
        sizes = [n for x in fields for n in [x.numel()] * (1 if x.dtype == dtype else 2)]
        *parts, chosen = packed.split([*sizes, self.chosen.shape[0]])
        left = iter(parts)
        found: list[Tensor | None] = []
        for x in self.state:
            if x is None or x.dtype == dtype:
                found.append(None if x is None else next(left).view(x.shape))
            else:
                high, low = next(left).long(), next(left).long()
                found.append((high * ID_UNIT + low).view(x.shape))
        return _ShardState(Partial._make(found), chosen)

    def values(self, ahead: Tensor | None, call: _Call) -> tuple[Values, Tensor]:
        """The values of all pairs, and what backward needs of each row [4, R].

        Wants all columns in here, and for `rank` the columns `ahead` [S] of each target.
        """
        rows = finish(self.state, call.wanted.renyi_order)
        if call.is_empty:
            dtype = self.chosen.dtype
            empty = Values.of_no_row(call.wanted, call.target, call.ignore_index, dtype)
            return empty, rows.state()
        pairs = call.pairs()
        chosen = pairs.sort(self.chosen[None])[0]
        rank = None if ahead is None else pairs.sort(1 + ahead[None])[0]
        asked = call.wanted, rows, chosen, rank, pairs, call.vocab_size, call.ignore_index
        return pair_values(*asked), rows.state()


def _merged(parts: Sequence[_ShardState], order: float) -> _ShardState:
    """The partials of all columns of `parts`, neighbours from the lowest columns on.

    Merged from left to right, so that every rank that merges the same parts gets the same bits.
    `order` is the a of `renyi`.
    """
    state, chosen = parts[0]
    for right in parts[1:]:
        state = merge(state, right.state, order)
        # of a target in neither part, or whose logit is nan, both are nan
        chosen = torch.where(chosen.isnan(), right.chosen, chosen)
    return _ShardState(state, chosen)


class _Shard(NamedTuple):
    """Rows start, start + 1, ... of a head; those past the vocabulary are padding."""

    start: int
    head: Head  # its `vocab_size` counts the columns of this shard that are in the vocabulary

    @classmethod
    def of(cls, start: int, head: Head) -> "_Shard":
        """The shard whose own weight, bias and mask `head` has, and the whole `vocab_size`."""
        n_columns = max(0, min(head.weight.shape[0], head.vocab_size - start))
        return cls(start, head._replace(transform=head.transform._replace(vocab_size=n_columns)))

    def local(self, pairs: Pairs) -> Pairs:
        """`pairs` with targets as columns of this shard: -1 left of it, its width right of it."""
        low, high = self.start - 1, self.start + self.head.vocab_size
        return pairs._replace(target=pairs.target.clamp(low, high) - self.start)

    def read(self, hidden: Tensor, call: _Call) -> _ShardState:
        """What the columns of this shard know."""
        dtype = sum_dtype(hidden, self.head.weight)
        pairs = call.pairs()
        if self.head.vocab_size == 0 or call.is_empty:
            state = no_columns(call.wanted, call.n_rows, hidden, dtype)
            chosen = hidden.new_full(call.target.shape, float("nan"), dtype=dtype)
        else:
            route = route_of(hidden, self.head)
            with exact_matmul(hidden.device):
                state, chosen = route.forward(hidden, self.head, self.local(pairs), call.wanted)
        found = {name: getattr(state, name) for name in call.wanted.fields}
        columns = {name: found[name] + self.start for name in COLUMNS & found.keys()}
        return _ShardState(Partial(state.top, state.mass, **found | columns), pairs.unsort(chosen))

    def ahead(self, hidden: Tensor, call: _Call, chosen: Tensor) -> Tensor:
        """Unmasked columns of this shard ahead of each pair's target [S] int64.

        `chosen` [S] are the targets' logits, from the shard that has each.
        """
        if self.head.vocab_size == 0 or call.is_empty:
            return torch.zeros_like(call.target)
        pairs = call.pairs()
        chosen = pairs.sort(chosen[None])[0]
        route = route_of(hidden, self.head)
        with exact_matmul(hidden.device):
            return pairs.unsort(route.ranks(hidden, self.head, self.local(pairs), chosen))

    def backward(
        self, dvalues: Tensor, state: Tensor, hidden: Tensor, call: _Call, needs: Sequence[bool]
    ) -> Gradients:
        """What the shard adds to the gradient of hidden, and its gradients of weight and bias.

        `dvalues` [K, S] are those of the statistics of one float a token, `state` [4, R] that of
        rows of the whole head. The first is in the dtype of the sums, to be summed over shards.
        """
        pairs = call.pairs()
        counts, _ = pairs.counted(call.n_rows, call.vocab_size, call.ignore_index)
        grads = pair_grads(call.wanted.numbers, dvalues.to(state.dtype), pairs, counts)
        if self.head.vocab_size == 0 or call.is_empty or not grads:
            dhidden = hidden.new_zeros(hidden.shape, dtype=state.dtype)
            leaves = dhidden, self.head.weight, self.head.bias
            zeros = (torch.zeros_like(x) if x is not None else None for x in leaves)
            dhidden, dweight, dbias = (x if n else None for x, n in zip(zeros, needs, strict=True))
            return dhidden, dweight, dbias
        route = route_of(hidden, self.head)
        with exact_matmul(hidden.device):
            return route.backward(grads, state, hidden, self.head, self.local(pairs), needs)


class LocalArguments(NamedTuple):
    """The tensors of `linear_logprob` as this rank holds them, and who holds the rest."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
    group: "dist.ProcessGroup | None" = None  # that shares the head; None where all of it is here
    n_rows: int | None = None  # of the whole head, where it is shared
    is_replicated: bool = False  # whether the layout of hidden says that it is the same everywhere


def local_arguments(
    hidden: Tensor,
    weight: Any,
    target: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    vocab_mask: Tensor | None,
) -> LocalArguments:
    """The arguments of `linear_logprob`, some of them DTensors, on this rank.

    Raises:
        ValueError: If the placements are not those that `linear_logprob` names.
    """
    target, rows = _whole("target", target), _whole("rows", rows)
    is_replicated = is_dtensor(hidden)
    hidden = _whole("hidden", hidden)
    if not is_dtensor(weight) or _is_whole(weight):
        bias, vocab_mask = _whole("bias", bias), _whole("vocab_mask", vocab_mask)
        return LocalArguments((hidden, _whole("weight", weight), target, rows, bias, vocab_mask))
    _check_cut(weight)
    bias, vocab_mask = (
        _of_shard(name, x, weight) for name, x in (("bias", bias), ("vocab_mask", vocab_mask))
    )
    return LocalArguments(
        (hidden, weight.to_local(), target, rows, bias, vocab_mask),
        weight.device_mesh.get_group(),
        weight.shape[0],
        is_replicated,
    )


def is_dtensor(x: object) -> bool:
    """Whether `x` is a DTensor: told without its module, which takes long to import."""
    return hasattr(x, "placements")


def _is_whole(x: "DTensor") -> bool:
    """Whether every rank holds all of `x`."""
    return all(placement.is_replicate() for placement in x.placements)


def _whole(name: str, x: Any) -> Any:
    """`x`, locally where it is a replicated DTensor; `ValueError` for any other DTensor."""
    if not is_dtensor(x):
        return x
    if _is_whole(x):
        return x.to_local()
    raise ValueError(f"`{name}` must be whole on every rank, got {_layout(x)}; {GATHER}.")


def _check_cut(weight: "DTensor") -> None:
    """Raise `ValueError` unless `weight` is cut by rows, in the order of its ranks."""
    from torch.distributed.tensor import Shard

    mesh, placements = weight.device_mesh, weight.placements
    if mesh.ndim != 1 or type(placements[0]) is not Shard or placements[0].dim != 0:
        raise ValueError(
            "`weight` must be replicated, or cut by rows, (Shard(dim=0),), over a mesh of one "
            f"dimension, got {_layout(weight)}; {GATHER}."
        )
    ranks = dist.get_process_group_ranks(mesh.get_group())
    if mesh.mesh.tolist() != ranks:
        raise ValueError(
            f"`weight` must lie on a mesh in the order of its group, {ranks}, got "
            f"{mesh.mesh.tolist()}; {GATHER}."
        )


def _of_shard(name: str, x: Any, weight: "DTensor") -> Any:
    """The part of `x` [V] that goes with this rank's rows of `weight`."""
    if x is None:
        return None
    if not is_dtensor(x):
        if x.shape != weight.shape[:1] or x.is_floating_point():
            raise ValueError(
                f"`{name}` must be a DTensor laid out as `weight` is, {_layout(weight)}, got a "
                f"tensor of shape {tuple(x.shape)}; call `distribute_tensor` on it."
            )
        # as `Shard` cuts
        step = -(-weight.shape[0] // weight.device_mesh.size())
        start = step * weight.device_mesh.get_local_rank()
        return x[start : start + step]
    if x.device_mesh != weight.device_mesh or x.placements != weight.placements:
        raise ValueError(
            f"`{name}` must be laid out as `weight` is, {_layout(weight)}, got {_layout(x)}; "
            "call `.redistribute` on it."
        )
    return x.to_local()


def _layout(x: "DTensor") -> str:
    """The placements and the mesh, for a message."""
    return f"{tuple(x.placements)} over a mesh of shape {tuple(x.device_mesh.shape)}"
