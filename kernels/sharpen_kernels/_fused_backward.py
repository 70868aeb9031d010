"""Gradient of one tile of logits of `linear_logprob`, computed again from the forward's bits.

    dz = p (prob - entropy' (log p + H)) - uniform + (target's own),  p = exp(z - top) / mass

The coefficients of a row are those of `RowGrads`. What is masked, and a row that no gradient
reaches, gets exact zeros whatever it holds.

R hidden rows, S (row, target) pairs, V vocabulary, D hidden.
"""

import triton
import triton.language as tl

from ._fused_state import FAR
from ._fused_tile import divide, exp, grouped, logits, piece, product

# rows of coef [len(COEFFICIENTS) + 1, R]; the last is 1 / mass
COEFFICIENTS = ("active", "top", "log_mass", "prob", "entropy", "of_entropy", "uniform")


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
    WIDTH: tl.constexpr = BLOCK_V // PIECES
    n_tiles = tl.cdiv(stop - start, BLOCK_V)
    block, tile = grouped(tl.program_id(0), tl.cdiv(R, BLOCK_R), n_tiles, GROUP_R)
    row, column = block * BLOCK_R, start + tile * BLOCK_V
    z = product(
        hidden, weight, row, column, R, V, D, stride_hr, stride_hd, stride_wv, stride_wd,
        TMA, WIDEN, BLOCK_R, BLOCK_V, BLOCK_D,
    )  # fmt: skip
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
        zi = logits(
            piece(z, i, PIECES), offs_v, bias_ptr, V, temperature, softcap,
            HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE,
        )  # fmt: skip
        # not exp(z - top - log_mass): the larger the exponent, the coarser its rounding
        p = exp(zi - top) * inverse_mass
        dz = p * prob
        if OF_ENTROPY:
            # dH / dz = -p (log p + H); log p = -inf where p = 0
            log_mass = tl.load(coef_ptr + 2 * coef_step, mask=mask_r, other=0.0)[:, None]
            log_p = (zi - top) - log_mass
            entropy = tl.load(coef_ptr + 4 * coef_step, mask=mask_r, other=0.0)[:, None]
            scale = tl.load(coef_ptr + 5 * coef_step, mask=mask_r, other=0.0)[:, None]
            dz -= p * (tl.maximum(log_p, FAR) + entropy) * scale
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
