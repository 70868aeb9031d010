"""What each (row, target) pair reads off rows of logits, in Triton: the target's logit, its rank.

R rows of logits, S (row, target) pairs, V vocabulary.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton_logits import INF, Reading, load_lanes, load_logits

# chosen by the instructions and registers of the cubin, not measured
CHOSEN: dict[str, Any] = {"BLOCK_S": 128, "num_warps": 4, "enable_fp_fusion": False}
RANK: dict[str, Any] = {
    "SEGMENT": 32768, "UNROLL": 4, "LANES": 128, "num_warps": 4, "enable_fp_fusion": False,
}  # fmt: skip


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
    offs_s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    row = tl.load(row_ptr + offs_s, mask=offs_s < S, other=-1)
    column = tl.load(target_ptr + offs_s, mask=offs_s < S, other=-1) - first_v
    inside = (row >= 0) & (row < R) & (column >= 0) & (column < V)
    z = load_logits(
        logits_ptr + row * stride_r, bias_ptr, vocab_mask_ptr, column, inside,
        stride_v, stride_b, softcap, inverse_softcap, inverse_temperature,
        False, HAS_BIAS, HAS_MASK, HAS_SOFTCAP, HAS_TEMPERATURE,
    )  # fmt: skip
    tl.store(chosen_ptr + offs_s, z, mask=inside)


@triton.jit
def _count_ahead(z, offs_v, chosen, left):
    """How many of `z` [LANES, VECTOR] are ahead of `chosen`, lane by lane."""
    ahead = (z > chosen) | ((z == chosen) & (offs_v < left))
    return tl.sum(ahead.to(tl.int32), axis=1)


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
                logits_ptr, bias_ptr, vocab_mask_ptr, start + u * STEP + near, V,
                stride_v, stride_b, softcap, inverse_softcap, inverse_temperature,
                True, HAS_BIAS, HAS_MASK, HAS_SOFTCAP, HAS_TEMPERATURE, IS_ALIGNED, VECTOR,
            )  # fmt: skip
            ahead += _count_ahead(z, start + u * STEP + offs_near, chosen, left)
    for start in range(tl.maximum(first, whole), tl.minimum(first + SEGMENT, V), STEP):
        z = load_lanes(
            logits_ptr, bias_ptr, vocab_mask_ptr, start + near, V,
            stride_v, stride_b, softcap, inverse_softcap, inverse_temperature,
            False, HAS_BIAS, HAS_MASK, HAS_SOFTCAP, HAS_TEMPERATURE, IS_ALIGNED, VECTOR,
        )  # fmt: skip
        ahead += _count_ahead(z, start + offs_near, chosen, left)
    tl.store(ahead_ptr + tl.program_id(0), tl.sum(ahead, axis=0))


def put_chosen(x: Reading, row: Tensor, target: Tensor, first_v: int, chosen: Tensor) -> None:
    """Write into `chosen` [S] the logits of the targets that are in these rows and columns."""
    S = row.shape[0]
    if S > 0:
        _chosen_kernel[(triton.cdiv(S, CHOSEN["BLOCK_S"]),)](
            *x.tensors,
            row,
            target.contiguous(),
            chosen,
            S,
            x.R,
            first_v,
            x.V,
            *x.numbers,
            **x.flags,
            **CHOSEN,
        )


def ahead(x: Reading, row: Tensor, target: Tensor, first_v: int, chosen: Tensor) -> Tensor:
    """Unmasked columns of these ahead of each target [S] int64; 0 for a row outside."""
    S, n = row.shape[0], -(-x.V // RANK["SEGMENT"])
    counts = torch.empty((S, n), dtype=torch.int32, device=chosen.device)
    if S > 0:
        _rank_kernel[(S * n,)](
            *x.tensors, row, target.contiguous(), chosen, counts, n, x.R, first_v, x.V,
            *x.numbers, **x.flags, **x.vectors, **RANK,
        )  # fmt: skip
    return counts.sum(dim=1)
