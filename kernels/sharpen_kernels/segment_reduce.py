"""Statistics of tokens to statistics of sequences, and of sequences to statistics of groups.

Sequence n owns the values offsets[n] ... offsets[n + 1] - 1, group p the sequences
group_offsets[p] ... group_offsets[p + 1] - 1; both are ragged, and either may be empty.

S scored tokens, N sequences, P groups, K token statistics.  Sums are kept in fp64, in an order
that only the sequence's own length decides: sequence and group have the same bits in any batch.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from . import _segment_reduce_torch as plain
from ._launch import check_device, check_dtype, check_shape, runs_triton
from .segment_stats import (
    GROUP_NAMES,
    SEQUENCE_NAMES,
    GroupStatistic,
    GroupStats,
    Segments,
    SequenceStatistic,
    SequenceStats,
)
from .stats import IDS_OR_LISTS, TokenStats

EPSILON = 1e-4  # beside the std of an advantage, as in TRL
DIFFERENTIABLE = ("sum", "mean")
PER_GROUP = ("max", "mean", "std", "log_mean_exp")


def _route(x: Tensor):
    """The module that computes where `x` lives."""
    if runs_triton(x, x.dtype):
        from . import _segment_reduce_triton as triton_route

        return triton_route
    return plain


@torch.library.custom_op("sharpen::segment_reduce", mutates_args=())
def _sequences(
    values: Tensor, offsets: Tensor, window: float, is_fraction: bool, stats: str
) -> Tensor:
    """The statistics named in `stats` of each row of values [K, S]: [M, K, N]."""
    (K, S), N = values.shape, offsets.shape[0] - 1
    names = stats.split(",")
    if K == 0 or N == 0:
        return values.new_zeros((len(names), K, N))
    if S == 0:
        values = values.new_zeros((K, 1))
    # not checked on a GPU, which would have to wait; no run may leave the values
    offsets = offsets.clamp(0, S).cummax(0).values
    lengths = offsets.diff()
    if is_fraction:
        widths = (lengths.double() * window).floor().long().clamp(min=1)
    else:
        widths = torch.full_like(lengths, int(window))
    return torch.stack(_route(values).sequences(values.contiguous(), offsets, widths, names))


@_sequences.register_fake
def _(values, offsets, window, is_fraction, stats):
    shape = (stats.count(",") + 1, values.shape[0], offsets.shape[0] - 1)
    return values.new_empty(shape)


def _save(ctx, inputs, output):
    values, offsets, _, _, stats = inputs
    ctx.S, ctx.names = values.shape[1], stats.split(",")
    ctx.save_for_backward(offsets)


def _backward(ctx, dout):
    (offsets,) = ctx.saved_tensors
    N = offsets.shape[0] - 1
    dvalues = dout.new_zeros((dout.shape[1], ctx.S))
    if N > 0 and ctx.S > 0:
        offsets = offsets.clamp(0, ctx.S).cummax(0).values
        place = torch.arange(ctx.S, device=dout.device)
        owner = torch.searchsorted(offsets, place, right=True) - 1
        owned = (owner >= 0) & (owner < N)
        owner = owner.clamp(0, N - 1)
        scale = {"sum": torch.ones_like(place), "mean": offsets.diff()[owner].clamp(min=1)}
        for name, d in zip(ctx.names, dout, strict=True):
            if name in DIFFERENTIABLE:
                dvalues = dvalues + torch.where(owned, d[:, owner] / scale[name], 0.0)
    return dvalues, None, None, None, None


_sequences.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("sharpen::group_reduce", mutates_args=())
def _groups(
    scores: Tensor, eligible: Tensor, offsets: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Argmax [K, P]; `PER_GROUP` [4, K, P]; advantage and weights [2, K, N]; of scores [K, N]."""
    (K, N), P = scores.shape, offsets.shape[0] - 1
    if K == 0 or N == 0 or P == 0:
        argmax = torch.full((K, P), -1, dtype=torch.int64, device=scores.device)
        per_group = scores.new_full((len(PER_GROUP), K, P), float("nan"))
        return argmax, per_group, scores.new_zeros((2, K, N))
    offsets = offsets.clamp(0, N).cummax(0).values
    route = _route(scores)
    return route.groups(scores.contiguous(), eligible, offsets, temperature, EPSILON)


@_groups.register_fake
def _(scores, eligible, offsets, temperature):
    (K, N), P = scores.shape, offsets.shape[0] - 1
    per_group = scores.new_empty((len(PER_GROUP), K, P))
    return offsets.new_empty((K, P)), per_group, scores.new_empty((2, K, N))


