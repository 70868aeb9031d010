"""`token_logprob` and its gradient in Triton.

Forward: one program a row, which reads each logit once. Every lane keeps running sums of its own,
all of them centred on one running maximum of the row (online softmax), and the lanes are added up
once, at the end of the row: one reduction a tile, and an error that does not grow with V.
Backward: one program a tile of the gradient, which is written once, in the dtype of the logits.

R rows of logits, S (row, target) pairs, V vocabulary.  The order of every sum is fixed by BLOCK_V,
never by R, and there are no atomics: a row has the same bits in any batch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._linear_logprob_fused import _tanh
from ._logits import LogitRows, Read
from ._rows import Pairs

# chosen, not measured: two 16-byte loads of bf16 a thread and tile
# fp fusion is spelled out: Triton 3.10 changes its default, and with it the last bits of a score
FORWARD: dict[str, Any] = {"BLOCK_V": 4096, "num_warps": 8, "enable_fp_fusion": True}
RANK: dict[str, Any] = {"BLOCK_V": 4096, "num_warps": 8, "enable_fp_fusion": True}
BACKWARD: dict[str, Any] = {"BLOCK_V": 4096, "num_warps": 8, "enable_fp_fusion": True}
N_OUT = 8  # rows of the forward kernel's `out`


@triton.jit
def _logit(
    x, temperature, softcap, HAS_TEMPERATURE: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):  # fmt: skip
    z = x.to(tl.float32)
    if HAS_SOFTCAP:
        z = softcap * _tanh(tl.div_rn(z, softcap))
    if HAS_TEMPERATURE:
        z = tl.div_rn(z, temperature)
    return z


@triton.jit
def _counts(offs_v, V, vocab_mask_ptr, HAS_MASK: tl.constexpr):
    kept = (offs_v >= 0) & (offs_v < V)
    if HAS_MASK:
        kept = kept & (tl.load(vocab_mask_ptr + offs_v, mask=kept, other=0) != 0)
    return kept


@triton.jit
def _row_kernel(
    logits_ptr,  # in  [R, >= V] fp16 | bf16 | fp32
    vocab_mask_ptr,  # in  [>= V] uint8, read if HAS_MASK
    target_ptr,  # in  [S] int64, sorted by row
    first_ptr,  # in  [R + 1] int64: the pairs of row r are first[r] ... first[r + 1]
    chosen_ptr,  # out [S] fp32, sorted by row: the target's logit, NaN outside the vocabulary
    out_ptr,  # out [8, R] fp32: top, log_mass, entropy, self_certainty, n_valid, ...
    top1_ptr,  # out [R] int64
    R,
    V,
    stride_r,
    stride_v,
    temperature,
    softcap,
    HAS_MASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    WANT_CERTAINTY: tl.constexpr,
    WANT_VARENTROPY: tl.constexpr,
    WANT_SUM_P2: tl.constexpr,
    WANT_TOP1: tl.constexpr,
    WANT_MARGIN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride_r passes 2**31 at 16k rows x 152k columns
    logits_ptr += row * stride_r
    top = float("-inf")
    mass = tl.zeros([BLOCK_V], tl.float32)
    spread = tl.zeros([BLOCK_V], tl.float32)
    square = tl.zeros([BLOCK_V], tl.float32)
    squares = tl.zeros([BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    n_valid = tl.zeros([BLOCK_V], tl.float32)
    best = tl.full([BLOCK_V], float("-inf"), tl.float32)
    second = tl.full([BLOCK_V], float("-inf"), tl.float32)
    column = tl.zeros([BLOCK_V], tl.int32)
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        kept = _counts(offs_v, V, vocab_mask_ptr, HAS_MASK)
        x = tl.load(logits_ptr + offs_v.to(tl.int64) * stride_v, mask=kept, other=0.0)
        z = _logit(x, temperature, softcap, HAS_TEMPERATURE, HAS_SOFTCAP)
        z = tl.where(kept, z, float("-inf"))
        new_top = tl.maximum(top, tl.max(z, axis=0))
        # all columns so far may be masked: shift by 0 there, or -inf - -inf is nan
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        gap = tl.where(top == float("-inf"), 0.0, top - shift)
        # where exp(gap) is 0, its products with powers of the gap must be 0 as well
        near = tl.maximum(gap, -1e3)
        scale = tl.exp(near)
        c = z - shift
        e = tl.exp(c)
        c = tl.where(z == float("-inf"), 0.0, c)
        if WANT_VARENTROPY:
            square = scale * (square + near * (2 * spread + near * mass)) + (e * c) * c
        if WANT_ENTROPY:
            spread = scale * (spread + mass * near) + e * c
        if WANT_SUM_P2:
            squares = scale * scale * squares + e * e
        if WANT_CERTAINTY:
            total = total + n_valid * gap + c
            n_valid += (z != float("-inf")).to(tl.float32)
        if WANT_MARGIN:
            second = tl.maximum(second, tl.minimum(z, best))
        if WANT_TOP1:
            column = tl.where(z > best, offs_v, column)
            best = tl.maximum(best, z)
        mass = scale * mass + e
        top = new_top

    row_mass = tl.sum(mass, axis=0)
    log_mass = tl.log(row_mass)
    out_ptr += row
    step = tl.full((), R, tl.int64)
    tl.store(out_ptr, top)
    tl.store(out_ptr + step, log_mass)
    if WANT_ENTROPY:
        mean = tl.sum(spread, axis=0) / row_mass
        tl.store(out_ptr + 2 * step, log_mass - mean)
    if WANT_CERTAINTY:
        row_valid = tl.sum(n_valid, axis=0)
        certainty = log_mass - tl.sum(total, axis=0) / row_valid - tl.log(row_valid)
        tl.store(out_ptr + 3 * step, certainty)
        tl.store(out_ptr + 4 * step, row_valid)
    if WANT_VARENTROPY:
        # each lane moves to the mean before they are added up: what cancels does so lane by lane
        off = tl.sum(spread - mean * mass, axis=0) / row_mass
        around = tl.sum(square - mean * (2 * spread - mean * mass), axis=0) / row_mass
        variance = around - off * off
        tl.store(out_ptr + 5 * step, tl.where(variance < 0, 0.0, variance))
    if WANT_SUM_P2:
        tl.store(out_ptr + 6 * step, tl.sum(squares, axis=0) / row_mass / row_mass)
    if WANT_TOP1:
        winner = tl.min(tl.where(best == top, column, V), axis=0)
        # an infinite log_mass is that of a row without columns; nan compares false
        found = (row_mass > 0) & (row_mass < float("inf"))
        tl.store(top1_ptr + row, tl.where(found, winner, -1).to(tl.int64))
        if WANT_MARGIN:
            runner_up = tl.max(tl.where(column == winner, second, best), axis=0)
            margin = tl.where(found, top - runner_up, float("nan"))
            tl.store(out_ptr + 7 * step, margin)

    stop = tl.load(first_ptr + row + 1)
    for s in range(tl.load(first_ptr + row), stop):
        target = tl.load(target_ptr + s)
        inside = (target >= 0) & (target < V)
        kept = _counts(target, V, vocab_mask_ptr, HAS_MASK)
        x = tl.load(logits_ptr + target * stride_v, mask=kept, other=0.0)
        z = _logit(x, temperature, softcap, HAS_TEMPERATURE, HAS_SOFTCAP)
        z = tl.where(kept, z, float("-inf"))
        tl.store(chosen_ptr + s, tl.where(inside, z, float("nan")))


@triton.jit
def _rank_kernel(
    logits_ptr,  # in  [R, >= V]
    vocab_mask_ptr,  # in  [>= V] uint8, read if HAS_MASK
    row_ptr,  # in  [S] int64
    target_ptr,  # in  [S] int64
    chosen_ptr,  # in  [S] fp32: the target's logit
    rank_ptr,  # out [S] int64
    R,
    V,
    stride_r,
    stride_v,
    temperature,
    softcap,
    HAS_MASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    row = tl.load(row_ptr + s)
    target = tl.load(target_ptr + s)
    chosen = tl.load(chosen_ptr + s)
    logits_ptr += row * stride_r
    in_rows = (row >= 0) & (row < R)
    ahead = tl.zeros([BLOCK_V], tl.int32)
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        kept = _counts(offs_v, V, vocab_mask_ptr, HAS_MASK) & in_rows
        x = tl.load(logits_ptr + offs_v.to(tl.int64) * stride_v, mask=kept, other=0.0)
        z = _logit(x, temperature, softcap, HAS_TEMPERATURE, HAS_SOFTCAP)
        first = (z > chosen) | ((z == chosen) & (offs_v < target))
        ahead += (kept & first & (z != float("-inf"))).to(tl.int32)
    tl.store(rank_ptr + s, 1 + tl.sum(ahead, axis=0).to(tl.int64))


@triton.jit
def _grad_kernel(
    dlogits_ptr,  # out [R, width] dtype of logits, contiguous
    grad_ptr,  # in  [4, S] fp32, sorted by row: of logprob, lse, entropy, self_certainty
    state_ptr,  # in  [4, R] fp32: top, log_mass, entropy, n_valid
    logits_ptr,  # in  [R, width]
    vocab_mask_ptr,  # in  [>= V] uint8, read if HAS_MASK
    target_ptr,  # in  [S] int64, sorted by row
    first_ptr,  # in  [R + 1] int64
    R,
    S,
    V,
    width,
    stride_r,
    stride_v,
    temperature,
    softcap,
    HAS_MASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = (tl.program_id(0) // tl.cdiv(width, BLOCK_V)).to(tl.int64)
    offs_v = tl.program_id(0) % tl.cdiv(width, BLOCK_V) * BLOCK_V + tl.arange(0, BLOCK_V)
    first = tl.load(first_ptr + row)
    stop = tl.load(first_ptr + row + 1)
    chosen = 0.0
    prob = 0.0
    of_entropy = 0.0
    certain = 0.0
    reached = first < first
    at_target = tl.zeros([BLOCK_V], tl.float32)
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
        at_target += tl.where(offs_v == tl.load(target_ptr + s), of_logprob, 0.0)

    # a row that no gradient reaches is not read: NaN in it or not, its gradient is exactly 0
    kept = _counts(offs_v, V, vocab_mask_ptr, HAS_MASK) & reached
    step = tl.full((), R, tl.int64)
    top = tl.load(state_ptr + row)
    top = tl.where(top == float("-inf"), 0.0, top)
    log_mass = tl.load(state_ptr + step + row)
    entropy = tl.load(state_ptr + 2 * step + row)
    n_valid = tl.load(state_ptr + 3 * step + row)
    logits_ptr += row * stride_r
    x = tl.load(logits_ptr + offs_v.to(tl.int64) * stride_v, mask=kept, other=0.0)
    z = _logit(x, temperature, softcap, HAS_TEMPERATURE, HAS_SOFTCAP)
    counts = kept & (z != float("-inf"))
    log_p = (z - top) - log_mass
    p = tl.exp(log_p)
    dz = p * (prob + certain - chosen)
    if of_entropy != 0:
        # dH / dz = -p (log p + H)
        dz -= p * (log_p + entropy) * of_entropy
    if certain != 0:
        dz -= certain / n_valid
    dz += at_target
    if HAS_SOFTCAP:
        capped = z * tl.div_rn(temperature, softcap)
        dz *= 1 - capped * capped
    if HAS_TEMPERATURE:
        dz = tl.div_rn(dz, temperature)
    dz = tl.where(counts, dz, 0.0)
    dlogits_ptr += row * width
    tl.store(dlogits_ptr + offs_v, dz.to(dlogits_ptr.dtype.element_ty), mask=offs_v < width)


def _reading(logits: Tensor, read: Read) -> tuple[Tensor, dict[str, Any], tuple[Any, ...]]:
    """The mask's bytes (or a stand-in), the flags of `read`, and its numbers."""
    mask = logits if read.vocab_mask is None else read.vocab_mask.contiguous().view(torch.uint8)
    flags: dict[str, Any] = {
        "HAS_MASK": read.vocab_mask is not None,
        "HAS_TEMPERATURE": read.temperature != 1.0,
        "HAS_SOFTCAP": read.softcap is not None,
    }
    return mask, flags, (*logits.stride(), read.temperature, read.softcap or 0.0)


