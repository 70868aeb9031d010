"""Forward of `linear_logprob`: blocks of rows and segments of the vocabulary, tile after tile.

A persistent program takes unit after unit of work, a block of rows and a fixed segment of
columns, in one loop over (tile, block of D): the next tile is on its way from memory while this
one is reduced to a few running sums a row. A target's logit is read out of the very tile that
enters the sum, so no log-probability exceeds 0.

R hidden rows, S (row, target) pairs, V vocabulary, D hidden.
"""

import triton
import triton.language as tl

from . import _fused_state as law
from ._fused_tile import add_product, logits, my_units, piece, place


@triton.jit
def _pick(z, offs_v, start, V, target, WIDTH: tl.constexpr):
    """Where `target` lies in this tile, and its logit there."""
    here = (target >= start) & (target < start + WIDTH) & (target < V)
    column = tl.where(here, target, -1).to(tl.int32)
    return here, tl.sum(tl.where(offs_v[None, :] == column[:, None], z, 0.0), axis=1)


@triton.jit
def _chosen(
    z, offs_v, start, target_ptr, first_ptr, chosen_ptr, offs_r, R, V,
    WIDTH: tl.constexpr, ONE_PAIR: tl.constexpr,
):  # fmt: skip
    """Write the logits of the targets that lie in this tile."""
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
    WIDTH: tl.constexpr = BLOCK_V // PIECES
    n_blocks = tl.cdiv(R, BLOCK_R)
    n_segments = tl.cdiv(V, SEGMENT)
    whole_tiles, total, rest_tiles = my_units(n_blocks, V, SEGMENT, BLOCK_V)
    last_k = tl.maximum(tl.cdiv(D, BLOCK_D), 1) - 1

    state = law.empty(BLOCK_R)
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
        z = add_product(
            z, hidden, weight, row, column, load_k, R, V, D,
            stride_hr, stride_hd, stride_wv, stride_wd, TMA, WIDEN, BLOCK_R, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        k += 1
        if k == last_k:
            block, segment, tile, is_last = place(
                t, n_blocks, whole_tiles, rest_tiles, V, SEGMENT, GROUP_R, BLOCK_V
            )
            t += 1
            k = -1
            start_v = segment * SEGMENT + tile * BLOCK_V
            offs_r = tl.cast(block * BLOCK_R, tl.int64) + tl.arange(0, BLOCK_R)
            state = law.restart(state, tile == 0, WANT)
            lost = tl.where(tile == 0, 0.0, lost)
            for i in tl.static_range(PIECES):
                start = start_v + i * WIDTH
                offs_v = start + tl.arange(0, WIDTH)
                zi = logits(
                    piece(z, i, PIECES), offs_v, bias_ptr, V, temperature, softcap,
                    HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE,
                )  # fmt: skip
                _chosen(
                    zi, offs_v, start, target_ptr, first_ptr, chosen_ptr, offs_r, R, V,
                    WIDTH, ONE_PAIR,
                )  # fmt: skip
                state, lost = law.with_tile(state, zi, offs_v, lost, order, WANT)
            if is_last:
                step = tl.cast(R, tl.int64) * n_segments
                at = part_ptr + tl.cast(segment, tl.int64) * R + offs_r
                law.store(at, step, law.with_lost(state, lost, WANT), offs_r < R)
            z = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
