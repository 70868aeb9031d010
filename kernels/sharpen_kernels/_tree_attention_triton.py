"""Tree attention on a GPU: one online softmax over the tiles of keys that a tile of queries meets.

    z = scale * q . k (capped),    out = sum_j exp(z_j - lse) v_j

and in backward, where the softmax is built again from `lse`, tile by tile,

    p = exp(z - lse),    delta[q] = dout[q] . out[q],    dz = p (dout . v - delta)
    dq = scale dz k,    dk = scale dz^T q,    dv = p^T dout,    dsink = -sum_q exp(sink - lse) delta

A tile of keys meets a tile of queries where some subtree that begins in the one reaches into the
other; where all do, and the tile is wholly before them, nothing in it needs a mask. The lists of
tiles that meet are made on the device by one small kernel, one program a tile; the host waits for
nothing. A kernel walks a tile's list, first the tiles that need no mask, then the others; a sink is
the softmax's first logit. In backward one kernel holds a tile of queries and walks the keys they
see, one holds a tile of keys and walks the queries that see them, head by head.

In this order: the lists, what kernels share, forward, backward, launches.

H query heads, Hkv key heads, T tokens, K and KV head sizes.  Accumulates in fp32.  No atomics and
no split sums: every sum has one order, the bits of a tree whose first token is at a multiple of 128
depend on nothing else in the row, nor on T; a tree moved by a multiple of 128 tokens keeps them.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import Tiling, padded, tiling_of
from ._triton_state import tanh
from .tree import Rule

SCAN = 64  # tiles that a program looks at together; chosen
ROWS = 64  # queries of a program of the first kernel of backward; chosen
LAUNCH: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}


class Lists(NamedTuple):
    """Of each tile, the tiles it meets: `others` [2, tiles, other tiles], `lengths` [2, tiles].

    Plane 0 has those that need no mask, plane 1 the others, both in the order of the row.
    """

    others: Tensor
    lengths: Tensor


def lists_of(
    end: Tensor, position: Tensor, window: int | None, tiling: Tiling, of_queries: bool
) -> Lists:
    """Tiles of keys that each tile of queries meets, or of queries that each tile of keys does."""
    T = end.shape[0]
    mine, other = tiling.BLOCK_Q, tiling.BLOCK_K
    mine, other = (mine, other) if of_queries else (other, mine)
    n_mine, n_others = -(-T // mine), -(-T // other)
    others = torch.empty((2, n_mine, n_others), dtype=torch.int32, device=end.device)
    lengths = torch.empty((2, n_mine), dtype=torch.int32, device=end.device)
    flags: dict[str, Any] = {"OF_QUERIES": of_queries, "HAS_WINDOW": window is not None}
    flags |= {"BLOCK_Q": tiling.BLOCK_Q, "BLOCK_K": tiling.BLOCK_K, "SCAN": SCAN}
    with torch.cuda.device_of(end):  # Triton launches on the current device, not the tensor's
        _tiles_kernel[(n_mine,)](
            end, position, others, lengths, T, n_others, window or 0, **flags, **LAUNCH
        )
    return Lists(others, lengths)


@triton.jit
def _tiles_kernel(
    end_ptr,  # in  [T] int64
    position_ptr,  # in  [T] int64, read if HAS_WINDOW
    others_ptr,  # out [2, n_mine, n_others] int32
    lengths_ptr,  # out [2, n_mine] int32
    T,
    n_others,
    window,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OF_QUERIES: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SCAN: tl.constexpr,
):
    mine = tl.program_id(0)
    if OF_QUERIES:
        MINE: tl.constexpr = BLOCK_Q
        OTHER: tl.constexpr = BLOCK_K
    else:
        MINE: tl.constexpr = BLOCK_K
        OTHER: tl.constexpr = BLOCK_Q
    own = mine * MINE + tl.arange(0, MINE)
    own_low = 0
    own_high = 0
    if HAS_WINDOW:
        own_low = tl.min(tl.load(position_ptr + own, mask=own < T, other=9223372036854775807))
        own_high = tl.max(tl.load(position_ptr + own, mask=own < T, other=-1))
    own_end = tl.load(end_ptr + own, mask=own < T, other=0)
    last = tl.max(own_end, axis=0)
    # other=0 past the row: a tile with such columns is never free of a mask
    first = tl.min(own_end, axis=0)
    row_len = tl.num_programs(0).to(tl.int64) * n_others
    others_ptr += mine.to(tl.int64) * n_others
    n_free = 0
    n_masked = 0
    for start in range(0, n_others, SCAN):
        other = start + tl.arange(0, SCAN)
        place = other[:, None] * OTHER + tl.arange(0, OTHER)[None, :]  # [SCAN, OTHER]
        low = 0
        high = 0
        if HAS_WINDOW:
            position = tl.load(position_ptr + place, mask=place < T, other=9223372036854775807)
            low = tl.min(position, axis=1)
            position = tl.load(position_ptr + place, mask=place < T, other=-1)
            high = tl.max(position, axis=1)
        if OF_QUERIES:
            end = tl.load(end_ptr + place, mask=place < T, other=0)
            q0 = mine * BLOCK_Q
            k0 = other * BLOCK_K
            meets = tl.max(end, axis=1) > q0
            free = tl.min(end, axis=1) >= q0 + BLOCK_Q
            meets = meets & (k0 < q0 + BLOCK_Q)
            if HAS_WINDOW:
                meets = meets & (own_low - high < window)
                free = free & (own_high - low < window)
        else:
            q0 = other * BLOCK_Q
            k0 = mine * BLOCK_K
            meets = (last > q0) & (k0 < q0 + BLOCK_Q)
            free = first >= q0 + BLOCK_Q
            if HAS_WINDOW:
                meets = meets & (low - own_high < window)
                free = free & (high - own_low < window)
        meets = meets & (other < n_others)
        free = meets & free & (k0 + BLOCK_K - 1 <= q0)
        masked = (meets & ~free).to(tl.int32)
        free = free.to(tl.int32)
        at = n_free + tl.cumsum(free, axis=0) - 1
        tl.store(others_ptr + at, other, mask=free != 0)
        at = n_masked + tl.cumsum(masked, axis=0) - 1
        tl.store(others_ptr + row_len + at, other, mask=masked != 0)
        n_free += tl.sum(free, axis=0)
        n_masked += tl.sum(masked, axis=0)
    tl.store(lengths_ptr + mine, n_free)
    tl.store(lengths_ptr + tl.num_programs(0) + mine, n_masked)


@triton.jit
def _seen(rows, cols, end_ptr, position_ptr, T, window, HAS_WINDOW: tl.constexpr):
    """Whether query row [BLOCK_Q] sees key column [BLOCK_K]."""
    end = tl.load(end_ptr + cols, mask=cols < T, other=0)
    seen = (cols[None, :] <= rows[:, None]) & (rows[:, None] < end[None, :])
    if HAS_WINDOW:
        depth = tl.load(position_ptr + cols, mask=cols < T, other=0)
        own = tl.load(position_ptr + rows, mask=rows < T, other=0)
        seen = seen & (own[:, None] - depth[None, :] < window)
    return seen


@triton.jit
def _finite(x):
    """Whether a row of the tile x [rows, width] is: 0 x NaN is NaN, and so is 0 x inf."""
    return tl.min((tl.abs(x.to(tl.float32)) < float("inf")).to(tl.int32), axis=1) != 0


@triton.jit
def _logits(q, k, scale, softcap, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Logits [BLOCK_Q, BLOCK_K] of q [BLOCK_Q, D] and k [BLOCK_K, D], in nats."""
    z = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if HAS_SOFTCAP:
        z = softcap * tanh(tl.div_rn(z, softcap))
    return z


