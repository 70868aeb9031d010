"""`token_logprob` in Triton: one program a row and segment, which reads each logit once.

A lane takes 16 bytes at a time and keeps running sums of its own, centred on its own running
maximum (online softmax, Milakov & Gimelshein 2018, arXiv:1805.02867): no thread waits for another
before the segment ends. Lanes are then summed, and segments merged from the first column on.

Segments, lanes and the order of every sum are fixed by the dtype alone, never by R, alignment or
what is asked for; there are no atomics: a row has the same bits in any batch. A sum that `tl.sum`
takes has the order of the layout, which Triton picks by alignment and by what else the kernel
computes: the sums here spell theirs out. Launches are without fp fusion, which would differ
likewise; `tl.fma` asks for it by name.

In this order: reading logits, sums of one fixed order, the forward kernel, what a pair reads (its
logit, its rank), the k best columns, the gradient, launches. `_linear_logprob_vendor` launches some
of these kernels on the logits that it makes.

R rows of logits, S (row, target) pairs, V vocabulary.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton_state as state
from ._head import Transform
from ._state import Pairs, Partial, largest
from ._triton_state import exp
from .stats import Wanted

INF = tl.constexpr(float("inf"))
# chosen by the instructions and registers of the cubin, not measured: 64 bytes a thread in flight.
# SEGMENT: long enough that summing the lanes is little beside it, short enough that a few
# rows of a large vocabulary occupy the GPU
FORWARD: dict[str, Any] = {"SEGMENT": 32768, "UNROLL": 4, "LANES": 128}
FORWARD |= {"num_warps": 4, "enable_fp_fusion": False}
MERGE: dict[str, Any] = {"BLOCK_R": 128, "num_warps": 4, "enable_fp_fusion": False}
# chosen by the instructions and registers of the cubin, not measured
CHOSEN: dict[str, Any] = {"BLOCK_S": 128, "num_warps": 4, "enable_fp_fusion": False}
RANK: dict[str, Any] = {"SEGMENT": 32768, "UNROLL": 4, "LANES": 128}
RANK |= {"num_warps": 4, "enable_fp_fusion": False}
# chosen: a run is 64 bytes of bf16
RUN = 32
MAXIMA: dict[str, Any] = {"BLOCK_V": 4096, "num_warps": 4, "enable_fp_fusion": False}
CANDIDATES: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
# of the maxima of some rows, and as much three times over for their order
BLOCK_ELEMENTS = 2**22
# chosen, not measured
BACKWARD: dict[str, Any] = {"BLOCK_V": 4096, "num_warps": 8, "enable_fp_fusion": False}


@triton.jit
def tanh(y):
    """The hyperbolic tangent, off by two units in the last place, and rising in y."""
    # 1 - 2 e / (1 + e) cancels near 0: a polynomial there, fitted to a relative error of 3e-9
    y2 = y * y
    near = tl.fma(y2, -0.005895163547, 0.020795976705)
    near = tl.fma(y2, near, -0.053783831901)
    near = tl.fma(y2, near, 0.133319241477)
    near = tl.fma(y2, near, -0.333332980030)
    near = tl.fma(y * y2, near, y)
    e = exp(-2 * tl.abs(y))
    far = 1 - 2 * e / (1 + e)
    return tl.where(tl.abs(y) < 0.6, near, tl.where(y < 0, -far, far))


# how logits are read is handed on in two tuples:
#   how  bias_ptr [>= V], vocab_mask_ptr [>= V] uint8, stride_v, stride_b, and the three numbers
#        softcap, 1 / softcap and 1 / temperature
#   HAS  whether there are a bias, a mask, a softcap and a temperature: the others are not read


@triton.jit
def logit(x, bias, how, HAS: tl.constexpr):
    """`x` as it enters the distribution, but for the mask."""
    z = x.to(tl.float32)
    if HAS[0]:
        z += bias.to(tl.float32)
    if HAS[2]:
        z = how[4][0] * tanh(z * how[4][1])
    if HAS[3]:
        z *= how[4][2]
    return z


@triton.jit
def _load(ptr, offs, stride, inside, IS_WHOLE: tl.constexpr):
    if IS_WHOLE:
        return tl.load(ptr + offs.to(tl.int64) * stride)
    else:
        return tl.load(ptr + offs.to(tl.int64) * stride, mask=inside, other=0)


@triton.jit
def load_logits(
    logits_ptr,  # of the row
    how,
    offs_v,
    inside,  # columns to read; the others are -inf
    IS_WHOLE: tl.constexpr,  # `inside` is true everywhere
    HAS: tl.constexpr,
):
    """Logits of a row at `offs_v`, of any shape; -inf outside and where the mask is."""
    x = _load(logits_ptr, offs_v, how[2], inside, IS_WHOLE)
    bias = 0.0
    if HAS[0]:
        bias = _load(how[0], offs_v, how[3], inside, IS_WHOLE)
    z = logit(x, bias, how, HAS)
    if HAS[1]:
        z = tl.where(_load(how[1], offs_v, 1, inside, IS_WHOLE) != 0, z, -INF)
    if not IS_WHOLE:
        z = tl.where(inside, z, -INF)
    return z


@triton.jit
def load_lanes(
    logits_ptr,
    how,
    offs_v,  # [LANES] of the first of VECTOR neighbouring columns
    V,
    IS_WHOLE: tl.constexpr,
    HAS: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    VECTOR: tl.constexpr,
    STEP: tl.constexpr = tl.constexpr(1),  # noqa: B008  a constant
):
    """Logits [LANES, VECTOR] of a row, -inf from V on and where the mask is; VECTOR a thread.

    Where the addresses are aligned in one load. Elsewhere in VECTOR loads, which Triton would
    give to neighbouring threads, to pass what they found on to their lane.
    """
    if IS_ALIGNED:
        offs_v = offs_v[:, None] + tl.arange(0, VECTOR)[None, :]
    if IS_ALIGNED or STEP == VECTOR:
        return load_logits(logits_ptr, how, offs_v, offs_v < V, IS_WHOLE, HAS)
    else:
        even = load_lanes(logits_ptr, how, offs_v, V, IS_WHOLE, HAS, False, VECTOR, 2 * STEP)
        offs_v += STEP
        odd = load_lanes(logits_ptr, how, offs_v, V, IS_WHOLE, HAS, False, VECTOR, 2 * STEP)
        both = tl.join(even, odd)
        if STEP == 1:
            both = tl.reshape(both, [offs_v.shape[0], VECTOR])
        return both


@triton.jit
def load_tile(
    logits_ptr,
    how,
    offs_v,  # [LANES]
    V,
    HAS: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Logits [LANES, VECTOR, 2, ...] of UNROLL times LANES vectors, all of them columns.

    Loads of their own, joined: in a load of them all Triton may give a lane's to several warps.
    """
    if UNROLL == 1:
        return load_lanes(logits_ptr, how, offs_v, V, True, HAS, IS_ALIGNED, VECTOR)
    else:
        HALF: tl.constexpr = UNROLL // 2
        left = load_tile(logits_ptr, how, offs_v, V, HAS, IS_ALIGNED, VECTOR, HALF)
        offs_v += HALF * VECTOR * offs_v.shape[0]
        right = load_tile(logits_ptr, how, offs_v, V, HAS, IS_ALIGNED, VECTOR, HALF)
        return tl.join(left, right)


