"""Backward of `token_logprob` in Triton: one program a tile of the gradient, written once.

R rows of logits, S (row, target) pairs, V vocabulary.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._fused_tile import exp
from ._logits import Read
from ._pairs import Pairs
from ._triton_logits import INF, Reading, logit

# chosen, not measured
BACKWARD: dict[str, Any] = {"BLOCK_V": 4096, "num_warps": 8, "enable_fp_fusion": False}


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
    z = logit(
        x, 0.0, softcap, inverse_softcap, inverse_temperature, False, HAS_SOFTCAP, HAS_TEMPERATURE
    )
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


def backward(grads: Tensor, state: Tensor, logits: Tensor, read: Read, pairs: Pairs) -> Tensor:
    """Gradient of the logits [R, width]; `grads` [4, S] in the order of the pairs.  Wants R > 0."""
    R, width = logits.shape
    x = Reading(logits, read)
    dlogits = logits.new_empty((R, width))
    by_softcap = read.temperature / (read.softcap or 1.0)
    with torch.cuda.device_of(logits):  # Triton launches on the current device, not the tensor's
        _grad_kernel[(R * triton.cdiv(width, BACKWARD["BLOCK_V"]),)](
            *x.tensors, grads.contiguous(), state, pairs.target.contiguous(), pairs.first, dlogits,
            R, grads.shape[1], x.V, width, by_softcap, *x.numbers, **x.flags, **x.vectors,
            **BACKWARD,
        )  # fmt: skip
    return dlogits
