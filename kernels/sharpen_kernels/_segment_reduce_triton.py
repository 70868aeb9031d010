"""`segment_reduce` in Triton: one program a sequence and statistic, or a group and statistic.

Every sum is kept in fp64, lane by lane over tiles of a fixed size and then over the lanes: its
order depends on the sequence's own length alone. No atomics. Means of windows are differences of
running sums over the finite values; infinite ones are counted beside them, as inf - inf is nan.

S scored tokens, N sequences, P groups, K token statistics.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# chosen, not measured; fp fusion is spelled out: Triton 3.10 changes its default
SEQUENCE: dict[str, Any] = {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": True}
WINDOW: dict[str, Any] = {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": True}
GROUP: dict[str, Any] = {"BLOCK": 128, "num_warps": 1, "enable_fp_fusion": True}
BASES: tuple[str, ...] = ("sum", "mean", "min", "all")
WINDOWS: tuple[str, ...] = ("lowest_window", "bottom_windows", "tail_window")


@triton.jit
def _sequence_kernel(
    values_ptr,  # in  [K, S] fp32
    offsets_ptr,  # in  [N + 1] int64
    out_ptr,  # out [4, K, N] fp32: sum, mean, min, all
    running_ptr,  # out [K, S] fp64: sums of the finite values of a sequence so far
    infinite_ptr,  # out [K, S] int64: number of -inf so far + 2^32 times that of +inf
    K,
    N,
    S,
    WANT_WINDOWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    k = (tl.program_id(0) // N).to(tl.int64)
    n = tl.program_id(0) % N
    start = tl.load(offsets_ptr + n)
    length = (tl.load(offsets_ptr + n + 1) - start).to(tl.int32)
    first = k * S + start
    total = tl.zeros([BLOCK], tl.float64)
    low = tl.full([BLOCK], float("inf"), tl.float32)
    n_nan = tl.zeros([BLOCK], tl.int32)
    n_zero = tl.zeros([BLOCK], tl.int32)
    so_far = tl.full((), 0.0, tl.float64)
    inf_so_far = tl.full((), 0, tl.int64)
    for i in range(0, length, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        mask = offs < length
        x = tl.load(values_ptr + first + offs, mask=mask, other=0.0)
        total += x.to(tl.float64)
        low = tl.minimum(low, tl.where(mask, x, float("inf")))
        n_nan += (x != x).to(tl.int32)
        n_zero += (mask & (x == 0)).to(tl.int32)
        if WANT_WINDOWS:
            up = (x == float("inf")).to(tl.int64)
            down = (x == float("-inf")).to(tl.int64)
            finite = tl.where((up + down > 0) | (x != x), 0.0, x).to(tl.float64)
            infinite = down + up * 4294967296
            tl.store(running_ptr + first + offs, so_far + tl.cumsum(finite, axis=0), mask=mask)
            seen = inf_so_far + tl.cumsum(infinite, axis=0)
            tl.store(infinite_ptr + first + offs, seen, mask=mask)
            so_far += tl.sum(finite, axis=0)
            inf_so_far += tl.sum(infinite, axis=0)

    has_nan = tl.sum(n_nan, axis=0) > 0
    row_sum = tl.sum(total, axis=0)
    row_mean = row_sum / tl.maximum(length, 1).to(tl.float64)
    row_min = tl.where(has_nan, float("nan"), tl.min(low, axis=0))
    row_all = tl.where(has_nan, float("nan"), (tl.sum(n_zero, axis=0) == 0).to(tl.float32))
    step = tl.full((), K, tl.int64) * N
    out_ptr += k * N + n
    tl.store(out_ptr, row_sum.to(tl.float32))
    tl.store(out_ptr + step, row_mean.to(tl.float32))
    tl.store(out_ptr + 2 * step, row_min)
    tl.store(out_ptr + 3 * step, row_all)


@triton.jit
def _window_means(running_ptr, infinite_ptr, i, mask, width):
    """Means of the windows that start at `i`; of +inf and -inf together, nan."""
    before = mask & (i > 0)
    last = i + width - 1
    total = tl.load(running_ptr + last, mask=mask, other=0.0)
    total -= tl.load(running_ptr + i - 1, mask=before, other=0.0)
    infinite = tl.load(infinite_ptr + last, mask=mask, other=0)
    infinite -= tl.load(infinite_ptr + i - 1, mask=before, other=0)
    mean = total / width.to(tl.float64)
    mean = tl.where(infinite >= 4294967296, float("inf"), mean)
    below = infinite % 4294967296 > 0
    return tl.where(below, tl.where(mean == float("inf"), float("nan"), float("-inf")), mean)


@triton.jit
def _key(x):
    """Integers in the order of the numbers `x`, rounded to fp32."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _window_kernel(
    running_ptr,  # in  [K, S] fp64
    infinite_ptr,  # in  [K, S] int64
    offsets_ptr,  # in  [N + 1] int64
    width_ptr,  # in  [N] int64: values a window
    base_ptr,  # in  [4, K, N] fp32: of which min tells a nan
    out_ptr,  # out [3, K, N] fp32: lowest, bottom, tail
    K,
    N,
    S,
    WANT_BOTTOM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    k = (tl.program_id(0) // N).to(tl.int64)
    n = tl.program_id(0) % N
    start = tl.load(offsets_ptr + n)
    length = (tl.load(offsets_ptr + n + 1) - start).to(tl.int32)
    width = tl.minimum(tl.load(width_ptr + n), tl.maximum(length, 1)).to(tl.int32)
    n_windows = tl.where(length > 0, length - width + 1, 0)
    running_ptr += k * S + start
    infinite_ptr += k * S + start
    step = tl.full((), K, tl.int64) * N
    row_min = tl.load(base_ptr + 2 * step + k * N + n)
    low = tl.full([BLOCK], float("inf"), tl.float64)
    high = tl.full([BLOCK], float("-inf"), tl.float64)
    n_nan = tl.zeros([BLOCK], tl.int32)
    for i in range(0, n_windows, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        mask = offs < n_windows
        mean = _window_means(running_ptr, infinite_ptr, offs, mask, width)
        n_nan += (mask & (mean != mean)).to(tl.int32)
        low = tl.minimum(low, tl.where(mask, mean, float("inf")))
        high = tl.maximum(high, tl.where(mask, mean, float("-inf")))
    lost = (row_min != row_min) | (tl.sum(n_nan, axis=0) > 0)
    lowest = tl.min(low, axis=0)
    out_ptr += k * N + n
    empty = length == 0
    at_end = tl.maximum(n_windows - 1, 0)
    tail = _window_means(running_ptr, infinite_ptr, at_end, length > 0, width)
    tail = tl.where(row_min != row_min, float("nan"), tail)
    row_lowest = tl.where(lost, float("nan"), lowest)
    tl.store(out_ptr, tl.where(empty, 0.0, row_lowest).to(tl.float32))
    tl.store(out_ptr + 2 * step, tl.where(empty, 0.0, tail).to(tl.float32))
    if WANT_BOTTOM:
        # the bottom_n-th lowest mean by halving the range of its bits: no sort, no scratch
        bottom_n = tl.maximum(n_windows // 10, 1)
        below = _key(lowest)
        above = _key(tl.max(high, axis=0))
        while below < above:
            middle = (below & above) + ((below ^ above) >> 1)
            count = tl.zeros([BLOCK], tl.int32)
            for i in range(0, n_windows, BLOCK):
                offs = i + tl.arange(0, BLOCK)
                mask = offs < n_windows
                mean = _window_means(running_ptr, infinite_ptr, offs, mask, width)
                count += (mask & (_key(mean) <= middle)).to(tl.int32)
            enough = tl.sum(count, axis=0) >= bottom_n
            above = tl.where(enough, middle, above)
            below = tl.where(enough, below, middle + 1)
        n_less = tl.zeros([BLOCK], tl.int32)
        total = tl.zeros([BLOCK], tl.float64)
        for i in range(0, n_windows, BLOCK):
            offs = i + tl.arange(0, BLOCK)
            mask = offs < n_windows
            mean = _window_means(running_ptr, infinite_ptr, offs, mask, width)
            less = mask & (_key(mean) < above)
            n_less += less.to(tl.int32)
            total += tl.where(less, mean, 0.0)
        bits = tl.where(above < 0, above ^ 0x7FFFFFFF, above)
        threshold = bits.to(tl.float32, bitcast=True).to(tl.float64)
        equal = (bottom_n - tl.sum(n_less, axis=0)).to(tl.float64) * threshold
        bottom = (tl.sum(total, axis=0) + equal) / bottom_n.to(tl.float64)
        bottom = tl.where(lost, float("nan"), bottom)
        tl.store(out_ptr + step, tl.where(empty, 0.0, bottom).to(tl.float32))


@triton.jit
def _group_kernel(
    scores_ptr,  # in  [K, N] fp32
    eligible_ptr,  # in  [N] uint8
    offsets_ptr,  # in  [P + 1] int64
    numbers_ptr,  # in  [2] fp64: temperature, epsilon; as numbers they would arrive as fp32
    argmax_ptr,  # out [K, P] int64
    group_ptr,  # out [4, K, P] fp32: max, mean, std, log_mean_exp
    member_ptr,  # out [2, K, N] fp32: advantage, weights
    K,
    N,
    P,
    BLOCK: tl.constexpr,
):
    k = (tl.program_id(0) // P).to(tl.int64)
    p = tl.program_id(0) % P
    start = tl.load(offsets_ptr + p)
    length = (tl.load(offsets_ptr + p + 1) - start).to(tl.int32)
    temperature = tl.load(numbers_ptr)
    epsilon = tl.load(numbers_ptr + 1)
    scores_ptr += k * N + start
    eligible_ptr += start
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    at = tl.full([BLOCK], -1, tl.int32)
    count = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.float64)
    for i in range(0, length, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        mask = offs < length
        mask = mask & (tl.load(eligible_ptr + offs, mask=mask, other=0) != 0)
        x = tl.load(scores_ptr + offs, mask=mask, other=0.0)
        total += x.to(tl.float64)
        count += mask.to(tl.int32)
        better = mask & (x == x) & ((x > best) | (at < 0))
        best = tl.where(better, x, best)
        at = tl.where(better, offs, at)
    n = tl.sum(count, axis=0).to(tl.float64)
    mean = tl.sum(total, axis=0) / n
    top = tl.max(best, axis=0)
    winner = tl.min(tl.where((best == top) & (at >= 0), at, length), axis=0)
    found = winner < length
    shift = tl.where(found & (top != float("-inf")), top, 0.0).to(tl.float64)

    squares = tl.zeros([BLOCK], tl.float64)
    mass = tl.zeros([BLOCK], tl.float64)
    for i in range(0, length, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        mask = offs < length
        mask = mask & (tl.load(eligible_ptr + offs, mask=mask, other=0) != 0)
        x = tl.load(scores_ptr + offs, mask=mask, other=0.0).to(tl.float64)
        squares += tl.where(mask, (x - mean) * (x - mean), 0.0)
        mass += tl.where(mask, tl.exp((x - shift) / temperature), 0.0)
    std = tl.sqrt(tl.sum(squares, axis=0) / tl.maximum(n - 1, 1.0))
    std = tl.where(n > 0, std, float("nan"))
    row_mass = tl.sum(mass, axis=0)
    log_mean_exp = shift + temperature * tl.log(row_mass / n)
    step = tl.full((), K, tl.int64) * P
    group_ptr += k * P + p
    tl.store(argmax_ptr + k * P + p, tl.where(found, winner, -1).to(tl.int64))
    tl.store(group_ptr, tl.where(found, top, float("nan")))
    tl.store(group_ptr + step, mean.to(tl.float32))
    tl.store(group_ptr + 2 * step, std.to(tl.float32))
    tl.store(group_ptr + 3 * step, log_mean_exp.to(tl.float32))

    member_step = tl.full((), K, tl.int64) * N
    member_ptr += k * N + start
    for i in range(0, length, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        mask = offs < length
        mask = mask & (tl.load(eligible_ptr + offs, mask=mask, other=0) != 0)
        x = tl.load(scores_ptr + offs, mask=mask, other=0.0).to(tl.float64)
        advantage = (x - mean) / (std + epsilon)
        weight = tl.exp((x - shift) / temperature) / row_mass
        tl.store(member_ptr + offs, advantage.to(tl.float32), mask=mask)
        tl.store(member_ptr + member_step + offs, weight.to(tl.float32), mask=mask)


def sequences(values: Tensor, offsets: Tensor, widths: Tensor, stats: list[str]) -> list[Tensor]:
    """The asked statistics of every sequence, each [K, N]; `values` [K, S], N and K above 0."""
    (K, S), N = values.shape, offsets.shape[0] - 1
    windows = [name for name in stats if name in WINDOWS]
    has_windows: dict[str, Any] = {"WANT_WINDOWS": bool(windows)}
    has_bottom: dict[str, Any] = {"WANT_BOTTOM": "bottom_windows" in windows}
    out = values.new_empty((len(BASES), K, N))
    window_out = values.new_zeros((len(WINDOWS), K, N))
    scratch = (K, S) if windows else (0,)
    running = values.new_empty(scratch, dtype=torch.float64)
    infinite = torch.empty(scratch, dtype=torch.int64, device=values.device)
    with torch.cuda.device_of(values):  # Triton launches on the current device, not the tensor's
        tensors = values, offsets, out, running, infinite
        _sequence_kernel[(K * N,)](*tensors, K, N, S, **has_windows, **SEQUENCE)
        if windows:
            tensors = running, infinite, offsets, widths, out, window_out
            _window_kernel[(K * N,)](*tensors, K, N, S, **has_bottom, **WINDOW)
    found = dict(zip((*BASES, *WINDOWS), (*out, *window_out), strict=True))
    return [found[name] for name in stats]


def groups(
    scores: Tensor, eligible: Tensor, offsets: Tensor, temperature: float, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Argmax [K, P]; max, mean, std, log_mean_exp [4, K, P]; advantage, weights [2, K, N]."""
    (K, N), P = scores.shape, offsets.shape[0] - 1
    argmax = torch.empty((K, P), dtype=torch.int64, device=scores.device)
    per_group = scores.new_empty((4, K, P))
    per_member = scores.new_zeros((2, K, N))
    numbers = torch.tensor([temperature, epsilon], dtype=torch.float64, device=scores.device)
    with torch.cuda.device_of(scores):
        given = scores, eligible.view(torch.uint8), offsets, numbers
        _group_kernel[(K * P,)](*given, argmax, per_group, per_member, K, N, P, **GROUP)
    return argmax, per_group, per_member