@triton.jit
def fold(x, ROWS: tl.constexpr, N: tl.constexpr):
    """Sums [ROWS] of `x` [ROWS, N], N a power of 2 up to 1024, by neighbouring pairs."""
    x = tl.reshape(x, [ROWS, N])
    for _ in tl.static_range(10):  # pyright: ignore[reportGeneralTypeIssues]  Triton unrolls it
        if x.shape[1] > 1:
            a, b = tl.split(tl.reshape(x, [ROWS, x.shape[1] // 2, 2]))
            x = a + b
    return tl.reshape(x, [ROWS])


@triton.jit
def fold_product(x, y, ROWS: tl.constexpr, N: tl.constexpr):
    """Sums [ROWS] of `x * y`, both [ROWS, N], as `fold` takes them; N above 1."""
    a, b = tl.split(tl.reshape(x, [ROWS, N // 2, 2]))
    c, d = tl.split(tl.reshape(y, [ROWS, N // 2, 2]))
    return fold(tl.fma(b, d, a * c), ROWS, N // 2)


@triton.jit
def fold_top_two(first, second, ROWS: tl.constexpr, N: tl.constexpr):
    """The two largest [ROWS] out of pairs of falling numbers, both [ROWS, N]."""
    first = tl.reshape(first, [ROWS, N])
    second = tl.reshape(second, [ROWS, N])
    for _ in tl.static_range(10):  # pyright: ignore[reportGeneralTypeIssues]  Triton unrolls it
        if first.shape[1] > 1:
            a, b = tl.split(tl.reshape(first, [ROWS, first.shape[1] // 2, 2]))
            c, d = tl.split(tl.reshape(second, [ROWS, second.shape[1] // 2, 2]))
            first = tl.maximum(a, b)
            second = tl.maximum(tl.minimum(a, b), tl.maximum(c, d))
    return tl.reshape(first, [ROWS]), tl.reshape(second, [ROWS])


@triton.jit
def fold_lanes(x, LANES: tl.constexpr):
    """The sum of `x` [LANES], a scalar."""
    # of one element: no order
    return tl.sum(fold(x, 1, LANES), axis=0)


@triton.jit
def _row_kernel(
    logits_ptr,  # in  [R, >= V] fp16 | bf16 | fp32
    bias_ptr,  # in  [>= V], read if HAS_BIAS
    vocab_mask_ptr,  # in  [>= V] uint8, read if HAS_MASK
    part_ptr,  # out [len(FIELDS), ...] fp32: of this row and segment, fields part_step apart
    V,
    n_segments,
    part_row,  # elements from one row of `part_ptr` to the next
    part_segment,
    part_step,
    stride_r,
    stride_v,
    stride_b,
    softcap,
    inverse_softcap,
    inverse_temperature,
    order,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    IS_ALIGNED: tl.constexpr,  # rows begin at multiples of 16 bytes, and have no gaps
    WANT: tl.constexpr,
    VECTOR: tl.constexpr,
    SEGMENT: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
):
    numbers = softcap, inverse_softcap, inverse_temperature
    how = bias_ptr, vocab_mask_ptr, stride_v, stride_b, numbers
    HAS: tl.constexpr = (HAS_BIAS, HAS_MASK, HAS_SOFTCAP, HAS_TEMPERATURE)  # pyright: ignore[reportAssignmentType]  of jit code
    STEP: tl.constexpr = LANES * VECTOR
    BLOCK_V: tl.constexpr = UNROLL * STEP
    row = (tl.program_id(0) // n_segments).to(tl.int64)  # row * stride_r passes 2**31
    segment = tl.program_id(0) % n_segments
    if IS_ALIGNED:
        # tells the compiler
        stride_r = stride_r // VECTOR * VECTOR
    logits_ptr += row * stride_r
    near = tl.arange(0, LANES) * VECTOR  # 16 bytes a lane
    offs_near = near[:, None] + tl.arange(0, VECTOR)[None, :]
    first = segment * SEGMENT
    whole = V // BLOCK_V * BLOCK_V
    sums = state.empty(LANES)
    # no mask over whole tiles: with one, V alone could forbid wide loads
    for start in range(first, tl.minimum(first + SEGMENT, whole), BLOCK_V):
        z = load_tile(logits_ptr, how, start + near, V, HAS, IS_ALIGNED, VECTOR, UNROLL)
        z = tl.reshape(z, [LANES, UNROLL * VECTOR])
        sums = _with_tile(sums, z, z == z, start, order, True, WANT, LANES, UNROLL * VECTOR)
    # only the last segment goes beyond them
    for start in range(tl.maximum(first, whole), tl.minimum(first + SEGMENT, V), STEP):
        z = load_lanes(logits_ptr, how, start + near, V, False, HAS, IS_ALIGNED, VECTOR)
        inside = start + offs_near < V
        sums = _with_tile(sums, z, inside, start, order, False, WANT, LANES, VECTOR)

    # the lanes, each centred on the segment's top
    lane_top = sums[0]
    top = tl.max(lane_top, axis=0)
    shift = tl.where(top == -INF, 0.0, top)
    moved = state.moved(sums, shift, order, WANT)
    _, mass, sum_ez, m2, sum_e2, sum_pow, sum_z, n_valid, second, tile = moved
    part_ptr += row * part_row + segment.to(tl.int64) * part_segment
    step = tl.full((), part_step, tl.int64)
    row_mass = fold_lanes(mass, LANES)
    tl.store(part_ptr, top)
    tl.store(part_ptr + step, row_mass)
    if state.SUM_EZ & WANT:
        row_sum_ez = fold_lanes(sum_ez, LANES)
        tl.store(part_ptr + 2 * step, row_sum_ez)
        if state.M2 & WANT:
            # squares about each lane's mean become sum_e2 about the common one
            mean = row_sum_ez / tl.where(row_mass == 0.0, 1.0, row_mass)
            apart = sum_ez / tl.where(mass == 0.0, 1.0, mass) - mean
            tl.store(part_ptr + 3 * step, fold_lanes(m2 + mass * apart * apart, LANES))
    if state.SUM_E2 & WANT:
        tl.store(part_ptr + 4 * step, fold_lanes(sum_e2, LANES))
    if state.SUM_POW & WANT:
        tl.store(part_ptr + 5 * step, fold_lanes(sum_pow, LANES))
    if state.SUM_Z & WANT:
        row_sum_z = fold_lanes(sum_z, LANES)
        row_valid = tl.sum(n_valid, axis=0)
        if row_sum_z == -INF:
            # masked columns: they are told apart here alone, not in every tile of every row
            sum_z = tl.zeros([LANES], tl.float32)
            n_valid = tl.zeros([LANES], tl.float32)
            for start in range(first, tl.minimum(first + SEGMENT, V), STEP):
                z = load_lanes(logits_ptr, how, start + near, V, False, HAS, IS_ALIGNED, VECTOR)
                valid = z != -INF
                sum_z += fold(tl.where(valid, z - shift, 0.0), LANES, VECTOR)
                n_valid += tl.sum(valid.to(tl.float32), axis=1)
            row_sum_z = fold_lanes(sum_z, LANES)
            row_valid = tl.sum(n_valid, axis=0)
        tl.store(part_ptr + 6 * step, row_sum_z)
        tl.store(part_ptr + 7 * step, row_valid)
    if state.SECOND & WANT:
        _, row_second = fold_top_two(lane_top, second, 1, LANES)
        tl.store(part_ptr + 8 * step, tl.max(row_second, axis=0))
    if state.COLUMN & WANT:
        # the lanes that hold the maximum look for it in the tile where they met it first
        column = tl.full([LANES, VECTOR], state.NONE, tl.int32)
        for start in range(0, BLOCK_V, STEP):
            offs_v = tile[:, None] + start + offs_near
            inside = (offs_v < V) & (lane_top == top)[:, None]
            z = load_logits(logits_ptr, how, offs_v, inside, False, HAS)
            column = tl.minimum(column, tl.where(inside & (z == top), offs_v, state.NONE))
        lowest = tl.min(tl.min(column, axis=1), axis=0)
        tl.store(part_ptr + 9 * step, lowest.to(tl.float32, bitcast=True))


@triton.jit
def _with_tile(
    sums,  # of [LANES] lanes
    z,  # [LANES, N] logits to the right of those in `sums`
    inside,  # the same shape: which of them are columns, read unless IS_WHOLE
    start,
    order,
    IS_WHOLE: tl.constexpr,
    WANT: tl.constexpr,
    LANES: tl.constexpr,
    N: tl.constexpr,
):
    """`sums` and the columns of `z`; the sum_z of a lane that has a masked column is -inf."""
    tile_top = tl.max(z, axis=1)  # drops nan; the mass below does not
    top = tl.maximum(sums[0], tile_top)
    # all columns so far may be masked: shift by 0 there, or -inf - -inf is nan
    shift = tl.where(top == -INF, 0.0, top)
    c = z - shift[:, None]
    e = exp(c)
    mass = fold(e, LANES, N)
    zero = tl.zeros([LANES], tl.float32)
    sum_ez, m2, sum_e2, sum_pow, sum_z, n_valid = zero, zero, zero, zero, zero, zero
    second = zero
    column = tl.zeros([LANES], tl.int32)
    if state.SUM_EZ & WANT:
        # a masked column adds 0; 0 * -inf would add nan
        near = tl.maximum(c, state.FAR)
        sum_ez = fold_product(e, near, LANES, N)
        if state.M2 & WANT:
            mean = sum_ez / tl.where(mass == 0.0, 1.0, mass)
            apart = near - mean[:, None]
            m2 = fold_product(e * apart, apart, LANES, N)
    if state.SUM_E2 & WANT:
        sum_e2 = fold_product(e, e, LANES, N)
    if state.SUM_POW & WANT:
        sum_pow = fold(exp(order * c), LANES, N)
    if state.SUM_Z & WANT:
        if IS_WHOLE:
            sum_z = fold(c, LANES, N)
            n_valid += N
        else:
            sum_z = fold(tl.where(inside, c, 0.0), LANES, N)
            n_valid = tl.sum(inside.to(tl.float32), axis=1)
    if state.COLUMN & WANT:
        # not the column but its tile: the segment's end looks there again
        column += start
    if state.SECOND & WANT:
        _, second = fold_top_two(z, tl.full([LANES, N], -INF, tl.float32), LANES, N)
    tile = (tile_top, mass, sum_ez, m2, sum_e2, sum_pow, sum_z, n_valid, second, column)
    return state.summed(state.moved(sums, shift, order, WANT), tile, top, WANT)


@triton.jit
def _chosen_kernel(
    logits_ptr,  # in  [R, >= V]
    bias_ptr,
    vocab_mask_ptr,
    row_ptr,  # in  [S] int64
    target_ptr,  # in  [S] int64
    chosen_ptr,  # out [S] fp32: the target's logit; left alone outside the rows and columns
    S,
    R,
    first_v,
    V,
    stride_r,
    stride_v,
    stride_b,
    softcap,
    inverse_softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    numbers = softcap, inverse_softcap, inverse_temperature
    how = bias_ptr, vocab_mask_ptr, stride_v, stride_b, numbers
    HAS: tl.constexpr = (HAS_BIAS, HAS_MASK, HAS_SOFTCAP, HAS_TEMPERATURE)  # pyright: ignore[reportAssignmentType]  of jit code
    offs_s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    row = tl.load(row_ptr + offs_s, mask=offs_s < S, other=-1)
    column = tl.load(target_ptr + offs_s, mask=offs_s < S, other=-1) - first_v
    inside = (row >= 0) & (row < R) & (column >= 0) & (column < V)
    z = load_logits(logits_ptr + row * stride_r, how, column, inside, False, HAS)
    tl.store(chosen_ptr + offs_s, z, mask=inside)


@triton.jit
def _rank_kernel(
    logits_ptr,  # in  [R, >= V]
    bias_ptr,
    vocab_mask_ptr,
    row_ptr,  # in  [S] int64
    target_ptr,  # in  [S] int64
    chosen_ptr,  # in  [S] fp32: the target's logit
    ahead_ptr,  # out [S, n_segments] int32
    n_segments,
    R,
    first_v,
    V,
    stride_r,
    stride_v,
    stride_b,
    softcap,
    inverse_softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    VECTOR: tl.constexpr,
    SEGMENT: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
):
    numbers = softcap, inverse_softcap, inverse_temperature
    how = bias_ptr, vocab_mask_ptr, stride_v, stride_b, numbers
    HAS: tl.constexpr = (HAS_BIAS, HAS_MASK, HAS_SOFTCAP, HAS_TEMPERATURE)  # pyright: ignore[reportAssignmentType]  of jit code
    STEP: tl.constexpr = LANES * VECTOR
    BLOCK_V: tl.constexpr = UNROLL * STEP
    s = (tl.program_id(0) // n_segments).to(tl.int64)
    first = tl.program_id(0) % n_segments * SEGMENT
    row = tl.load(row_ptr + s)
    chosen = tl.load(chosen_ptr + s)
    # of equal logits those further left are ahead, but for a masked target
    left = tl.minimum(tl.maximum(tl.load(target_ptr + s) - first_v, 0), V).to(tl.int32)
    left = tl.where(chosen == -INF, 0, left)
    if IS_ALIGNED:
        stride_r = stride_r // VECTOR * VECTOR
    logits_ptr += row * stride_r
    # nothing to read for a row outside
    V = tl.where((row >= 0) & (row < R), V, 0)
    whole = V // BLOCK_V * BLOCK_V
    near = tl.arange(0, LANES) * VECTOR  # 16 bytes a lane
    offs_near = near[:, None] + tl.arange(0, VECTOR)[None, :]
    ahead = tl.zeros([LANES], tl.int32)
    for start in range(first, tl.minimum(first + SEGMENT, whole), BLOCK_V):
        for u in tl.static_range(UNROLL):  # pyright: ignore[reportGeneralTypeIssues]  Triton unrolls
            z = load_lanes(
                logits_ptr, how, start + u * STEP + near, V, True, HAS, IS_ALIGNED, VECTOR
            )
            ahead += _count_ahead(z, start + u * STEP + offs_near, chosen, left)
    for start in range(tl.maximum(first, whole), tl.minimum(first + SEGMENT, V), STEP):
        z = load_lanes(logits_ptr, how, start + near, V, False, HAS, IS_ALIGNED, VECTOR)
        ahead += _count_ahead(z, start + offs_near, chosen, left)
    tl.store(ahead_ptr + tl.program_id(0), tl.sum(ahead, axis=0))


@triton.jit
def _count_ahead(z, offs_v, chosen, left):
    """How many of `z` [LANES, VECTOR] are ahead of `chosen`, lane by lane."""
    ahead = (z > chosen) | ((z == chosen) & (offs_v < left))
    return tl.sum(ahead.to(tl.int32), axis=1)


@triton.jit
def _maxima_kernel(
    logits_ptr,  # in  [R, >= V]
    bias_ptr,
    vocab_mask_ptr,
    maxima_ptr,  # out [some rows, n_runs] fp32
    first_row,
    V,
    n_runs,
    stride_r,
    stride_v,
    stride_b,
    softcap,
    inverse_softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    VECTOR: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    numbers = softcap, inverse_softcap, inverse_temperature
    how = bias_ptr, vocab_mask_ptr, stride_v, stride_b, numbers
    HAS: tl.constexpr = (HAS_BIAS, HAS_MASK, HAS_SOFTCAP, HAS_TEMPERATURE)  # pyright: ignore[reportAssignmentType]  of jit code
    N: tl.constexpr = BLOCK_V // RUN
    row = (tl.program_id(0) // tl.cdiv(V, BLOCK_V)).to(tl.int64)
    tile = tl.program_id(0) % tl.cdiv(V, BLOCK_V)
    if IS_ALIGNED:
        # tells the compiler
        stride_r = stride_r // VECTOR * VECTOR
    offs_n = tile * N + tl.arange(0, N)
    offs_v = offs_n[:, None] * RUN + tl.arange(0, RUN)[None, :]
    logits_ptr += (first_row + row) * stride_r
    if (tile + 1) * BLOCK_V <= V:
        z = load_logits(logits_ptr, how, offs_v, offs_v < V, True, HAS)
    else:
        z = load_logits(logits_ptr, how, offs_v, offs_v < V, False, HAS)
    tl.store(maxima_ptr + row * n_runs + offs_n, tl.max(z, axis=1), mask=offs_n < n_runs)


@triton.jit
def _candidates_kernel(
    logits_ptr,  # in  [R, >= V]
    bias_ptr,
    vocab_mask_ptr,
    run_ptr,  # in  [some rows, n_best] int64
    z_ptr,  # out [some rows, n_best, RUN] fp32
    first_row,
    V,
    n_best,
    stride_r,
    stride_v,
    stride_b,
    softcap,
    inverse_softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    numbers = softcap, inverse_softcap, inverse_temperature
    how = bias_ptr, vocab_mask_ptr, stride_v, stride_b, numbers
    HAS: tl.constexpr = (HAS_BIAS, HAS_MASK, HAS_SOFTCAP, HAS_TEMPERATURE)  # pyright: ignore[reportAssignmentType]  of jit code
    row = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    run = tl.load(run_ptr + row * n_best + offs_k, mask=offs_k < n_best, other=0)
    offs_v = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    z = load_logits(
        logits_ptr + (first_row + row) * stride_r,
        how,
        offs_v,
        (offs_v < V) & (offs_k < n_best)[:, None],
        False,
        HAS,
    )
    at = (row * n_best + offs_k)[:, None] * RUN + tl.arange(0, RUN)[None, :]
    tl.store(z_ptr + at, z, mask=(offs_k < n_best)[:, None])


@triton.jit
def _grad_kernel(
    logits_ptr,  # in  [R, width]
    bias_ptr,  # not read
    vocab_mask_ptr,  # in  [>= V] uint8, read if HAS_MASK
    grad_ptr,  # in  [4, S] fp32, sorted by row: of logprob, lse, entropy, self_certainty
    state_ptr,  # in  [4, R] fp32: top, log_mass, entropy, n_valid
    target_ptr,  # in  [S] int64, sorted by row
    first_ptr,  # in  [R + 1] int64: the pairs of row r are first[r] ... first[r + 1]
    dlogits_ptr,  # out [R, width] dtype of logits, contiguous
    R,
    S,
    V,
    width,
    temperature_by_softcap,
    stride_r,
    stride_v,
    stride_b,
    softcap,
    inverse_softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    numbers = softcap, inverse_softcap, inverse_temperature
    how = bias_ptr, vocab_mask_ptr, stride_v, stride_b, numbers
    HAS: tl.constexpr = (False, HAS_MASK, HAS_SOFTCAP, HAS_TEMPERATURE)  # pyright: ignore[reportAssignmentType]  of jit code
    row = (tl.program_id(0) // tl.cdiv(width, BLOCK_V)).to(tl.int64)
    start = tl.program_id(0) % tl.cdiv(width, BLOCK_V) * BLOCK_V
    near = tl.arange(0, BLOCK_V)
    offs_v = start + near
    first = tl.load(first_ptr + row)
    stop = tl.load(first_ptr + row + 1)
    chosen = 0.0
    prob = 0.0
    of_entropy = 0.0
    certain = 0.0
    reached = first < first
    for s in range(first, stop):
        of_logprob = tl.load(grad_ptr + s)
        of_lse = tl.load(grad_ptr + S + s)
        of_h = tl.load(grad_ptr + 2 * S + s)
        of_certainty = tl.load(grad_ptr + 3 * S + s)
        chosen += of_logprob
        prob += of_lse
        of_entropy += of_h
        certain += of_certainty
        reached |= (of_logprob != 0) | (of_lse != 0) | (of_h != 0) | (of_certainty != 0)

    step = tl.full((), R, tl.int64)
    top = tl.load(state_ptr + row)
    top = tl.where(top == -INF, 0.0, top)
    log_mass = tl.load(state_ptr + step + row)
    entropy = tl.load(state_ptr + 2 * step + row)
    n_valid = tl.load(state_ptr + 3 * step + row)
    if IS_ALIGNED:
        # tells the compiler
        stride_r = stride_r // VECTOR * VECTOR
    logits_ptr += row * stride_r
    # a row that no gradient reaches is not read: NaN in it or not, its gradient is exactly 0.
    # columns past V are: V alone could forbid wide loads
    kept = (offs_v < V) & reached
    x = tl.load(
        logits_ptr + offs_v.to(tl.int64) * stride_v, mask=(offs_v < width) & reached, other=0.0
    )
    if HAS_MASK:
        kept = kept & (tl.load(vocab_mask_ptr + offs_v, mask=kept, other=0) != 0)
    z = logit(x, 0.0, how, HAS)
    counts = kept & (z != -INF)
    log_p = (z - top) - log_mass
    p = exp(log_p)
    dz = p * (prob + certain - chosen)
    if of_entropy != 0:
        # dH / dz = -p (log p + H)
        dz -= p * (log_p + entropy) * of_entropy
    if certain != 0:
        dz -= certain / n_valid
    for s in range(first, stop):
        target = tl.load(target_ptr + s) - start
        # of the row's tiles one holds it
        if (target >= 0) & (target < BLOCK_V):
            dz += tl.where(near == target.to(tl.int32), tl.load(grad_ptr + s), 0.0)
    if HAS_SOFTCAP:
        capped = z * temperature_by_softcap
        dz *= 1 - capped * capped
    if HAS_TEMPERATURE:
        dz *= inverse_temperature
    dz = tl.where(counts, dz, 0.0)
    dlogits_ptr += row * width
    tl.store(dlogits_ptr + offs_v, dz.to(dlogits_ptr.dtype.element_ty), mask=offs_v < width)


def forward(
    logits: Tensor, transform: Transform, pairs: Pairs, wanted: Wanted
) -> tuple[Partial, Tensor]:
    """The partial of every row, and the logit of every pair's target.  Wants R > 0.

    Workspace: a few values a row and segment, and for the best columns what `best` says.
    """
    R = logits.shape[0]
    x = Reading(logits, transform)
    part = logits.new_empty((len(state.FIELDS), n_segments(x.V), R), dtype=torch.float32)
    chosen = logits.new_full(pairs.target.shape, float("nan"), dtype=torch.float32)
    with torch.cuda.device_of(logits):  # Triton launches on the current device, not the tensor's
        put_partials(x, part, wanted)
        found = merged(part, wanted)
        put_chosen(x, pairs.row, pairs.target, 0, chosen)
        if "best" in wanted.fields:
            values, columns = best(x, wanted.k)
            found = found._replace(best=values, best_column=columns)
    return found, chosen


def ranks(logits: Tensor, transform: Transform, pairs: Pairs, chosen: Tensor) -> Tensor:
    """Unmasked columns ahead of each pair's target [S] int64; any number for a pair outside."""
    with torch.cuda.device_of(logits):
        return ahead(Reading(logits, transform), pairs.row, pairs.target, 0, chosen)


def backward(
    grads: Tensor, state: Tensor, logits: Tensor, transform: Transform, pairs: Pairs
) -> Tensor:
    """Gradient of the logits [R, width]; `grads` [4, S] in the order of the pairs.  Wants R > 0."""
    R, width = logits.shape
    x = Reading(logits, transform)
    dlogits = logits.new_empty((R, width))
    by_softcap = transform.temperature / (transform.softcap or 1.0)
    of_pairs = grads.contiguous(), state, pairs.target.contiguous(), pairs.first, dlogits
    sizes = R, grads.shape[1], x.V, width, by_softcap
    flags = x.flags | x.vectors | BACKWARD
    with torch.cuda.device_of(logits):  # Triton launches on the current device, not the tensor's
        programs = R * triton.cdiv(width, BACKWARD["BLOCK_V"])
        _grad_kernel[(programs,)](*x.tensors, *of_pairs, *sizes, *x.numbers, **flags)
    return dlogits


class Reading:
    """What the launch of a kernel over logits takes, whatever the kernel."""

    def __init__(self, logits: Tensor, transform: Transform, bias: Tensor | None = None):
        mask = transform.vocab_mask
        self.V = transform.vocab_size
        self.R = logits.shape[0]
        bytes_or_any = logits if mask is None else mask.contiguous().view(torch.uint8)
        self.tensors: tuple[Tensor, Tensor, Tensor] = (
            logits,
            logits if bias is None else bias,
            bytes_or_any,
        )
        # a product each, as PyTorch divides on a GPU; a tiny temperature must not make 0 * inf
        largest = torch.finfo(torch.float32).max
        softcap = transform.softcap or 1.0
        stride_r, stride_v = logits.stride()
        # each a number to Triton, an int or a float
        self.numbers: tuple[Any, Any, Any, Any, Any, Any] = (
            stride_r,
            stride_v,
            0 if bias is None else bias.stride(0),
            softcap,
            min(1 / softcap, largest),
            min(1 / transform.temperature, largest),
        )
        self.flags: dict[str, Any] = {
            "HAS_BIAS": bias is not None,
            "HAS_MASK": mask is not None,
            "HAS_SOFTCAP": transform.softcap is not None,
            "HAS_TEMPERATURE": transform.temperature != 1.0,
        }
        # logits in 16 bytes, the widest load of a thread
        vector = 16 // logits.element_size()
        at_16_bytes = logits.data_ptr() % 16 == 0 and stride_r % vector == 0
        self.vectors: dict[str, Any] = {
            "IS_ALIGNED": stride_v == 1 and at_16_bytes,
            "VECTOR": vector,
        }


def n_segments(V: int) -> int:
    """Programs a row."""
    return -(-V // FORWARD["SEGMENT"])


def put_partials(x: Reading, part: Tensor, wanted: Wanted) -> None:
    """Write the partial of every row and segment into `part` [fields, n_segments, R]."""
    step, of_segment, of_row = part.stride()
    n = n_segments(x.V)
    sizes = x.V, n, of_row, of_segment, step
    flags = x.flags | x.vectors | _bits(wanted) | FORWARD
    _row_kernel[(x.R * n,)](*x.tensors, part, *sizes, *x.numbers, wanted.renyi_order, **flags)


def merged(part: Tensor, wanted: Wanted) -> Partial:
    """The partial of every row from those of its segments [fields, segments, R], contiguous."""
    fields, n, R = part.shape
    out = part[:, 0]
    if n > 1:
        out = part.new_empty((fields, R))
        state.merge_kernel[(triton.cdiv(R, MERGE["BLOCK_R"]),)](
            part, out, R, n, R, wanted.renyi_order, **_bits(wanted), **MERGE
        )
    found = {name: out[i] for i, name in enumerate(state.FIELDS) if name in wanted.fields}
    if "column" in found:
        found["column"] = found["column"].contiguous().view(torch.int32).long()
    return Partial(out[0], out[1], **found)


def _bits(wanted: Wanted) -> dict[str, Any]:
    return {"WANT": state.wanted_bits(wanted.fields)}


def put_chosen(x: Reading, row: Tensor, target: Tensor, first_v: int, chosen: Tensor) -> None:
    """Write into `chosen` [S] the logits of the targets that are in these rows and columns."""
    S = row.shape[0]
    if S > 0:
        of_pairs = row, target.contiguous(), chosen, S, x.R, first_v, x.V
        programs = triton.cdiv(S, CHOSEN["BLOCK_S"])
        _chosen_kernel[(programs,)](*x.tensors, *of_pairs, *x.numbers, **x.flags, **CHOSEN)


def ahead(x: Reading, row: Tensor, target: Tensor, first_v: int, chosen: Tensor) -> Tensor:
    """Unmasked columns of these ahead of each target [S] int64; 0 for a row outside."""
    S, n = row.shape[0], -(-x.V // RANK["SEGMENT"])
    counts = torch.empty((S, n), dtype=torch.int32, device=chosen.device)
    if S > 0:
        of_pairs = row, target.contiguous(), chosen, counts, n, x.R, first_v, x.V
        flags = x.flags | x.vectors | RANK
        _rank_kernel[(S * n,)](*x.tensors, *of_pairs, *x.numbers, **flags)
    return counts.sum(dim=1)


def best(x: Reading, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row [R, k], falling, and their columns, lowest first of a tie.

    Where V < k the rest is -inf, of any column. Workspace: some 64 MiB at most.
    """
    logits: Tensor = x.tensors[0]
    run_width: dict[str, Any] = {"RUN": RUN}
    n_runs = -(-x.V // RUN)
    n_best = min(k, n_runs)
    step = max(1, BLOCK_ELEMENTS // max(n_runs, n_best * RUN))
    values = logits.new_empty((x.R, k), dtype=torch.float32)
    columns = torch.empty((x.R, k), dtype=torch.int64, device=logits.device)
    offset = torch.arange(RUN, device=logits.device)
    for first in range(0, x.R, step):
        n = min(step, x.R - first)
        maxima = logits.new_empty((n, n_runs), dtype=torch.float32)
        programs = n * triton.cdiv(x.V, MAXIMA["BLOCK_V"])
        flags = x.flags | x.vectors | run_width | MAXIMA
        _maxima_kernel[(programs,)](*x.tensors, maxima, first, x.V, n_runs, *x.numbers, **flags)
        # in the order of their columns, so that of a tie the first is the lowest
        run = largest(maxima, n_best)[1].sort(dim=1).values
        z = logits.new_empty((n, n_best * RUN), dtype=torch.float32)
        flags = x.flags | run_width | {"BLOCK_K": triton.next_power_of_2(n_best)} | CANDIDATES
        _candidates_kernel[(n,)](*x.tensors, run, z, first, x.V, n_best, *x.numbers, **flags)
        rows = slice(first, first + n)
        values[rows], at = largest(z, k)
        column = (run[:, :, None] * RUN + offset).view(n, -1)
        columns[rows] = column.gather(1, at)
    return values, columns
