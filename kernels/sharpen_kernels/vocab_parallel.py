"""`linear_logprob` of a head whose rows are spread over the ranks of a process group.

Every rank reads its own rows of the head, sends a few floats a row and a pair to all others, and
merges what all sent from the first rank to the last: all hold the same bits, which depend on where
the head is cut. Backward needs nothing sent but the gradient of hidden, summed over ranks where
hidden is replicated (the f and g of Megatron-LM, Shoeybi et al. 2019, arXiv:1909.08053, section 3).

R hidden rows, S (row, target) pairs, V vocabulary, v rows of a rank, D hidden.
"""

import itertools
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ._launch import check_options
from ._pairs import Values
from ._shards import Call, Shard
from .linear_logprob import _check_tensors, _wide
from .partials import Partials, check_mask, check_size, merge
from .stats import Statistic, TokenStats, Wanted

FIX = (
    "give every rank the same rows, targets and options. Ranks with rows of their own (FSDP, data "
    "parallelism) need the whole weight: `module.unshard()` or `weight.full_tensor()`"
)


class Header(NamedTuple):
    """What each rank says of its call before it computes; all but `shard` must be the same."""

    shard: int  # rows of its weight, or -1: its arguments are wrong
    R: int = 0
    D: int = 0
    S: int = 0
    options: int = 0  # checksum of dtypes and options
    contents: int = 0  # checksum of hidden, target and rows; 0 where they are not compared

    def exchange(self, device: torch.device, group: "dist.ProcessGroup") -> list["Header"]:
        """The headers of all ranks."""
        found = gather(torch.tensor(self, dtype=torch.int64, device=device), group)
        return [Header(*row) for row in found.tolist()]


def agreed(headers: list[Header]) -> list[int]:
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
            raise ValueError(f"{name} must be the same on every rank, got {found}; {FIX}.")
    if len({header.options for header in headers}) > 1:
        raise ValueError(f"dtypes and options must be the same on every rank, got others; {FIX}.")
    if len({header.contents for header in headers}) > 1:
        raise ValueError(
            f"`hidden`, `target` and `rows` must be the same on every rank, got others; {FIX}."
        )
    return [header.shard for header in headers]


def gather(x: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """`x` [n] of every rank [world, n]."""
    out = x.new_empty(dist.get_world_size(group), x.shape[0])
    dist.all_gather(list(out), x, group=group)
    return out


def checksum(*tensors: Tensor | None) -> int:
    """Changes where a bit of any tensor does, or the order of its rows; waits for the device."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    total = 0
    for x in tensors:
        if x is not None and x.numel() > 0:
            rows = x.view(kinds[x.element_size()]).reshape(x.shape[0], -1).sum(1, dtype=torch.int64)
            odd = 2 * torch.arange(x.shape[0], device=x.device) + 1
            total = 31 * total + int((rows * odd).sum())
    return zlib.crc32(str(total).encode())


def resolve(name: str) -> "dist.ProcessGroup":
    """The process group of that name: an op takes strings, no groups."""
    # private, and what PyTorch's own functional collectives call
    of_name: Any = dist.distributed_c10d._resolve_process_group  # pyright: ignore[reportPrivateImportUsage]
    return of_name(name)


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
    ranks = resolve(group)
    R, D = hidden.shape
    if shards is None or check_replicated:
        dtypes = hidden.dtype, _wide(hidden, weight)
        options = temperature, softcap, vocab_size, ignore_index, stats, renyi_order, k
        options = zlib.crc32(repr((dtypes, options, rows is None, bias is None)).encode())
        contents = checksum(hidden, target, rows) if check_replicated else 0
        header = Header(weight.shape[0], R, D, target.shape[0], options, contents)
        shards = agreed(header.exchange(hidden.device, ranks))
    edges = list(itertools.accumulate(shards, initial=0))
    if vocab_size is not None and edges[-1] < vocab_size:
        raise ValueError(
            f"the rows of `weight` over all ranks must add up to `vocab_size`={vocab_size} or "
            f"more, got {list(shards)}, {edges[-1]} in all; pass the shard of every rank."
        )
    vocab_size = edges[-1] if vocab_size is None else vocab_size
    wanted = Wanted(tuple(stats.split(",")), renyi_order, k)
    call = Call(target, rows, R, vocab_size, ignore_index, wanted)
    start = edges[dist.get_rank(ranks)]
    shard = Shard.of(start, vocab_size, weight, bias, vocab_mask, temperature, softcap)
    mine = Partials(start, shard.stop, *shard.read(hidden, call), call)
    sent = gather(mine.pack(), ranks)
    # every rank merges all parts in one order
    places = zip(sent, edges[:-1], edges[1:], strict=True)
    whole = merge([mine.unpack(*place) for place in places])
    ahead = None
    if "rank" in wanted.names:
        ahead = shard.ahead(hidden, call, whole.chosen)
        dist.all_reduce(ahead, group=ranks)
    values, state = whole.values(ahead)
    return *values.all(), state, torch.tensor([start, vocab_size])


@_vocab_parallel.register_fake
def _(hidden, weight, target, rows, bias, vocab_mask, *options):
    dtype = _wide(hidden, weight)
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
    call = Call(target, rows, hidden.shape[0], vocab_size, ignore_index, wanted)
    shard = Shard.of(start, vocab_size, weight, bias, vocab_mask, temperature, softcap)
    found = shard.backward(dvalues, state, hidden, call, needs)
    if found[0] is not None and reduce_hidden_grad:
        # in the dtype of the sums: parts that cancel would lose their half-precision bits
        summed = found[0].to(state.dtype).contiguous()
        dist.all_reduce(summed, group=resolve(group))
        found = summed, *found[1:]
    dhidden, dweight, dbias = (hidden.new_empty(0) if x is None else x for x in found)
    return dhidden.to(hidden.dtype), dweight, dbias


@_vocab_parallel_bwd.register_fake
def _(dvalues, state, place, hidden, weight, target, rows, bias, *options):
    wanted = zip((hidden, weight, bias), options[-1], strict=True)
    dhidden, dweight, dbias = (
        torch.empty_like(x) if need and x is not None else hidden.new_empty(0) for x, need in wanted
    )
    return dhidden.contiguous(), dweight, dbias


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
    dhidden, dweight, dbias = (g if need else None for g, need in zip(found, needs, strict=True))
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
    floats a row and one a pair (`Partials.pack`), and for `rank` an all_reduce of one integer a
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
        _check_tensors(hidden, weight, target, rows, bias)
        check_mask(vocab_mask, weight)
        if vocab_size is not None:
            check_size(vocab_size)
        _check_shards(shards, weight, group)
    except (TypeError, ValueError):
        if shards is None or check_replicated:
            # the others wait for this rank's header
            Header(-1).exchange(hidden.device, group)
        raise
    *values, _, _ = _vocab_parallel(
        hidden, weight, target, rows, bias, vocab_mask,
        float(temperature), softcap, vocab_size, ignore_index, ",".join(wanted.names), *wanted[1:],
        group.group_name, shards, check_replicated, reduce_hidden_grad,
    )  # fmt: skip
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