@triton.jit
def _tile(ptr, rows, stride, T, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a [T, WIDTH] matrix, zeros past both: [rows, BLOCK]."""
    offs = tl.arange(0, BLOCK)
    mask = rows[:, None] < T
    if BLOCK != WIDTH:
        mask = mask & (offs[None, :] < WIDTH)
    at = rows.to(tl.int64)[:, None] * stride + offs[None, :]
    return tl.load(ptr + at, mask=mask, other=0.0)


@triton.jit
def _fwd_kernel(
    q_ptr,  # in  [H, T, K]
    k_ptr,  # in  [Hkv, T, K]
    v_ptr,  # in  [Hkv, T, KV]
    sinks_ptr,  # in  [H], read if HAS_SINKS
    out_ptr,  # out [H, T, KV] dtype of q
    lse_ptr,  # out [H, T] fp32, nats
    end_ptr,  # in  [T] int64
    position_ptr,  # in  [T] int64, read if HAS_WINDOW
    others_ptr,  # in  [2, tiles of queries, n_others] int32
    lengths_ptr,  # in  [2, tiles of queries] int32
    stride_qh,
    stride_qt,
    stride_kh,
    stride_kt,
    stride_vh,
    stride_vt,
    stride_oh,
    stride_ot,
    stride_lh,
    stride_lt,
    T,
    n_others,
    n_groups,  # query heads a key head
    scale,
    softcap,
    window,
    K: tl.constexpr,
    KV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    group = head // n_groups
    k_ptr += group * stride_kh
    v_ptr += group * stride_vh
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q = _tile(q_ptr + head * stride_qh, rows, stride_qt, T, K, BLOCK_D)  # [BLOCK_Q, BLOCK_D]
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        top = tl.zeros([BLOCK_Q], tl.float32) + sink
        mass = tl.full([BLOCK_Q], 1.0, tl.float32)
    else:
        top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        mass = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)

    others_ptr += tile.to(tl.int64) * n_others
    n_free = tl.load(lengths_ptr + tile)
    for i in range(0, n_free):
        cols = tl.load(others_ptr + i) * BLOCK_K + tl.arange(0, BLOCK_K)
        k = _tile(k_ptr, cols, stride_kt, T, K, BLOCK_D)
        z = _logits(q, k, scale, softcap, HAS_SOFTCAP, PRECISION)
        new_top = tl.maximum(top, tl.max(z, axis=1))
        p = tl.exp(z - new_top[:, None])
        fade = tl.exp(top - new_top)
        mass = mass * fade + tl.sum(p, axis=1)
        v = _tile(v_ptr, cols, stride_vt, T, KV, BLOCK_DV)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        top = new_top

    others_ptr += tl.num_programs(0).to(tl.int64) * n_others
    n_masked = tl.load(lengths_ptr + tl.num_programs(0) + tile)
    for i in range(0, n_masked):
        cols = tl.load(others_ptr + i) * BLOCK_K + tl.arange(0, BLOCK_K)
        k = _tile(k_ptr, cols, stride_kt, T, K, BLOCK_D)
        v = _tile(v_ptr, cols, stride_vt, T, KV, BLOCK_DV)
        clean = _finite(v)
        v = tl.where(clean[:, None], v, 0.0).to(v.dtype)
        z = _logits(q, k, scale, softcap, HAS_SOFTCAP, PRECISION)
        z = tl.where(clean[None, :], z, float("nan"))
        seen = _seen(rows, cols, end_ptr, position_ptr, T, window, HAS_WINDOW)
        z = tl.where(seen, z, float("-inf"))
        new_top = tl.maximum(top, tl.max(z, axis=1))
        # a query may have met no key yet: shift by 0 there, or -inf - -inf is nan
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp(z - shift[:, None])
        fade = tl.exp(top - shift)
        mass = mass * fade + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        top = new_top

    mask = rows < T
    lse_at = lse_ptr + head * stride_lh + rows.to(tl.int64) * stride_lt
    tl.store(lse_at, top + tl.log(mass), mask=mask)
    offs = tl.arange(0, BLOCK_DV)
    out_at = out_ptr + head * stride_oh + rows.to(tl.int64)[:, None] * stride_ot + offs[None, :]
    out = (acc / mass[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_at, out, mask=mask[:, None] & (offs[None, :] < KV))


@triton.jit
def _delta_kernel(
    dout_ptr,  # in  [H, T, KV]
    out_ptr,  # in  [H, T, KV]
    lse_ptr,  # in  [H, T] fp32, nats
    state_ptr,  # out [2, H, T] fp32: lse, delta
    stride_dh,
    stride_dt,
    stride_oh,
    stride_ot,
    stride_lh,
    stride_lt,
    T,
    KV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dy = _tile(dout_ptr + head * stride_dh, rows, stride_dt, T, KV, BLOCK_DV)
    y = _tile(out_ptr + head * stride_oh, rows, stride_ot, T, KV, BLOCK_DV)
    delta = tl.sum(dy.to(tl.float32) * y.to(tl.float32), axis=1)
    mask = rows < T
    at = rows.to(tl.int64)
    lse = tl.load(lse_ptr + head * stride_lh + at * stride_lt, mask=mask, other=0.0)
    state_ptr += head * T
    tl.store(state_ptr + at, lse, mask=mask)
    step = tl.num_programs(1).to(tl.int64) * T
    tl.store(state_ptr + step + at, delta, mask=mask)


@triton.jit
def _dq_kernel(
    q_ptr,  # in  [H, T, K]
    k_ptr,  # in  [Hkv, T, K]
    v_ptr,  # in  [Hkv, T, KV]
    dout_ptr,  # in  [H, T, KV]
    dq_ptr,  # out [H, T, K] dtype of q
    state_ptr,  # in  [2, H, T] fp32
    end_ptr,  # in  [T] int64
    position_ptr,  # in  [T] int64, read if HAS_WINDOW
    others_ptr,  # in  [2, tiles of queries, n_others] int32
    lengths_ptr,  # in  [2, tiles of queries] int32
    stride_qh,
    stride_qt,
    stride_kh,
    stride_kt,
    stride_vh,
    stride_vt,
    stride_dh,
    stride_dt,
    stride_xh,  # of dq
    stride_xt,
    T,
    n_others,
    n_groups,
    scale,
    softcap,
    window,
    K: tl.constexpr,
    KV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    group = head // n_groups
    k_ptr += group * stride_kh
    v_ptr += group * stride_vh
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q = _tile(q_ptr + head * stride_qh, rows, stride_qt, T, K, BLOCK_D)
    dy = _tile(dout_ptr + head * stride_dh, rows, stride_dt, T, KV, BLOCK_DV)
    state_ptr += head * T
    step = tl.num_programs(1).to(tl.int64) * T
    lse = tl.load(state_ptr + rows, mask=rows < T, other=0.0)
    delta = tl.load(state_ptr + step + rows, mask=rows < T, other=0.0)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)

    others_ptr += tile.to(tl.int64) * n_others
    n_free = tl.load(lengths_ptr + tile)
    for i in range(0, n_free):
        cols = tl.load(others_ptr + i) * BLOCK_K + tl.arange(0, BLOCK_K)
        k = _tile(k_ptr, cols, stride_kt, T, K, BLOCK_D)
        v = _tile(v_ptr, cols, stride_vt, T, KV, BLOCK_DV)
        z = _logits(q, k, scale, softcap, HAS_SOFTCAP, PRECISION)
        p = tl.exp(z - lse[:, None])
        dz = p * (tl.dot(dy, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dz *= _slope(z, softcap, HAS_SOFTCAP)
        acc = tl.dot(dz.to(k.dtype), k, acc, input_precision=PRECISION)

    others_ptr += tl.num_programs(0).to(tl.int64) * n_others
    n_masked = tl.load(lengths_ptr + tl.num_programs(0) + tile)
    for i in range(0, n_masked):
        cols = tl.load(others_ptr + i) * BLOCK_K + tl.arange(0, BLOCK_K)
        k = _tile(k_ptr, cols, stride_kt, T, K, BLOCK_D)
        v = _tile(v_ptr, cols, stride_vt, T, KV, BLOCK_DV)
        z = _logits(q, k, scale, softcap, HAS_SOFTCAP, PRECISION)
        p = tl.exp(z - lse[:, None])
        dz = p * (tl.dot(dy, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dz *= _slope(z, softcap, HAS_SOFTCAP)
        dz = tl.where(_seen(rows, cols, end_ptr, position_ptr, T, window, HAS_WINDOW), dz, 0.0)
        # a key that is not finite has made nan of the dz that see it, and 0 x nan of no other
        k = tl.where(_finite(k)[:, None], k, 0.0).to(k.dtype)
        acc = tl.dot(dz.to(k.dtype), k, acc, input_precision=PRECISION)

    offs = tl.arange(0, BLOCK_D)
    at = dq_ptr + head * stride_xh + rows.to(tl.int64)[:, None] * stride_xt + offs[None, :]
    mask = (rows < T)[:, None] & (offs[None, :] < K)
    tl.store(at, (acc * scale).to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dkv_kernel(
    q_ptr,  # in  [H, T, K]
    k_ptr,  # in  [Hkv, T, K]
    v_ptr,  # in  [Hkv, T, KV]
    dout_ptr,  # in  [H, T, KV]
    dk_ptr,  # out [Hkv, T, K] dtype of k
    dv_ptr,  # out [Hkv, T, KV] dtype of v
    state_ptr,  # in  [2, H, T] fp32
    end_ptr,  # in  [T] int64
    position_ptr,  # in  [T] int64, read if HAS_WINDOW
    others_ptr,  # in  [2, tiles of keys, n_others] int32
    lengths_ptr,  # in  [2, tiles of keys] int32
    stride_qh,
    stride_qt,
    stride_kh,
    stride_kt,
    stride_vh,
    stride_vt,
    stride_dh,
    stride_dt,
    stride_xh,  # of dk
    stride_xt,
    stride_yh,  # of dv
    stride_yt,
    T,
    n_others,
    n_groups,
    scale,
    softcap,
    window,
    K: tl.constexpr,
    KV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    cols = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    k = _tile(k_ptr + group * stride_kh, cols, stride_kt, T, K, BLOCK_D)
    v = _tile(v_ptr + group * stride_vh, cols, stride_vt, T, KV, BLOCK_DV)
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)
    free_ptr = others_ptr + tile.to(tl.int64) * n_others
    masked_ptr = free_ptr + tl.num_programs(0).to(tl.int64) * n_others
    n_free = tl.load(lengths_ptr + tile)
    n_masked = tl.load(lengths_ptr + tl.num_programs(0) + tile)
    step = tl.num_programs(1).to(tl.int64) * n_groups * T

    for member in range(0, n_groups):
        head = group * n_groups + member
        head_q = q_ptr + head * stride_qh
        head_dout = dout_ptr + head * stride_dh
        head_state = state_ptr + head * T
        for i in range(0, n_free):
            rows = tl.load(free_ptr + i) * BLOCK_Q + tl.arange(0, BLOCK_Q)
            q = _tile(head_q, rows, stride_qt, T, K, BLOCK_D)
            dy = _tile(head_dout, rows, stride_dt, T, KV, BLOCK_DV)
            lse = tl.load(head_state + rows)
            delta = tl.load(head_state + step + rows)
            z = _logits(k, q, scale, softcap, HAS_SOFTCAP, PRECISION)  # [BLOCK_K, BLOCK_Q]
            p = tl.exp(z - lse[None, :])
            dv = tl.dot(p.to(dy.dtype), dy, dv, input_precision=PRECISION)
            dz = p * (tl.dot(v, tl.trans(dy), input_precision=PRECISION) - delta[None, :])
            dz *= _slope(z, softcap, HAS_SOFTCAP)
            dk = tl.dot(dz.to(q.dtype), q, dk, input_precision=PRECISION)

        for i in range(0, n_masked):
            rows = tl.load(masked_ptr + i) * BLOCK_Q + tl.arange(0, BLOCK_Q)
            q = _tile(head_q, rows, stride_qt, T, K, BLOCK_D)
            dy = _tile(head_dout, rows, stride_dt, T, KV, BLOCK_DV)
            lse = tl.load(head_state + rows, mask=rows < T, other=0.0)
            delta = tl.load(head_state + step + rows, mask=rows < T, other=0.0)
            seen = _seen(rows, cols, end_ptr, position_ptr, T, window, HAS_WINDOW)
            seen = tl.trans(seen.to(tl.int32)) != 0
            z = _logits(k, q, scale, softcap, HAS_SOFTCAP, PRECISION)
            p = tl.exp(z - lse[None, :])
            # a query that is not finite makes nan of the keys it sees, and 0 x nan of no other
            clean = _finite(q) & _finite(dy)
            p = tl.where(clean[None, :], p, float("nan"))
            p = tl.where(seen, p, 0.0)
            dy = tl.where(clean[:, None], dy, 0.0).to(dy.dtype)
            q = tl.where(clean[:, None], q, 0.0).to(q.dtype)
            dv = tl.dot(p.to(dy.dtype), dy, dv, input_precision=PRECISION)
            dz = p * (tl.dot(v, tl.trans(dy), input_precision=PRECISION) - delta[None, :])
            dz *= _slope(z, softcap, HAS_SOFTCAP)
            dz = tl.where(seen, dz, 0.0)
            dk = tl.dot(dz.to(q.dtype), q, dk, input_precision=PRECISION)

    mask = (cols < T)[:, None]
    at = cols.to(tl.int64)[:, None]
    offs = tl.arange(0, BLOCK_D)[None, :]
    dk_at = dk_ptr + group * stride_xh + at * stride_xt + offs
    tl.store(dk_at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask & (offs < K))
    offs = tl.arange(0, BLOCK_DV)[None, :]
    dv_at = dv_ptr + group * stride_yh + at * stride_yt + offs
    tl.store(dv_at, dv.to(dv_ptr.dtype.element_ty), mask=mask & (offs < KV))


@triton.jit
def _slope(z, softcap, HAS_SOFTCAP: tl.constexpr):
    """Derivative of the softcap where it gives z."""
    slope = 1.0
    if HAS_SOFTCAP:
        capped = tl.div_rn(z, softcap)
        slope = 1.0 - capped * capped
    return slope


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, table: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Output [H, T, Kv] in the dtype of q, log-sum-exp [H, T] in fp32; T above 0."""
    del table
    H, T, _ = q.shape
    out = q.new_empty((T, H, v.shape[2])).transpose(0, 1)
    lse = q.new_empty((T, H), dtype=torch.float32).T
    options = _named(q, v, rule, "fwd", H // k.shape[0])
    options |= _strides(q=q, k=k, v=v, o=out, l=lse)
    options |= {"sinks_ptr": q if sinks is None else sinks, "HAS_SINKS": sinks is not None}
    with torch.cuda.device_of(q):
        _fwd_kernel[_grid_of(options, H)](
            q_ptr=q, k_ptr=k, v_ptr=v, out_ptr=out, lse_ptr=lse, **options
        )
    return out, lse


def backward(
    dout: Tensor, saved: tuple[Tensor, ...], sinks: Tensor | None, table: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and sinks; `saved` are q, k, v, output and log-sum-exp; T above 0."""
    del table
    q, k, v, out, lse = saved
    (H, T, _), Hkv = q.shape, k.shape[0]
    dout = dout if dout.stride(2) == 1 else dout.contiguous()
    dq, dk, dv = (x.new_empty((T, x.shape[0], x.shape[2])).transpose(0, 1) for x in (q, k, v))
    state = q.new_empty((2, H, T), dtype=torch.float32)
    tensors: dict[str, Any] = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "dout_ptr": dout}
    tensors |= {"state_ptr": state} | _strides(q=q, k=k, v=v, d=dout)
    widths: dict[str, Any] = {"KV": v.shape[2], "BLOCK_DV": padded(v.shape[2]), "ROWS": ROWS}
    with torch.cuda.device_of(q):  # Triton launches on the current device, not the tensor's
        _delta_kernel[(-(-T // ROWS), H)](
            dout, out, lse, state, T=T, **_strides(d=dout, o=out, l=lse), **widths, **LAUNCH
        )
        options: dict[str, Any] = tensors | _named(q, v, rule, "dq", H // Hkv) | _strides(x=dq)
        _dq_kernel[_grid_of(options, H)](dq_ptr=dq, **options)
        options = tensors | _named(q, v, rule, "dkv", H // Hkv) | _strides(x=dk, y=dv)
        _dkv_kernel[_grid_of(options, Hkv)](dk_ptr=dk, dv_ptr=dv, **options)
    dsinks = None
    if sinks is not None:
        mass = torch.exp(sinks.to(lse.dtype)[:, None] - lse)
        dsinks = -(mass * state[1]).sum(1).to(sinks.dtype)
    return dq, dk, dv, dsinks


def _named(q: Tensor, v: Tensor, rule: Rule, kernel: str, n_groups: int) -> dict[str, Any]:
    """What the kernels of the op take by name: options, numbers, tiles that meet, launch."""
    tiling = tiling_of(kernel, q, v)
    lists = lists_of(rule.end, rule.position, rule.window, tiling, of_queries=kernel != "dkv")
    return {
        "end_ptr": rule.end,
        "position_ptr": rule.position,
        "others_ptr": lists.others,
        "lengths_ptr": lists.lengths,
        "T": q.shape[1],
        "n_others": lists.others.shape[2],
        "n_groups": n_groups,
        "scale": rule.scale,
        "softcap": rule.softcap or 0.0,
        "window": rule.window or 0,
        "K": q.shape[2],
        "KV": v.shape[2],
        "BLOCK_D": padded(q.shape[2]),
        "BLOCK_DV": padded(v.shape[2]),
        "HAS_SOFTCAP": rule.softcap is not None,
        "HAS_WINDOW": rule.window is not None,
        "PRECISION": "ieee",  # no TF32 for fp32; half precision is on tensor cores all the same
        "enable_fp_fusion": True,
        **tiling._asdict(),
    }


def _strides(**tensors: Tensor) -> dict[str, Any]:
    """Strides over heads and tokens of each, as the kernels name them."""
    return {
        f"stride_{name}{axis}": x.stride(dim)
        for name, x in tensors.items()
        for dim, axis in enumerate("ht")
    }


def _grid_of(options: dict[str, Any], n_heads: int) -> tuple[int, int]:
    """A program a tile and head."""
    return options["lengths_ptr"].shape[1], n_heads
