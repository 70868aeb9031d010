"""Second passes of `linear_logprob`: tiles of logits again, to rank the targets or to write them.

One program a tile, in any number; `_fused_tile` gives the same bits as the forward pass.

R hidden rows, V vocabulary, D hidden.
"""

import triton
import triton.language as tl

from ._fused_tile import grouped, logits, piece, product


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
    WIDTH: tl.constexpr = BLOCK_V // PIECES
    block, tile = grouped(tl.program_id(0), tl.cdiv(R, BLOCK_R), tl.cdiv(V, BLOCK_V), GROUP_R)  # pyright: ignore[reportGeneralTypeIssues]  of jit code
    row, column = block * BLOCK_R, tile * BLOCK_V
    z = product(
        hidden, weight, row, column, R, V, D, stride_hr, stride_hd, stride_wv, stride_wd,
        TMA, WIDEN, BLOCK_R, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    offs_r = tl.cast(row, tl.int64) + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    own = tl.load(chosen_ptr + offs_r, mask=mask_r, other=float("inf"))[:, None]
    target = tl.load(target_ptr + offs_r, mask=mask_r, other=0)
    # an id past the columns compares like one that is just past them
    target = tl.minimum(tl.maximum(target, -1), V).to(tl.int32)[:, None]
    ahead = tl.zeros([BLOCK_R], tl.int32)
    for i in tl.static_range(PIECES):
        offs_v = column + i * WIDTH + tl.arange(0, WIDTH)
        zi = logits(
            piece(z, i, PIECES), offs_v, bias_ptr, V, temperature, softcap,
            HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE,
        )  # fmt: skip
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
    WIDTH: tl.constexpr = BLOCK_V // PIECES
    n_tiles = tl.cdiv(stop - start, BLOCK_V)
    block, tile = grouped(tl.program_id(0), tl.cdiv(R, BLOCK_R), n_tiles, GROUP_R)
    row, column = block * BLOCK_R, start + tile * BLOCK_V
    z = product(
        hidden, weight, row, column, R, V, D, stride_hr, stride_hd, stride_wv, stride_wd,
        TMA, WIDEN, BLOCK_R, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    offs_r = tl.cast(row, tl.int64) + tl.arange(0, BLOCK_R)
    out_ptr = z_ptr + offs_r[:, None] * (stop - start)
    for i in tl.static_range(PIECES):
        offs_v = column + i * WIDTH + tl.arange(0, WIDTH)
        zi = logits(
            piece(z, i, PIECES), offs_v, bias_ptr, V, temperature, softcap,
            HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE,
        )  # fmt: skip
        mask = (offs_r < R)[:, None] & (offs_v < stop)[None, :]
        tl.store(out_ptr + (offs_v - start)[None, :], zi, mask=mask)
