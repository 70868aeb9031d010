"""Tree attention on a GPU: one online softmax over the tiles of keys that a tile of queries meets.

    z = scale * q . k (capped),    out = sum_j exp(z_j - lse) v_j

Forward walks a tile's list (`_tree_attention_tiles`), first the tiles that need no mask, then the
others; a sink is the softmax's first logit.

H query heads, Hkv key heads, T tokens, K and KV head sizes.  Accumulates in fp32.  No atomics and
no split sums: the bits of a tree whose first token is at a multiple of 128 depend on nothing else
in the row, nor on T; a tree moved by a multiple of 128 tokens keeps them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._fused_tile import tanh
from ._tree_attention_plan import Rule
from ._tree_attention_tiles import lists_of, padded, tiling_of


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


def named(q: Tensor, v: Tensor, rule: Rule, kernel: str, n_groups: int) -> dict[str, Any]:
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


def strides(**tensors: Tensor) -> dict[str, Any]:
    """Strides over heads and tokens of each, as the kernels name them."""
    return {
        f"stride_{name}{axis}": x.stride(dim)
        for name, x in tensors.items()
        for dim, axis in enumerate("ht")
    }


def grid_of(options: dict[str, Any], n_heads: int) -> tuple[int, int]:
    """A program a tile and head."""
    return options["lengths_ptr"].shape[1], n_heads


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, table: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Output [H, T, Kv] in the dtype of q, log-sum-exp [H, T] in fp32; T above 0."""
    del table
    H, T, _ = q.shape
    out = q.new_empty((T, H, v.shape[2])).transpose(0, 1)
    lse = q.new_empty((T, H), dtype=torch.float32).T
    options = named(q, v, rule, "fwd", H // k.shape[0])
    options |= strides(q=q, k=k, v=v, o=out, l=lse)
    options |= {"sinks_ptr": q if sinks is None else sinks, "HAS_SINKS": sinks is not None}
    with torch.cuda.device_of(q):
        _fwd_kernel[grid_of(options, H)](
            q_ptr=q, k_ptr=k, v_ptr=v, out_ptr=out, lse_ptr=lse, **options
        )
    return out, lse


def backward(
    dout: Tensor, saved: tuple[Tensor, ...], sinks: Tensor | None, table: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and sinks (`_tree_attention_bwd`)."""
    from ._tree_attention_bwd import backward as gradients

    del table
    return gradients(dout, saved, sinks, rule)
