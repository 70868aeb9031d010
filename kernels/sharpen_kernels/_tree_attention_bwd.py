"""Gradients of tree attention on a GPU: the softmax is built again from `lse`, tile by tile.

    p = exp(z - lse),    delta[q] = dout[q] . out[q],    dz = p (dout . v - delta)
    dq = scale dz k,    dk = scale dz^T q,    dv = p^T dout,    dsink = -sum_q exp(sink - lse) delta

One kernel holds a tile of queries and walks the keys they see, one holds a tile of keys and walks
the queries that see them, which lie in [k, end[k]), head by head: every sum has one order.

H query heads, Hkv key heads, T tokens, K and KV head sizes.  Accumulates in fp32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tree_attention_plan import Rule
from ._tree_attention_tiles import LAUNCH, padded
from ._tree_attention_triton import (
    _finite,
    _logits,
    _seen,
    _tile,
    grid_of,
    named,
    strides,
)

ROWS = 64  # queries of a program of the first kernel; chosen


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
def _slope(z, softcap, HAS_SOFTCAP: tl.constexpr):
    """Derivative of the softcap where it gives z."""
    slope = 1.0
    if HAS_SOFTCAP:
        capped = tl.div_rn(z, softcap)
        slope = 1.0 - capped * capped
    return slope


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


def backward(
    dout: Tensor, saved: tuple[Tensor, ...], sinks: Tensor | None, rule: Rule
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and sinks; `saved` are q, k, v, output and log-sum-exp; T above 0."""
    q, k, v, out, lse = saved
    (H, T, _), Hkv = q.shape, k.shape[0]
    dout = dout if dout.stride(2) == 1 else dout.contiguous()
    dq, dk, dv = (x.new_empty((T, x.shape[0], x.shape[2])).transpose(0, 1) for x in (q, k, v))
    state = q.new_empty((2, H, T), dtype=torch.float32)
    tensors: dict[str, Any] = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "dout_ptr": dout}
    tensors |= {"state_ptr": state} | strides(q=q, k=k, v=v, d=dout)
    widths: dict[str, Any] = {"KV": v.shape[2], "BLOCK_DV": padded(v.shape[2]), "ROWS": ROWS}
    with torch.cuda.device_of(q):  # Triton launches on the current device, not the tensor's
        _delta_kernel[(-(-T // ROWS), H)](
            dout, out, lse, state, T=T, **strides(d=dout, o=out, l=lse), **widths, **LAUNCH
        )
        options: dict[str, Any] = tensors | named(q, v, rule, "dq", H // Hkv) | strides(x=dq)
        _dq_kernel[grid_of(options, H)](dq_ptr=dq, **options)
        options = tensors | named(q, v, rule, "dkv", H // Hkv) | strides(x=dk, y=dv)
        _dkv_kernel[grid_of(options, Hkv)](dk_ptr=dk, dv_ptr=dv, **options)
    dsinks = None
    if sinks is not None:
        mass = torch.exp(sinks.to(lse.dtype)[:, None] - lse)
        dsinks = -(mass * state[1]).sum(1).to(sinks.dtype)
    return dq, dk, dv, dsinks
