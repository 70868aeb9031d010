"""Statistics of tokens to statistics of sequences, and of sequences to statistics of groups.

Sequence n owns the values offsets[n] ... offsets[n + 1] - 1, group p the sequences
group_offsets[p] ... group_offsets[p + 1] - 1; both are ragged, and either may be empty.

In this order: what can be asked, the ops, the public function and its checks, the PyTorch route. On
a GPU `_segment_reduce_triton` computes.

S scored tokens, N sequences, P groups, K token statistics.  Sums are kept in fp64, in an order
that only the sequence's own length decides: sequence and group have the same bits in any batch.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from ._checks import check_device, check_dtype, check_shape, runs_triton
from .stats import IDS_OR_LISTS, TokenStats

SequenceStatistic = Literal[
    "sum", "mean", "min", "count", "all", "lowest_window", "bottom_windows", "tail_window"
]
GroupStatistic = Literal["argmax", "max", "mean", "std", "log_mean_exp", "advantage", "weights"]
SEQUENCE_NAMES: tuple[SequenceStatistic, ...] = get_args(SequenceStatistic)
GROUP_NAMES: tuple[GroupStatistic, ...] = get_args(GroupStatistic)
EPSILON = 1e-4  # beside the std of an advantage, as in TRL
DIFFERENTIABLE = ("sum", "mean")
PER_GROUP = ("max", "mean", "std", "log_mean_exp")
BLOCK_ELEMENTS = 2**20  # fp64 values laid side by side; chosen
WINDOWS = ("lowest_window", "bottom_windows", "tail_window")


@dataclasses.dataclass(frozen=True, eq=False)
class SequenceStats:
    """One value per sequence for each statistic that was asked for, `None` for the others.

    Of the L values x of one sequence, and of its L - w + 1 windows of w neighbouring values:

        sum             sum x; 0 where L = 0
        mean            sum x / L; 0 where L = 0
        min             the least x; inf where L = 0
        count           L, int64
        all             1.0 where no x is 0, else 0.0; 1.0 where L = 0
        lowest_window   the least mean of a window
        bottom_windows  the mean of the lowest tenth of the windows' means, rounded down, at least 1
        tail_window     the mean of the last window

    w is what `window` says, at least 1 and at most L; the windows of an empty sequence give 0.
    A NaN makes NaN of every value of its sequence but `count`. fp32; fp64 where the values are.

    Source:
        Windows: Fu et al. 2025 (DeepConf), arXiv:2508.15260.
    """

    sum: Float32[Tensor, " N"] | None = None
    mean: Float32[Tensor, " N"] | None = None
    min: Float32[Tensor, " N"] | None = None
    count: Int64[Tensor, " N"] | None = None
    all: Float32[Tensor, " N"] | None = None
    lowest_window: Float32[Tensor, " N"] | None = None
    bottom_windows: Float32[Tensor, " N"] | None = None
    tail_window: Float32[Tensor, " N"] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class GroupStats:
    """One value per group, or per sequence, for each statistic that was asked for, else `None`.

    Of the G scores x of a group's eligible sequences: those that are `valid` and not empty.

        argmax        where in its group the highest x is, the first of a tie; [P] int64; -1 where
                      there is none. NaN is never chosen
        max           its x, [P]; NaN where there is none
        mean          sum x / G, [P]
        std           sqrt(sum (x - mean)^2 / (G - 1)), [P]; 0 where G = 1
        log_mean_exp  T log(sum exp(x / T) / G), [P]
        advantage     (x - mean) / (std + 1e-4), [N]
        weights       exp(x / T) / sum exp(x / T) over the group, [N]

    T is `temperature`. mean, std and log_mean_exp of no score are NaN; so are they, and the group's
    advantages and weights, where a score is NaN. Sequences that are not eligible, or in no group,
    have advantage and weight 0. fp32; fp64 where the scores are.

    Source:
        Advantage: Shao et al. 2024 (GRPO), arXiv:2402.03300, with the 1e-4 of TRL.
    """

    argmax: Int64[Tensor, " P"] | None = None
    max: Float32[Tensor, " P"] | None = None
    mean: Float32[Tensor, " P"] | None = None
    std: Float32[Tensor, " P"] | None = None
    log_mean_exp: Float32[Tensor, " P"] | None = None
    advantage: Float32[Tensor, " N"] | None = None
    weights: Float32[Tensor, " N"] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Segments:
    """The reductions of each token statistic, by its name: to sequences, and to groups of them."""

    sequences: Mapping[str, SequenceStats]
    groups: Mapping[str, GroupStats]


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
    asked = values.contiguous(), offsets, widths, names
    if runs_triton(values, values.dtype):
        from . import _segment_reduce_triton as fused

        return torch.stack(fused.sequences(*asked))
    return torch.stack(_torch_sequences(*asked))


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
    asked = scores.contiguous(), eligible, offsets, temperature, EPSILON
    if runs_triton(scores, scores.dtype):
        from . import _segment_reduce_triton as fused

        return fused.groups(*asked)
    return _torch_groups(*asked)


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


def _torch_sequences(
    values: Tensor, offsets: Tensor, widths: Tensor, stats: list[str]
) -> list[Tensor]:
    """The asked statistics of every sequence, each [K, N]; `values` [K, S], N and K above 0.

    Sums run over the values in order, one sequence by itself. For windows, sequences of about one
    length are laid side by side and padded, a bounded number of values at a time.
    """
    lengths = offsets.diff()
    found: dict[str, Tensor] = {}
    if {"sum", "mean"} & set(stats):
        found["sum"] = _reduce(values.double(), "sum", offsets)
        found["mean"] = found["sum"] / lengths.clamp(min=1)
    if "min" in stats:
        found["min"] = _reduce(values, "min", offsets)
    if "all" in stats:
        holds = (values != 0).to(values.dtype).masked_fill(values.isnan(), float("nan"))
        found["all"] = _reduce(holds, "min", offsets).clamp(max=1.0)
    if set(WINDOWS) & set(stats):
        found |= _window_stats(values, offsets[:-1], lengths, widths, "bottom_windows" in stats)
    return [found[name].to(values.dtype) for name in stats]


def _window_stats(
    values: Tensor, starts: Tensor, lengths: Tensor, widths: Tensor, want_bottom: bool
) -> dict[str, Tensor]:
    K, N = values.shape[0], lengths.shape[0]
    found = {name: values.new_zeros((K, N), dtype=torch.float64) for name in WINDOWS}
    longest_first, order = lengths.sort(descending=True, stable=True)
    edges = longest_first.tolist()
    i = 0
    while i < N and edges[i] > 0:
        step = max(1, BLOCK_ELEMENTS // (K * edges[i]))
        block = order[i : i + step]
        windows, has_nan = _lay_out(values, starts[block], lengths[block], widths[block], edges[i])
        mean, last = windows.mean, (windows.n_windows - 1).clamp(min=0).expand(K, -1)[:, :, None]
        lost = has_nan | (mean.isnan() & windows.exists).any(dim=2)
        some = lengths[block] > 0
        of_block = {"lowest_window": mean.amin(dim=2).masked_fill(lost, float("nan"))}
        of_block["tail_window"] = mean.gather(2, last)[:, :, 0].masked_fill(has_nan, float("nan"))
        if want_bottom:
            count = (windows.n_windows // 10).clamp(min=1)
            lowest = mean.sort(dim=2).values.cumsum(dim=2)
            total = lowest.gather(2, (count - 1).expand(K, -1)[:, :, None])[:, :, 0]
            of_block["bottom_windows"] = (total / count).masked_fill(lost, float("nan"))
        for name, x in of_block.items():
            found[name][:, block] = torch.where(some, x, 0.0)
        i += step
    return found


class _Windows(NamedTuple):
    mean: Tensor  # [K, B, L] fp64, inf where there is no window
    exists: Tensor  # [B, L]
    n_windows: Tensor  # [B]


def _lay_out(
    values: Tensor, starts: Tensor, lengths: Tensor, widths: Tensor, L: int
) -> tuple[_Windows, Tensor]:
    """Means of the windows of B sequences of at most L values, and where one holds a NaN [K, B]."""
    place = torch.arange(L, device=values.device)
    inside = place < lengths[:, None]
    index = (starts[:, None] + place).clamp(max=values.shape[1] - 1)
    x = torch.where(inside, values[:, index], 0.0).double()  # [K, B, L]
    # inf - inf is nan: running sums are of finite values, the infinite ones are counted beside them
    running = torch.where(x.isfinite(), x, 0.0).cumsum(dim=2)
    up, down = (x.isposinf().cumsum(dim=2), x.isneginf().cumsum(dim=2))
    width = torch.minimum(widths, lengths.clamp(min=1))
    count = (lengths - width + 1) * (lengths > 0)
    exists = place < count[:, None]
    last = (place + width[:, None] - 1).clamp(max=L - 1).expand_as(x)

    def of_window(total: Tensor) -> Tensor:
        before = torch.nn.functional.pad(total[:, :, :-1], (1, 0))
        return total.gather(2, last) - before

    mean = of_window(running) / width[:, None]
    mean = torch.where(of_window(up) > 0, float("inf"), mean)
    below = torch.where(mean == float("inf"), float("nan"), float("-inf"))
    mean = torch.where(of_window(down) > 0, below, mean)
    mean = torch.where(exists, mean, float("inf"))
    return _Windows(mean, exists, count), x.isnan().any(dim=2)


def _torch_groups(
    scores: Tensor, eligible: Tensor, offsets: Tensor, temperature: float, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Argmax [K, P]; max, mean, std, log_mean_exp [4, K, P]; advantage, weights [2, K, N]."""
    N, P = scores.shape[1], offsets.shape[0] - 1
    member = torch.arange(N, device=scores.device)
    group = torch.searchsorted(offsets, member, right=True) - 1
    grouped = (group >= 0) & (group < P)
    group = group.clamp(0, P - 1)
    counts = eligible & grouped
    chosen_from = counts & ~scores.isnan()
    x = scores.double()
    n = _reduce(counts.double()[None], "sum", offsets)
    mean = _reduce(torch.where(counts, x, 0.0), "sum", offsets) / n
    top = _reduce(torch.where(chosen_from, x, float("-inf")), "max", offsets)
    found = _reduce(chosen_from.double(), "sum", offsets) > 0
    place = (member - offsets[group]).double()
    is_top = chosen_from & (x == top[:, group])
    first = _reduce(torch.where(is_top, place, float("inf")), "min", offsets)
    argmax = torch.where(found, first, -1.0).long()

    apart = torch.where(counts, x - mean[:, group], 0.0)
    std = (_reduce(apart.square(), "sum", offsets) / (n - 1).clamp(min=1)).sqrt()
    std = std.masked_fill(n == 0, float("nan"))
    shift = torch.where(found & (top != float("-inf")), top, 0.0)
    e = torch.where(counts, ((x - shift[:, group]) / temperature).exp(), 0.0)
    mass = _reduce(e, "sum", offsets)
    log_mean_exp = shift + temperature * (mass / n).log()
    top = top.masked_fill(~found, float("nan"))
    advantage = torch.where(counts, apart / (std[:, group] + epsilon), 0.0)
    weights = torch.where(counts, e / mass[:, group], 0.0)
    per_group = torch.stack([top, mean, std, log_mean_exp])
    per_member = torch.stack([advantage, weights])
    return argmax, per_group.to(scores.dtype), per_member.to(scores.dtype)


def _reduce(x: Tensor, how: str, offsets: Tensor) -> Tensor:
    """Each segment of each row of `x` [K, S] reduced: [K, N]."""
    return torch.stack([torch.segment_reduce(row, how, offsets=offsets) for row in x])