def segment_reduce(
    values: TokenStats | Mapping[str, Float[Tensor, " S"]],
    offsets: Int64[Tensor, " N+1"],
    group_offsets: Int64[Tensor, " P+1"] | None = None,
    *,
    stats: Sequence[SequenceStatistic] = ("sum",),
    group_stats: Sequence[GroupStatistic] = (),
    by: SequenceStatistic = "sum",
    window: int | float = 0.1,
    temperature: float = 1.0,
    valid: Bool[Tensor, " N"] | None = None,
) -> Segments:
    """Statistics of tokens reduced to sequences, and to groups of sequences.

    The formula of every statistic, and what an empty sequence or group gives, is on
    `SequenceStats` and `GroupStats`. Groups reduce one number a sequence: its statistic `by`.

    Args:
        values: Token statistics by name, fp32 or fp64; of a `TokenStats` all that were computed but
            ids and lists (`top1`, `topk`, `topk_id`).
        offsets: Where each sequence starts, then where the last one ends; never falling.
        group_offsets: Where in the sequences each group starts, then where the last one ends.
        stats: Which statistics of sequences to return.
        group_stats: Which statistics of groups to return; wants `group_offsets`.
        by: What groups reduce.
        window: Values in a window: an int counts them, a float in (0, 1] is a part of the sequence.
        temperature: Of `log_mean_exp` and `weights`; finite and above 0.
        valid: Sequences that groups may count; None for all. Empty ones never count.

    Returns:
        `Segments` with one `SequenceStats` for each token statistic and, with `group_offsets`, one
        `GroupStats`. `sum` and `mean` of sequences are differentiable, once; the rest is not. NaN
        stays in its sequence and group.

    Raises:
        ValueError: If a shape, device, number or name is not as above, or, on a CPU, offsets fall
            or leave the values. On a GPU such runs are cut to the values.
        TypeError: If a dtype is not.

    Example:
        >>> values = {"logprob": torch.tensor([-1.0, -2.0, -4.0])}
        >>> found = segment_reduce(
        ...     values, torch.tensor([0, 2, 3, 3]), torch.tensor([0, 3]), group_stats=("argmax",)
        ... )
        >>> found.sequences["logprob"].sum, found.groups["logprob"].argmax
        (tensor([-3., -4.,  0.]), tensor([0]))
    """
    columns = _check_values(values)
    device = next(iter(columns.values())).device
    S = next(iter(columns.values())).shape[0]
    N = _check_offsets("offsets", offsets, S, device)
    for name, asked, known in (
        ("stats", stats, SEQUENCE_NAMES),
        ("group_stats", group_stats, GROUP_NAMES),
        ("by", (by,), SEQUENCE_NAMES),
    ):
        if isinstance(asked, str) or not set(asked) <= set(known):
            raise ValueError(f"`{name}` must be names out of {known}, got {asked!r}.")
    _check_numbers(window, temperature)
    if valid is not None:
        check_dtype("valid", valid, torch.bool)
        check_shape("valid", valid, N=N)
        check_device("valid", valid, device, like="values")

    wanted = dict.fromkeys((*stats, by) if group_stats else stats)
    computed = [name for name in wanted if name != "count"]
    stacked = torch.stack(list(columns.values()))
    options = (float(window), isinstance(window, float), ",".join(computed))
    found: dict[str, Tensor] = {}
    if computed:
        reduced = _sequences(stacked, offsets, *options)
        found = dict(zip(computed, reduced, strict=True))
    length = offsets.diff()
    sequences = {}
    for k, name in enumerate(columns):
        kept = {
            stat: x[k] if stat in DIFFERENTIABLE else x[k].detach()
            for stat, x in found.items()
            if stat in stats
        }
        sequences[name] = SequenceStats(**kept, count=length if "count" in stats else None)
    if group_offsets is None:
        if group_stats:
            raise ValueError(
                f"`group_offsets` must be given for `group_stats`, got None for {group_stats!r}; "
                "pass where each group of sequences starts, then N."
            )
        return Segments(sequences, {})
    _check_offsets("group_offsets", group_offsets, N, device)
    if not group_stats:
        return Segments(sequences, {name: GroupStats() for name in columns})
    counted = length.to(stacked.dtype).expand(len(columns), N)
    scores = (counted if by == "count" else found[by]).detach()
    eligible = (length > 0) if valid is None else (length > 0) & valid
    argmax, per_group, per_member = _groups(scores, eligible, group_offsets, float(temperature))
    every = dict(zip(PER_GROUP, per_group, strict=True))
    every |= {"argmax": argmax, "advantage": per_member[0], "weights": per_member[1]}
    groups = {
        name: GroupStats(**{stat: every[stat][k] for stat in group_stats})
        for k, name in enumerate(columns)
    }
    return Segments(sequences, groups)


def _check_values(values: TokenStats | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The columns to reduce; raise unless they fit together."""
    is_stats = isinstance(values, TokenStats)
    given = vars(values) if is_stats else values
    left_out = IDS_OR_LISTS if is_stats else ()
    columns = {name: x for name, x in given.items() if x is not None and name not in left_out}
    if not columns:
        raise ValueError(
            f"`values` must hold at least one statistic, got {values!r}; "
            "score with `stats=` or pass a mapping of names to tensors."
        )
    first = next(iter(columns.values()))
    for name, x in columns.items():
        check_dtype(f"values.{name}", x, torch.float64, torch.float32)
        check_device(f"values.{name}", x, first.device, like=next(iter(columns)))
        check_shape(f"values.{name}", x, S=first.shape[0] if first.ndim else 0)
        if x.dtype != first.dtype:
            raise TypeError(f"`values` must be of one dtype, got {first.dtype} and {x.dtype}.")
    return columns


def _check_offsets(name: str, offsets: Tensor, size: int, device: torch.device) -> int:
    """How many runs `offsets` bounds; raise unless they lie within `size`, on a CPU."""
    check_dtype(name, offsets, torch.int64)
    check_device(name, offsets, device, like="values")
    if offsets.ndim != 1 or offsets.shape[0] == 0:
        raise ValueError(f"`{name}` must be 1-D and not empty, got {tuple(offsets.shape)}; pass 0.")
    if device.type == "cpu" and not torch.compiler.is_compiling():
        falls = bool((offsets.diff() < 0).any())
        if falls or offsets[0] < 0 or offsets[-1] > size:
            raise ValueError(
                f"`{name}` must never fall, from 0 at least to {size} at most, "
                f"got {offsets.tolist()}; pass cumulative lengths."
            )
    return offsets.shape[0] - 1


def _check_numbers(window: int | float, temperature: float) -> None:
    if not (window >= 1 if isinstance(window, int) else 0 < window <= 1):
        raise ValueError(
            f"`window` must be an int of at least 1 or a float in (0, 1], got {window!r}."
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"`temperature` must be finite and above 0, got {temperature}.")
