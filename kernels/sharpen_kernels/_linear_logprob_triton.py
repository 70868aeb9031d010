"""`linear_logprob` in Triton: logits live as tiles in fp32 on the chip.

    z = softcap(hidden W^T + b) / temperature, -inf in masked columns and past the vocabulary

Forward is one persistent kernel and a merge. A unit of work is a block of rows and a fixed segment
of the vocabulary, walked tile after tile: the next tile is on its way from memory while this one is
reduced to a few running sums a row. Ranks, the best columns and the gradient compute tiles again.
All kernels call `product` and `logits`, with one shape of tile and one order of sums, so a logit
that is compared, chosen or differentiated is the logit, bit for bit, that entered the row's sum.

Which shape a tile has is in `_tiles`, never by R; there are no atomics, and fp fusion is off (what
is fused is written `tl.fma`): a row scores the same bits in any batch and with any subset of
statistics. No call waits for the device, with `rows` or without, so all of this captures in a CUDA
graph. Workspace: at most 256 MiB, whatever R and V, beside a copy of the bias in fp32 and,
backward, the gradient of hidden in fp32.

In this order: a tile of logits, the forward kernel, ranks and logits, the gradient, launches.

R hidden rows, S (row, target) pairs, V vocabulary, D hidden.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tiles
from . import _triton_state as state
from ._checks import INTERPRETED
from ._head import Head, RowGrads
from ._state import Pairs, Partial, largest, merge
from ._triton_state import FIELDS, divide, exp, merge_kernel, tanh, wanted_bits
from .stats import Wanted

PARTIALS_BYTES = 64 * 2**20  # states of the segments of one pass of rows
PASS_BYTES = 64 * 2**20  # counts, or copies of hidden rows, of one pass
BEST_BYTES = 32 * 2**20  # logits of one pass: sorting them takes six times as much
GRADIENT_BYTES = 96 * 2**20  # gradients of logits; as much again for a wave of the weight's own
MERGE: dict[str, Any] = {"BLOCK_R": 128, "num_warps": 4, "enable_fp_fusion": False}
# rows of coef [len(COEFFICIENTS) + 1, R]; the last is 1 / mass
COEFFICIENTS = ("active", "top", "log_mass", "prob", "entropy", "of_entropy", "uniform")


@triton.jit
def grouped(unit, n_blocks, n_columns, GROUP_R: tl.constexpr):
    """Block of rows, and of columns, of a unit of work.

    Blocks of rows run fastest inside groups of GROUP_R, so that the programs of one moment share
    a little of the weight and of the hidden rows, both in L2.
    """
    per_group = tl.maximum(GROUP_R * n_columns, 1)
    first = unit // per_group * GROUP_R
    group = tl.maximum(tl.minimum(n_blocks - first, GROUP_R), 1)
    return first + unit % per_group % group, unit % per_group // group


@triton.jit
def my_units(n_blocks, V, SEGMENT: tl.constexpr, BLOCK_V: tl.constexpr):
    """Of this program: its tiles in whole segments, all its tiles, tiles of the ragged segment.

    Whole segments come first; units of the ragged one are shorter, and last.
    """
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    whole = (n_blocks * (V // SEGMENT) - pid + programs - 1) // programs
    every = (n_blocks * tl.cdiv(V, SEGMENT) - pid + programs - 1) // programs
    rest_tiles = tl.cdiv(V % SEGMENT, BLOCK_V)
    whole_tiles = whole * (SEGMENT // BLOCK_V)
    return whole_tiles, whole_tiles + (every - whole) * rest_tiles, rest_tiles


@triton.jit
def place(
    t,
    n_blocks,
    whole_tiles,
    rest_tiles,
    V,
    SEGMENT: tl.constexpr,
    GROUP_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Block of rows, segment, tile in the segment, and whether it is the last, of tile `t`."""
    TILES: tl.constexpr = SEGMENT // BLOCK_V
    n_whole = V // SEGMENT
    is_whole = t < whole_tiles
    # no unit has 0 tiles, but a divisor must not
    per_unit = tl.where(is_whole, TILES, tl.maximum(rest_tiles, 1))
    since = tl.where(is_whole, t, t - whole_tiles)
    before = tl.where(is_whole, 0, whole_tiles // TILES)
    unit = tl.program_id(0) + (before + since // per_unit) * tl.num_programs(0)
    tile = since % per_unit
    block, segment = grouped(unit, n_blocks, n_whole, GROUP_R)  # pyright: ignore[reportGeneralTypeIssues]  of jit code
    block = tl.where(is_whole, block, unit - n_blocks * n_whole)
    segment = tl.where(is_whole, segment, n_whole)
    return block, segment, tile, tile == per_unit - 1


# what a tile is made of is handed on in tuples:
#   sizes    R, V, D
#   strides  of hidden over rows and over D, of the weight over columns and over D
#   TILE     TMA, WIDEN, BLOCK_R, BLOCK_V, BLOCK_D
#   head     bias_ptr [V] fp32, -inf where masked; V, temperature, softcap
#   HAS      whether there are a bias, a softcap and a temperature: the others are not read


@triton.jit
def add_product(
    z,  # [BLOCK_R, BLOCK_V] fp32
    hidden,  # [R, D], a pointer, or a descriptor of [BLOCK_R, BLOCK_D] if TMA
    weight,  # [V, D], a pointer, or a descriptor of [BLOCK_V, BLOCK_D] if TMA
    row,
    column,
    k,
    sizes,
    strides,
    TILE: tl.constexpr,
):
    """`z` and block k of D of the product of a tile; what is past R, V and D is 0."""
    BLOCK_R: tl.constexpr = TILE[2]
    BLOCK_V: tl.constexpr = TILE[3]
    BLOCK_D: tl.constexpr = TILE[4]
    if TILE[0]:
        x = hidden.load([row, k * BLOCK_D])  # [BLOCK_R, BLOCK_D]
        w = weight.load([column, k * BLOCK_D])  # [BLOCK_V, BLOCK_D]
    else:
        # offsets pass 2**31: 16k rows x 152k columns, a head of 256k x 8192
        offs_r = (tl.cast(row, tl.int64) + tl.arange(0, BLOCK_R))[:, None]
        offs_v = (tl.cast(column, tl.int64) + tl.arange(0, BLOCK_V))[:, None]
        offs_d = (tl.cast(k * BLOCK_D, tl.int64) + tl.arange(0, BLOCK_D))[None, :]
        x_ptr = hidden + offs_r * strides[0] + offs_d * strides[1]
        w_ptr = weight + offs_v * strides[2] + offs_d * strides[3]
        x = tl.load(x_ptr, mask=(offs_r < sizes[0]) & (offs_d < sizes[2]), other=0.0)
        w = tl.load(w_ptr, mask=(offs_v < sizes[1]) & (offs_d < sizes[2]), other=0.0)
    # multiplied in fp32: dtypes differ, or the interpreter, blind to bf16
    if TILE[1]:
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    return tl.dot(x, w.T, z, input_precision="ieee")


@triton.jit
def product(hidden, weight, row, column, sizes, strides, TILE: tl.constexpr):
    """The product of a whole tile, block by block of D as the forward pass adds it."""
    z = tl.zeros([TILE[2], TILE[3]], tl.float32)
    for k in range(tl.maximum(tl.cdiv(sizes[2], TILE[4]), 1)):
        z = add_product(z, hidden, weight, row, column, k, sizes, strides, TILE)
    return z


@triton.jit
def logits(
    z,  # [BLOCK_R, columns] out of `add_product`
    offs_v,  # [columns]
    head,
    HAS: tl.constexpr,
):
    """The logits of a product; what is masked turns -inf last, whatever came before."""
    bias_ptr, V, temperature, softcap = head
    kept = offs_v < V
    if HAS[0]:
        bias = tl.load(bias_ptr + offs_v, mask=kept, other=float("-inf"))
        kept = bias != float("-inf")
        z += bias[None, :]
    if HAS[1]:
        z = softcap * tanh(divide(z, softcap))
    if HAS[2]:
        z = divide(z, temperature)
    return tl.where(kept[None, :], z, float("-inf"))


@triton.jit
def _half(z, RIGHT: tl.constexpr):
    left, right = tl.split(tl.permute(tl.reshape(z, [z.shape[0], 2, z.shape[1] // 2]), [0, 2, 1]))
    if RIGHT:
        return right
    else:
        return left


@triton.jit
def piece(z, i: tl.constexpr, PIECES: tl.constexpr):
    """Run i, from the left, of the columns of a tile cut in PIECES (1, 2, 4 or 8) equal runs.

    What is derived from a tile is derived piece by piece: beside the accumulators a few of
    their size would not fit the registers.
    """
    if PIECES == 1:
        return z
    elif PIECES == 2:
        return _half(z, i)
    elif PIECES == 4:
        return _half(_half(z, i // 2), i % 2)
    else:
        return _half(_half(_half(z, i // 4), i // 2 % 2), i % 2)


@triton.jit
def segment_kernel(
    hidden,  # in  [R, D] fp16 | bf16 | fp32
    weight,  # in  [V, D] fp16 | bf16 | fp32
    bias_ptr,  # in  [V] fp32, -inf where masked; read if HAS_BIAS
    target_ptr,  # in  [S] int64, sorted by row
    first_ptr,  # in  [R + 1] int64: the pairs of row r are first[r] ... first[r + 1]
    chosen_ptr,  # out [S] fp32, sorted by row
    part_ptr,  # out [len(FIELDS), n_segments, R] fp32
    R,
    V,
    D,
    stride_hr,
    stride_hd,
    stride_wv,
    stride_wd,
    temperature,
    softcap,
    order,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    WANT: tl.constexpr,
    ONE_PAIR: tl.constexpr,
    TMA: tl.constexpr,
    WIDEN: tl.constexpr,
    SEGMENT: tl.constexpr,
    GROUP_R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PIECES: tl.constexpr,
):
    sizes = R, V, D
    strides = stride_hr, stride_hd, stride_wv, stride_wd
    head = bias_ptr, V, temperature, softcap
    TILE: tl.constexpr = (TMA, WIDEN, BLOCK_R, BLOCK_V, BLOCK_D)  # pyright: ignore[reportAssignmentType]  of jit code
    HAS: tl.constexpr = (HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE)  # pyright: ignore[reportAssignmentType]  of jit code
    WIDTH: tl.constexpr = BLOCK_V // PIECES
    pairs = target_ptr, first_ptr, chosen_ptr
    n_blocks = tl.cdiv(R, BLOCK_R)
    n_segments = tl.cdiv(V, SEGMENT)
    whole_tiles, total, rest_tiles = my_units(n_blocks, V, SEGMENT, BLOCK_V)
    last_k = tl.maximum(tl.cdiv(D, BLOCK_D), 1) - 1

    sums = state.empty(BLOCK_R)
    lost = tl.zeros([BLOCK_R], tl.float32)
    z = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    # one loop over (tile, block of D): a tile is loaded while the one before it is reduced, so
    # each keeps its own count of where it is
    load_t, load_k, row, column = -1, last_k, 0, 0
    t, k = 0, -1
    for _step in tl.range(0, total * (last_k + 1)):
        load_k = tl.where(load_k == last_k, 0, load_k + 1)
        if load_k == 0:
            load_t += 1
            block, segment, tile, _last = place(
                load_t, n_blocks, whole_tiles, rest_tiles, V, SEGMENT, GROUP_R, BLOCK_V
            )
            row = block * BLOCK_R
            column = segment * SEGMENT + tile * BLOCK_V
        z = add_product(z, hidden, weight, row, column, load_k, sizes, strides, TILE)
        k += 1
        if k == last_k:
            block, segment, tile, is_last = place(
                t, n_blocks, whole_tiles, rest_tiles, V, SEGMENT, GROUP_R, BLOCK_V
            )
            t += 1
            k = -1
            start_v = segment * SEGMENT + tile * BLOCK_V
            offs_r = tl.cast(block * BLOCK_R, tl.int64) + tl.arange(0, BLOCK_R)
            sums = state.restart(sums, tile == 0, WANT)
            lost = tl.where(tile == 0, 0.0, lost)
            for i in tl.static_range(PIECES):
                start = start_v + i * WIDTH
                offs_v = start + tl.arange(0, WIDTH)
                zi = logits(piece(z, i, PIECES), offs_v, head, HAS)
                _chosen(zi, offs_v, start, pairs, offs_r, R, V, WIDTH, ONE_PAIR)
                sums, lost = state.with_tile(sums, zi, offs_v, lost, order, WANT)
            if is_last:
                step = tl.cast(R, tl.int64) * n_segments
                at = part_ptr + tl.cast(segment, tl.int64) * R + offs_r
                state.store(at, step, state.with_lost(sums, lost, WANT), offs_r < R)
            z = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)


@triton.jit
def _chosen(z, offs_v, start, pairs, offs_r, R, V, WIDTH: tl.constexpr, ONE_PAIR: tl.constexpr):
    """Write the logits of the targets that lie in this tile; `pairs` as in `segment_kernel`."""
    target_ptr, first_ptr, chosen_ptr = pairs
    mask_r = offs_r < R
    if ONE_PAIR:
        target = tl.load(target_ptr + offs_r, mask=mask_r, other=-1)
        near = (target >= start) & (target < start + WIDTH)
        # few tiles hold a target: the others need not be searched
        if tl.max(near.to(tl.int32), axis=0) > 0:
            here, logit = _pick(z, offs_v, start, V, target, WIDTH)
            tl.store(chosen_ptr + offs_r, logit, mask=here)
    else:
        first = tl.load(first_ptr + offs_r, mask=mask_r, other=0)
        n_pairs = (tl.load(first_ptr + offs_r + 1, mask=mask_r, other=0) - first).to(tl.int32)
        most = tl.max(n_pairs, axis=0)
        for k in range(most):
            target = tl.load(target_ptr + first + k, mask=k < n_pairs, other=-1)
            here, logit = _pick(z, offs_v, start, V, target, WIDTH)
            tl.store(chosen_ptr + first + k, logit, mask=here)


@triton.jit
def _pick(z, offs_v, start, V, target, WIDTH: tl.constexpr):
    """Where `target` lies in this tile, and its logit there."""
    here = (target >= start) & (target < start + WIDTH) & (target < V)
    column = tl.where(here, target, -1).to(tl.int32)
    return here, tl.sum(tl.where(offs_v[None, :] == column[:, None], z, 0.0), axis=1)


@triton.jit
def rank_kernel(
    hidden,  # in  [R, D] a row for each pair
    weight,  # in  [V, D]
    bias_ptr,  # in  [V] fp32, -inf where masked; read if HAS_BIAS
    target_ptr,  # in  [R] int64
    chosen_ptr,  # in  [R] fp32: the logit of the target
    ahead_ptr,  # out [tiles, R] int32
    R,
    V,
    D,
    stride_hr,
    stride_hd,
    stride_wv,
    stride_wd,
    temperature,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    TMA: tl.constexpr,
    WIDEN: tl.constexpr,
    GROUP_R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Count the unmasked columns of each tile that are ahead of the target."""
    sizes = R, V, D
    strides = stride_hr, stride_hd, stride_wv, stride_wd
    head = bias_ptr, V, temperature, softcap
    TILE: tl.constexpr = (TMA, WIDEN, BLOCK_R, BLOCK_V, BLOCK_D)  # pyright: ignore[reportAssignmentType]  of jit code
    HAS: tl.constexpr = (HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE)  # pyright: ignore[reportAssignmentType]  of jit code
    WIDTH: tl.constexpr = BLOCK_V // PIECES
    block, tile = grouped(tl.program_id(0), tl.cdiv(R, BLOCK_R), tl.cdiv(V, BLOCK_V), GROUP_R)  # pyright: ignore[reportGeneralTypeIssues]  of jit code
    row, column = block * BLOCK_R, tile * BLOCK_V
    z = product(hidden, weight, row, column, sizes, strides, TILE)
    offs_r = tl.cast(row, tl.int64) + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    own = tl.load(chosen_ptr + offs_r, mask=mask_r, other=float("inf"))[:, None]
    target = tl.load(target_ptr + offs_r, mask=mask_r, other=0)
    # an id past the columns compares like one that is just past them
    target = tl.minimum(tl.maximum(target, -1), V).to(tl.int32)[:, None]
    ahead = tl.zeros([BLOCK_R], tl.int32)
    for i in tl.static_range(PIECES):
        offs_v = column + i * WIDTH + tl.arange(0, WIDTH)
        zi = logits(piece(z, i, PIECES), offs_v, head, HAS)
        first = (zi > own) | ((zi == own) & (offs_v[None, :] < target))
        ahead += tl.sum((first & (zi > float("-inf"))).to(tl.int32), axis=1)
    tl.store(ahead_ptr + tl.cast(tile, tl.int64) * R + offs_r, ahead, mask=mask_r)


@triton.jit
def logits_kernel(
    hidden,  # in  [R, D]
    weight,  # in  [V, D]
    bias_ptr,  # in  [V] fp32, -inf where masked; read if HAS_BIAS
    z_ptr,  # out [R, stop - start] fp32
    start,
    stop,
    R,
    V,
    D,
    stride_hr,
    stride_hd,
    stride_wv,
    stride_wd,
    temperature,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    TMA: tl.constexpr,
    WIDEN: tl.constexpr,
    GROUP_R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Write the logits of the columns start ... stop - 1."""
    sizes = R, V, D
    strides = stride_hr, stride_hd, stride_wv, stride_wd
    head = bias_ptr, V, temperature, softcap
    TILE: tl.constexpr = (TMA, WIDEN, BLOCK_R, BLOCK_V, BLOCK_D)  # pyright: ignore[reportAssignmentType]  of jit code
    HAS: tl.constexpr = (HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE)  # pyright: ignore[reportAssignmentType]  of jit code
    WIDTH: tl.constexpr = BLOCK_V // PIECES
    n_tiles = tl.cdiv(stop - start, BLOCK_V)
    block, tile = grouped(tl.program_id(0), tl.cdiv(R, BLOCK_R), n_tiles, GROUP_R)
    row, column = block * BLOCK_R, start + tile * BLOCK_V
    z = product(hidden, weight, row, column, sizes, strides, TILE)
    offs_r = tl.cast(row, tl.int64) + tl.arange(0, BLOCK_R)
    out_ptr = z_ptr + offs_r[:, None] * (stop - start)
    for i in tl.static_range(PIECES):
        offs_v = column + i * WIDTH + tl.arange(0, WIDTH)
        zi = logits(piece(z, i, PIECES), offs_v, head, HAS)
        mask = (offs_r < R)[:, None] & (offs_v < stop)[None, :]
        tl.store(out_ptr + (offs_v - start)[None, :], zi, mask=mask)


@triton.jit
def grad_kernel(
    hidden,  # in  [R, D]
    weight,  # in  [V, D]
    bias_ptr,  # in  [V] fp32, -inf where masked; read if HAS_BIAS
    target_ptr,  # in  [S] int64, sorted by row
    first_ptr,  # in  [R + 1] int64: the pairs of row r are first[r] ... first[r + 1]
    grad_ptr,  # in  [S] fp32: the gradient of each pair's own logit
    coef_ptr,  # in  [len(COEFFICIENTS) + 1, ...] fp32, rows coef_step apart
    dz_ptr,  # out [R, stop - start] bf16 | fp32, contiguous
    dbias_ptr,  # out [blocks of rows, stop - start] fp32, written if WANT_BIAS
    coef_step,
    start,
    stop,
    R,
    V,
    D,
    stride_hr,
    stride_hd,
    stride_wv,
    stride_wd,
    temperature,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    OF_TARGET: tl.constexpr,
    OF_ENTROPY: tl.constexpr,
    OF_UNIFORM: tl.constexpr,
    WANT_BIAS: tl.constexpr,
    ONE_PAIR: tl.constexpr,
    TMA: tl.constexpr,
    WIDEN: tl.constexpr,
    GROUP_R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Write the gradient of hidden W^T + b in the columns start ... stop - 1."""
    sizes = R, V, D
    strides = stride_hr, stride_hd, stride_wv, stride_wd
    head = bias_ptr, V, temperature, softcap
    TILE: tl.constexpr = (TMA, WIDEN, BLOCK_R, BLOCK_V, BLOCK_D)  # pyright: ignore[reportAssignmentType]  of jit code
    HAS: tl.constexpr = (HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE)  # pyright: ignore[reportAssignmentType]  of jit code
    WIDTH: tl.constexpr = BLOCK_V // PIECES
    n_tiles = tl.cdiv(stop - start, BLOCK_V)
    block, tile = grouped(tl.program_id(0), tl.cdiv(R, BLOCK_R), n_tiles, GROUP_R)
    row, column = block * BLOCK_R, start + tile * BLOCK_V
    z = product(hidden, weight, row, column, sizes, strides, TILE)
    offs_r = tl.cast(row, tl.int64) + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    coef_ptr += offs_r
    active = tl.load(coef_ptr, mask=mask_r, other=0.0) > 0.0
    top = tl.load(coef_ptr + coef_step, mask=mask_r, other=0.0)[:, None]
    inverse_mass = tl.load(coef_ptr + 7 * coef_step, mask=mask_r, other=0.0)[:, None]
    prob = tl.load(coef_ptr + 3 * coef_step, mask=mask_r, other=0.0)[:, None]
    out_ptr = dz_ptr + offs_r[:, None] * (stop - start)
    for i in tl.static_range(PIECES):
        first_v = column + i * WIDTH
        offs_v = first_v + tl.arange(0, WIDTH)
        zi = logits(piece(z, i, PIECES), offs_v, head, HAS)
        # not exp(z - top - log_mass): the larger the exponent, the coarser its rounding
        p = exp(zi - top) * inverse_mass
        dz = p * prob
        if OF_ENTROPY:
            # dH / dz = -p (log p + H); log p = -inf where p = 0
            log_mass = tl.load(coef_ptr + 2 * coef_step, mask=mask_r, other=0.0)[:, None]
            log_p = (zi - top) - log_mass
            entropy = tl.load(coef_ptr + 4 * coef_step, mask=mask_r, other=0.0)[:, None]
            scale = tl.load(coef_ptr + 5 * coef_step, mask=mask_r, other=0.0)[:, None]
            dz -= p * (tl.maximum(log_p, state.FAR) + entropy) * scale
        if OF_UNIFORM:
            dz -= tl.load(coef_ptr + 6 * coef_step, mask=mask_r, other=0.0)[:, None]
        if OF_TARGET:
            if ONE_PAIR:
                target = tl.load(target_ptr + offs_r, mask=mask_r, other=-1)
                grad = tl.load(grad_ptr + offs_r, mask=mask_r, other=0.0)
                dz += _at_target(offs_v, first_v, target, grad, WIDTH)
            else:
                first = tl.load(first_ptr + offs_r, mask=mask_r, other=0)
                stop_r = tl.load(first_ptr + offs_r + 1, mask=mask_r, other=0)
                n_pairs = (stop_r - first).to(tl.int32)
                for k in range(tl.max(n_pairs, axis=0)):
                    target = tl.load(target_ptr + first + k, mask=k < n_pairs, other=-1)
                    grad = tl.load(grad_ptr + first + k, mask=k < n_pairs, other=0.0)
                    dz += _at_target(offs_v, first_v, target, grad, WIDTH)
        if HAS_SOFTCAP:
            u = divide(zi * temperature, softcap)
            dz *= 1.0 - u * u
        if HAS_TEMPERATURE:
            dz = divide(dz, temperature)
        dz = tl.where(active[:, None] & (zi != float("-inf")), dz, 0.0)
        mask_v = offs_v < stop
        at = (offs_v - start)[None, :]
        tl.store(
            out_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=mask_r[:, None] & mask_v[None, :]
        )
        if WANT_BIAS:
            sums_ptr = dbias_ptr + tl.cast(block, tl.int64) * (stop - start)
            tl.store(sums_ptr + (offs_v - start), tl.sum(dz, axis=0), mask=mask_v)


@triton.jit
def _at_target(offs_v, first_v, target, grad, WIDTH: tl.constexpr):
    """`grad` in the column of each row's target, 0 elsewhere."""
    here = (target >= first_v) & (target < first_v + WIDTH)
    column = tl.where(here, target, -1).to(tl.int32)
    return tl.where(offs_v[None, :] == column[:, None], grad[:, None], 0.0)


def takes(hidden: Tensor, head: Head) -> bool:
    """Whether the table gives this route what the kernels can compute."""
    return _tile(hidden, head).route == "fused"


def forward(hidden: Tensor, head: Head, pairs: Pairs, wanted: Wanted) -> tuple[Partial, Tensor]:
    """The partial of every row, and the logit of every pair's target (NaN outside the vocabulary).

    Wants R > 0.
    """
    R = hidden.shape[0]
    call = _FusedCall(hidden, head)
    chosen = hidden.new_full(pairs.target.shape, float("nan"), dtype=torch.float32)
    out = hidden.new_empty((len(FIELDS), R), dtype=torch.float32)
    want, order = wanted_bits(wanted.fields), wanted.renyi_order
    for rows in _passes(R, call.rows_in(PARTIALS_BYTES, 4 * len(FIELDS) * call.n_segments)):
        x = hidden[rows]
        n = x.shape[0]
        part = hidden.new_empty((len(FIELDS), call.n_segments, n), dtype=torch.float32)
        operands, options, flags = call.arguments(x, sums=True)
        one = pairs.order is None
        of_pass = rows if one else slice(None)
        programs = _programs(call, call.blocks(n) * call.n_segments, hidden.device)
        of_pairs = pairs.target[of_pass], pairs.first[rows.start :], chosen[of_pass]
        operands += [*of_pairs, part, *options, order]
        flags |= {"WANT": want, "ONE_PAIR": one, "SEGMENT": call.tile.SEGMENT}
        _launch(hidden, segment_kernel, programs, *operands, **flags)
        merging = part, out[:, rows], n, call.n_segments, R, order
        _launch(hidden, merge_kernel, _parts(n, MERGE["BLOCK_R"]), *merging, WANT=want, **MERGE)
    found = {name: x for name, x in zip(FIELDS, out, strict=True) if name in wanted.fields}
    if "column" in found:
        found["column"] = found["column"].view(torch.int32).long()
    part = Partial(out[0], out[1], **found)
    if "best" in wanted.fields:
        best, column = _best(call, hidden, wanted.k)
        part = part._replace(best=best, best_column=column)
    return part, chosen


def _best(call: "_FusedCall", hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row and their columns, from logits written wave by wave."""
    wave = call.tile.SEGMENT
    found = []
    for rows in _passes(hidden.shape[0], call.rows_in(BEST_BYTES, 4 * wave)):
        x = hidden[rows]
        operands, options, flags = call.arguments(x)
        part: Partial | None = None
        for start in range(0, call.V, wave):
            stop = min(start + wave, call.V)
            z = x.new_empty((x.shape[0], stop - start), dtype=torch.float32)
            programs = call.blocks(x.shape[0]) * _parts(stop - start, call.tile.BLOCK_V)
            _launch(x, logits_kernel, programs, *operands, z, start, stop, *options, **flags)
            best, at = largest(z, k)
            unused = best[:, 0]
            right = Partial(unused, unused, best=best, best_column=at + start)
            part = right if part is None else merge(part, right)
        assert part is not None
        found.append((part.best, part.best_column))
    best, column = zip(*found, strict=True)
    return torch.cat(best), torch.cat(column)


def ranks(hidden: Tensor, head: Head, pairs: Pairs, chosen: Tensor) -> Tensor:
    """Unmasked columns ahead of each pair's target [S] int64; any number for a pair outside.

    `chosen` [S] are the targets' logits, from the `forward` above: these are the same bits.
    """
    call = _FusedCall(hidden, head)
    tiles = _parts(call.V, call.tile.BLOCK_V)
    S = chosen.shape[0]
    ahead = torch.empty_like(pairs.target)
    bytes_a_row = max(4 * tiles, hidden.element_size() * call.D)
    for span in _passes(S, call.rows_in(PASS_BYTES, bytes_a_row)):
        # a row for each pair: one logit to rank against
        one = pairs.order is None
        x = hidden[span] if one else hidden[pairs.row[span].clamp(0, hidden.shape[0] - 1)]
        n = x.shape[0]
        counts = torch.empty((tiles, n), dtype=torch.int32, device=x.device)
        operands, options, flags = call.arguments(x)
        operands += [pairs.target[span], chosen[span], counts, *options]
        _launch(hidden, rank_kernel, call.blocks(n) * tiles, *operands, **flags)
        ahead[span] = counts.sum(dim=0)
    return ahead


def backward(
    grads: dict[str, Tensor],
    state: Tensor,
    hidden: Tensor,
    head: Head,
    pairs: Pairs,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, those that `needs` names; logits are recomputed.

    `grads` [S] and `pairs` are in the order of the pairs, and 0 where a pair does not count;
    `state` [4, R] is (top, log_mass, entropy, n_valid). A wave of columns at a time, gradients of
    logits are written for a pass of rows and multiplied by the vendor's GEMM: in bf16 for bf16
    inputs, in fp32 for all others. dX and dW add up in fp32, in one order, and are rounded once;
    what is rounded to bf16 before that makes their rms error 1.4 times, and their largest at most
    twice, that of an fp32 gradient rounded to bf16 (emulated on a CPU: 512 rows, V = 8192).
    """
    call = _FusedCall(hidden, head)
    R, D = hidden.shape
    need_hidden, need_weight, need_bias = needs
    # bf16 alone: gradients below 6e-8 would be 0 in fp16
    narrow = torch.bfloat16 if call.dtype == torch.bfloat16 and not INTERPRETED else torch.float32
    dhidden = hidden.new_zeros((R, D), dtype=torch.float32) if need_hidden else None
    dweight = torch.zeros_like(head.weight) if need_weight else None
    dbias = torch.zeros_like(head.bias) if need_bias and head.bias is not None else None
    of_row = RowGrads(grads, state, pairs.row, R)
    coef = _coefficients(of_row)
    own = grads.get("logprob")
    one = pairs.order is None
    terms: dict[str, bool] = {
        "OF_TARGET": own is not None,
        "OF_ENTROPY": of_row.of_entropy is not None,
        "OF_UNIFORM": of_row.uniform is not None,
        "WANT_BIAS": dbias is not None,
        "ONE_PAIR": one,
    }
    # its row of dW and, where that is widened, of W; or a group of rows of dz
    column_bytes = max(4 * D * (1 if narrow == torch.bfloat16 else 2), narrow.itemsize * call.group)
    unit = call.tile.BLOCK_V
    wave = max(GRADIENT_BYTES // column_bytes // unit, 1) * unit
    wave = min(wave, _parts(call.V, unit) * unit)
    step = call.rows_in(GRADIENT_BYTES, narrow.itemsize * wave)
    step = min(step, call.rows_in(PASS_BYTES, narrow.itemsize * max(D, 1)))
    for start in range(0, call.V, wave):
        stop = min(start + wave, call.V)
        weight = head.weight[start:stop].to(narrow)
        dweight_v = weight.new_zeros(weight.shape, dtype=torch.float32) if need_weight else None
        dbias_v = None if dbias is None else torch.zeros_like(coef[0, :1]).expand(stop - start)
        for rows in _passes(R, step):
            x = hidden[rows]
            n = x.shape[0]
            dz = x.new_empty((n, stop - start), dtype=narrow)
            sums = coef.new_empty((call.blocks(n) if dbias is not None else 0, stop - start))
            operands, options, flags = call.arguments(x)
            of_pass = rows if one else slice(None)
            grad = coef if own is None else own[of_pass]
            programs = call.blocks(n) * _parts(stop - start, call.tile.BLOCK_V)
            operands += [pairs.target[of_pass], pairs.first[rows.start :], grad]
            operands += [coef[:, rows], dz, sums, R, start, stop, *options]
            _launch(hidden, grad_kernel, programs, *operands, **terms, **flags)
            if dhidden is not None:
                _add_product(dhidden[rows], dz, weight)
            if dweight_v is not None:
                # 0 times what a row without gradient holds is 0 only if that is finite
                used = torch.where(of_row.active[rows], x, 0.0).to(narrow)
                _add_product(dweight_v, dz.T, used)
            if dbias_v is not None:
                dbias_v = dbias_v + sums.sum(dim=0)
        if dweight is not None and dweight_v is not None:
            dweight[start:stop] = dweight_v
        if dbias is not None and dbias_v is not None:
            dbias[start:stop] = dbias_v
    return dhidden, dweight, dbias


def _coefficients(of_row: RowGrads) -> Tensor:
    """The rows of COEFFICIENTS and of 1 / mass [8, R]; 0 where a call has none."""
    zero = torch.zeros_like(of_row.top)
    named = [getattr(of_row, name) for name in COEFFICIENTS]
    rows = [zero if x is None else x.to(zero.dtype) for x in named]
    rows.append(of_row.log_mass.double().neg().exp().to(zero.dtype))
    return torch.cat(rows, dim=1).T.contiguous()


class _FusedCall:
    """What the launches of one call share: the tile, the head, and how tiles are loaded."""

    def __init__(self, hidden: Tensor, head: Head):
        self.head, self.V, self.D = head, head.vocab_size, hidden.shape[1]
        weight = head.weight
        half = hidden.dtype == weight.dtype != torch.float32
        self.dtype = weight.dtype if half else torch.float32
        self.tile = _tile(hidden, head)
        self.n_segments = -(-self.V // self.tile.SEGMENT)
        self.bias = self._bias()
        self.flags: dict[str, Any] = {
            "HAS_BIAS": self.bias is not None,
            "HAS_SOFTCAP": head.transform.softcap is not None,
            "HAS_TEMPERATURE": head.transform.temperature != 1.0,
            "WIDEN": INTERPRETED or not half,
        }

    def _bias(self) -> Tensor | None:
        """The bias in fp32, -inf in masked columns; None where there is neither."""
        bias, mask, V = self.head.bias, self.head.transform.vocab_mask, self.V
        if bias is not None:
            bias = bias[:V].float().contiguous()
            if self.head.transform.softcap is not None:
                # a bias of -inf is capped, not masked
                bias = bias.clamp(min=torch.finfo(torch.float32).min)
        if mask is None:
            return bias
        wide = mask.new_zeros(V, dtype=torch.float32) if bias is None else bias
        return torch.where(mask[:V], wide, float("-inf"))

    def arguments(
        self, hidden: Tensor, *, sums: bool = False
    ) -> tuple[list[Any], list[Any], dict[str, Any]]:
        """Hidden rows, weight and bias; sizes, strides and options; flags and tile."""
        tile, weight = self.tile, self.head.weight[: self.V]
        tma = tile.tma and self.D > 0 and _by_tma(hidden) and _by_tma(weight)
        operands: list[Any] = [hidden, weight]
        if tma:
            from triton.tools.tensor_descriptor import TensorDescriptor

            blocks = ([tile.BLOCK_R, tile.BLOCK_D], [tile.BLOCK_V, tile.BLOCK_D])
            operands = [
                TensorDescriptor(x, list(x.shape), list(x.stride()), block)
                for x, block in zip(operands, blocks, strict=True)
            ]
        operands.append(weight if self.bias is None else self.bias)
        sizes = [hidden.shape[0], self.V, self.D, *hidden.stride(), *weight.stride()]
        options = [self.head.transform.temperature, self.head.transform.softcap or 0.0]
        return operands, [*sizes, *options], {**self.flags, "TMA": tma, **tile.launch(sums=sums)}

    def blocks(self, R: int) -> int:
        """How many blocks R rows are."""
        return _parts(R, self.tile.BLOCK_R)

    @property
    def group(self) -> int:
        """Rows that run side by side: the fewest worth a pass."""
        return self.tile.BLOCK_R * self.tile.GROUP_R

    def rows_in(self, budget: int, bytes_a_row: int) -> int:
        """Rows of a pass that may take `budget` bytes: whole groups, one at least."""
        return max(budget // max(bytes_a_row, 1) // self.group, 1) * self.group


def _tile(hidden: Tensor, head: Head) -> _tiles.Tile:
    """The table's entry for these tensors, for fp32 where they multiply in fp32."""
    weight = head.weight
    dtype = weight.dtype if hidden.dtype == weight.dtype else torch.float32
    arch = _tiles.architecture(hidden.device)
    return _tiles.tile("linear_logprob", arch, dtype, hidden.shape[1], head.vocab_size)


def _by_tma(x: Tensor) -> bool:
    """Whether the copy engine can read `x`: 16-byte addresses, neighbouring columns."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    # an expanded row has stride 0, which the engine takes for a tensor of one row
    return aligned and x.stride(1) == 1 and x.stride(0) >= x.shape[1]


def _passes(R: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, R)) for start in range(0, R, step)]


def _programs(call: "_FusedCall", units: int, device: torch.device) -> int:
    """Programs of a persistent kernel; the result does not depend on their number."""
    if device.type != "cuda":
        return min(units, 4)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(units, processors * call.tile.per_sm)


def _parts(n: int, size: int) -> int:
    """How many pieces of `size` cover n."""
    return -(-n // size)


def _launch(x: Tensor, kernel: Any, programs: int, *arguments: Any, **flags: Any) -> None:
    with torch.cuda.device_of(x):  # Triton launches on the current device, not the tensor's
        kernel[(programs,)](*arguments, **flags)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """`out += a b`, in fp32 whatever the dtype of the factors."""
    if a.dtype == torch.float32:
        out.addmm_(a, b)
    else:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
