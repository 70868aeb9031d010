"""`segment_reduce` in PyTorch, on any device: sums in fp64, no loop over sequences.

Sums run over the values in order, one sequence by itself. For windows, sequences of about one
length are laid side by side and padded, a bounded number of values at a time.

S scored tokens, N sequences, P groups, K token statistics.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**20  # fp64 values laid side by side; chosen
WINDOWS = ("lowest_window", "bottom_windows", "tail_window")


class _Windows(NamedTuple):
    mean: Tensor  # [K, B, L] fp64, inf where there is no window
    exists: Tensor  # [B, L]
    n_windows: Tensor  # [B]


def _reduce(x: Tensor, how: str, offsets: Tensor) -> Tensor:
    """Each segment of each row of `x` [K, S] reduced: [K, N]."""
    return torch.stack([torch.segment_reduce(row, how, offsets=offsets) for row in x])


def sequences(values: Tensor, offsets: Tensor, widths: Tensor, stats: list[str]) -> list[Tensor]:
    """The asked statistics of every sequence, each [K, N]; `values` [K, S], N and K above 0."""
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


def groups(
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