def forward(
    logits: Tensor, read: Read, pairs: Pairs, stats: list[str]
) -> tuple[LogitRows, Tensor, Tensor | None]:
    """Statistics of every row; logit and (if asked) rank of every pair's target.  Wants R > 0."""
    R, V = logits.shape[0], read.vocab_size
    margin = "margin" in stats
    varentropy = "varentropy" in stats
    want: dict[str, Any] = {
        "WANT_ENTROPY": varentropy or "entropy" in stats,
        "WANT_CERTAINTY": "self_certainty" in stats,
        "WANT_VARENTROPY": varentropy,
        "WANT_SUM_P2": "sum_p2" in stats,
        "WANT_TOP1": margin or "top1" in stats or "is_greedy" in stats,
        "WANT_MARGIN": margin,
    }
    mask, flags, numbers = _reading(logits, read)
    out = logits.new_zeros((N_OUT, R), dtype=torch.float32)
    top1 = torch.full((R,), -1, dtype=torch.int64, device=logits.device)
    chosen = logits.new_full(pairs.target.shape, float("nan"), dtype=torch.float32)
    rank = torch.ones_like(pairs.target) if "rank" in stats else None
    with torch.cuda.device_of(logits):  # Triton launches on the current device, not the tensor's
        _row_kernel[(R,)](
            logits, mask, pairs.target, pairs.first, chosen, out, top1,
            R, V, *numbers, **flags, **want, **FORWARD,
        )  # fmt: skip
        if rank is not None:
            _rank_kernel[(rank.shape[0],)](
                logits, mask, pairs.row, pairs.target, chosen, rank,
                R, V, *numbers, **flags, **RANK,
            )  # fmt: skip
    *per_row, sum_p2, top_2 = out.unbind()
    top, log_mass, entropy, certainty, n_valid, variance = per_row
    return (
        LogitRows(top, log_mass, entropy, certainty, n_valid, variance, sum_p2, top_2, top1),
        chosen,
        rank,
    )


def backward(grads: Tensor, state: Tensor, logits: Tensor, read: Read, pairs: Pairs) -> Tensor:
    """Gradient of the logits [R, width]; `grads` [4, S] in the order of the pairs.  Wants R > 0."""
    R, width = logits.shape
    mask, flags, numbers = _reading(logits, read)
    dlogits = logits.new_empty((R, width))
    with torch.cuda.device_of(logits):
        _grad_kernel[(R * triton.cdiv(width, BACKWARD["BLOCK_V"]),)](
            dlogits, grads.contiguous(), state, logits, mask, pairs.target, pairs.first,
            R, grads.shape[1], read.vocab_size, width, *numbers, **flags, **BACKWARD,
        )  # fmt: skip
    return dlogits
