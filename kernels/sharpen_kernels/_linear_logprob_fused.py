"""Forward of `linear_logprob` in Triton: one program a block of rows and vocabulary segment.

A program walks its segment in tiles of logits held in fp32 on the chip, and keeps a few running
sums a row; a second kernel merges the segments from the first column to the last. A target's
logit is read out of the very tile that enters the sum, so no log-probability exceeds 0.

R hidden rows, S (row, target) pairs, V vocabulary, D hidden.  Segment and tile are fixed by the
dtype, never by R, and there are no atomics: a row scores the same bits in any batch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import INTERPRETED
from ._linear_logprob_chunk import Head
from ._pairs import Pairs
from ._rows import Rows

# chosen, not measured. SEGMENT: columns a program, enough programs for few rows and few partials
# to merge. GROUP_R: blocks of rows that run side by side and read one segment of weight from L2
# fp fusion is spelled out: Triton 3.10 changes its default, and with it the last bits of a score
TENSOR_CORES: dict[str, Any] = {
    "SEGMENT": 4096, "GROUP_R": 16, "BLOCK_R": 128, "BLOCK_V": 128, "BLOCK_D": 64,
    "num_warps": 8, "num_stages": 3, "enable_fp_fusion": True,
}  # fmt: skip
FP32: dict[str, Any] = {
    "SEGMENT": 4096, "GROUP_R": 16, "BLOCK_R": 64, "BLOCK_V": 64, "BLOCK_D": 32,
    "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True,
}  # fmt: skip
MERGE: dict[str, Any] = {"BLOCK_R": 128, "num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _tanh(y):
    # 1 - exp(-2y) cancels near 0: a Taylor series there, off by 1e-8 of the value at the seam
    y2 = y * y
    series = y * (1 + y2 * (-1 / 3 + y2 * (2 / 15 + y2 * (-17 / 315 + y2 * (62 / 2835)))))
    e = tl.exp(-2 * tl.abs(y))
    far = (1 - e) / (1 + e)
    return tl.where(tl.abs(y) < 0.25, series, tl.where(y < 0, -far, far))


@triton.jit
def _segment_kernel(
    hidden_ptr,  # in  [R, D] fp16 | bf16 | fp32
    weight_ptr,  # in  [V, D] fp16 | bf16 | fp32
    bias_ptr,  # in  [V], read if HAS_BIAS
    target_ptr,  # in  [S] int64, sorted by row
    first_ptr,  # in  [R + 1] int64: the pairs of row r are first[r] ... first[r + 1]
    chosen_ptr,  # out [S] fp32, sorted by row
    part_ptr,  # out [5, n_segments, R] fp32: top, mass, spread, mean, n_valid
    greedy_ptr,  # out [n_segments, R] int64
    R,
    V,
    D,
    n_segments,
    stride_hr,
    stride_hd,
    stride_wv,
    stride_wd,
    stride_b,
    temperature,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    WANT_CERTAINTY: tl.constexpr,
    WANT_GREEDY: tl.constexpr,
    WIDEN: tl.constexpr,  # multiply in fp32: dtypes differ, or the interpreter, blind to bf16
    SEGMENT: tl.constexpr,
    GROUP_R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n_blocks = tl.cdiv(R, BLOCK_R)
    pid = tl.program_id(0)
    in_group = pid % (GROUP_R * n_segments)
    first_block = pid // (GROUP_R * n_segments) * GROUP_R
    group = tl.minimum(n_blocks - first_block, GROUP_R)
    block = first_block + in_group % group
    segment = in_group // group

    # offsets pass 2**31: 16k rows x 152k columns, a head of 256k x 8192
    offs_r = block.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    in_tile = tl.arange(0, BLOCK_V)[None, :]
    first = tl.load(first_ptr + offs_r, mask=mask_r, other=0)
    n_pairs = (tl.load(first_ptr + offs_r + 1, mask=mask_r, other=0) - first).to(tl.int32)
    max_pairs = tl.max(n_pairs, axis=0)

    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_R], tl.float32)
    spread = tl.zeros([BLOCK_R], tl.float32)
    mean = tl.zeros([BLOCK_R], tl.float32)
    n_valid = tl.zeros([BLOCK_R], tl.float32)
    greedy = tl.zeros([BLOCK_R], tl.int32)
    stop = tl.minimum((segment + 1) * SEGMENT, V)
    for start in range(segment * SEGMENT, stop, BLOCK_V):
        offs_v = (start + tl.arange(0, BLOCK_V)).to(tl.int64)
        mask_v = offs_v < stop
        z = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
        for d in range(0, D, BLOCK_D):
            mask_d = d + offs_d < D
            x = tl.load(
                hidden_ptr + offs_r[:, None] * stride_hr + (d + offs_d)[None, :] * stride_hd,
                mask=mask_r[:, None] & mask_d[None, :],
                other=0.0,
            )  # [BLOCK_R, BLOCK_D]
            w = tl.load(
                weight_ptr + offs_v[None, :] * stride_wv + (d + offs_d)[:, None] * stride_wd,
                mask=mask_v[None, :] & mask_d[:, None],
                other=0.0,
            )  # [BLOCK_D, BLOCK_V]
            if WIDEN:
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            z = tl.dot(x, w, z, input_precision="ieee")
        if HAS_BIAS:
            z += tl.load(bias_ptr + offs_v * stride_b, mask=mask_v, other=0.0).to(tl.float32)
        if HAS_SOFTCAP:
            z = softcap * _tanh(tl.div_rn(z, softcap))
        if HAS_TEMPERATURE:
            z = tl.div_rn(z, temperature)
        z = tl.where(mask_v[None, :], z, float("-inf"))

        for k in range(max_pairs):  # pyright: ignore[reportArgumentType]  Triton's takes tensors
            target = tl.load(target_ptr + first + k, mask=k < n_pairs, other=-1)
            here = (target >= start) & (target < start + BLOCK_V) & (target < stop)
            column = tl.where(here, target - start, -1).to(tl.int32)
            logit = tl.sum(tl.where(in_tile == column[:, None], z, 0.0), axis=1)
            tl.store(chosen_ptr + first + k, logit, mask=here)

        new_top = tl.maximum(top, tl.max(z, axis=1))
        # all columns so far may be masked: shift by 0 there, or -inf - -inf is nan
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        gap = tl.where(top == float("-inf"), 0.0, top - shift)
        scale = tl.where(top == float("-inf"), 0.0, tl.exp(gap))
        valid = z != float("-inf")
        e = tl.exp(z - shift[:, None])
        if WANT_ENTROPY:
            centred = tl.where(valid, z - shift[:, None], 0.0)
            spread = scale * (spread + mass * gap) + tl.sum(e * centred, axis=1)
        if WANT_CERTAINTY:
            tile_valid = tl.sum(valid.to(tl.float32), axis=1)
            tile_mean = tl.sum(tl.where(valid, z, 0.0), axis=1) / tl.maximum(tile_valid, 1.0)
            n_valid += tile_valid
            mean += (tile_mean - mean) * (tile_valid / tl.maximum(n_valid, 1.0))
        if WANT_GREEDY:
            at_top = tl.where(z == new_top[:, None], start + in_tile, V)
            greedy = tl.where(new_top > top, tl.min(at_top, axis=1), greedy)
        mass = mass * scale + tl.sum(e, axis=1)
        top = new_top

    step = tl.full((), R, tl.int64) * n_segments
    out = segment.to(tl.int64) * R + offs_r
    tl.store(part_ptr + out, top, mask=mask_r)
    tl.store(part_ptr + step + out, mass, mask=mask_r)
    if WANT_ENTROPY:
        tl.store(part_ptr + 2 * step + out, spread, mask=mask_r)
    if WANT_CERTAINTY:
        tl.store(part_ptr + 3 * step + out, mean, mask=mask_r)
        tl.store(part_ptr + 4 * step + out, n_valid, mask=mask_r)
    if WANT_GREEDY:
        tl.store(greedy_ptr + out, greedy, mask=mask_r)


@triton.jit
def _merge_kernel(
    part_ptr,  # in  [5, n_segments, R] fp32
    greedy_part_ptr,  # in  [n_segments, R] int64
    out_ptr,  # out [5, R] fp32: top, log_mass, entropy, self_certainty, n_valid
    greedy_ptr,  # out [R] int64
    R,
    n_segments,
    WANT_ENTROPY: tl.constexpr,
    WANT_CERTAINTY: tl.constexpr,
    WANT_GREEDY: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    step = tl.full((), R, tl.int64) * n_segments
    part_ptr += offs_r
    greedy_part_ptr += offs_r
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_R], tl.float32)
    spread = tl.zeros([BLOCK_R], tl.float32)
    mean = tl.zeros([BLOCK_R], tl.float32)
    n_valid = tl.zeros([BLOCK_R], tl.float32)
    greedy = tl.zeros([BLOCK_R], tl.int64)
    for _ in range(n_segments):
        seg_top = tl.load(part_ptr, mask=mask_r, other=float("-inf"))
        seg_mass = tl.load(part_ptr + step, mask=mask_r, other=0.0)
        new_top = tl.maximum(top, seg_top)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        gap = tl.where(top == float("-inf"), 0.0, top - shift)
        seg_gap = tl.where(seg_top == float("-inf"), 0.0, seg_top - shift)
        scale = tl.where(top == float("-inf"), 0.0, tl.exp(gap))
        # 1 for a segment that is all masked: its sums are 0, or nan
        seg_scale = tl.exp(seg_gap)
        if WANT_ENTROPY:
            seg_spread = tl.load(part_ptr + 2 * step, mask=mask_r, other=0.0)
            spread = scale * (spread + mass * gap) + seg_scale * (seg_spread + seg_mass * seg_gap)
        if WANT_CERTAINTY:
            seg_mean = tl.load(part_ptr + 3 * step, mask=mask_r, other=0.0)
            seg_valid = tl.load(part_ptr + 4 * step, mask=mask_r, other=0.0)
            n_valid += seg_valid
            mean += (seg_mean - mean) * (seg_valid / tl.maximum(n_valid, 1.0))
        if WANT_GREEDY:
            seg_greedy = tl.load(greedy_part_ptr, mask=mask_r, other=0)
            greedy = tl.where(seg_top > top, seg_greedy, greedy)
        mass = mass * scale + seg_mass * seg_scale
        top = new_top
        part_ptr += R
        greedy_part_ptr += R

    log_mass = tl.log(mass)
    tl.store(out_ptr + offs_r, top, mask=mask_r)
    tl.store(out_ptr + R + offs_r, log_mass, mask=mask_r)
    if WANT_ENTROPY:
        tl.store(out_ptr + 2 * R + offs_r, log_mass - spread / mass, mask=mask_r)
    if WANT_CERTAINTY:
        certainty = (top - mean) - tl.log(n_valid) + log_mass
        tl.store(out_ptr + 3 * R + offs_r, certainty, mask=mask_r)
        tl.store(out_ptr + 4 * R + offs_r, n_valid, mask=mask_r)
    if WANT_GREEDY:
        tl.store(greedy_ptr + offs_r, greedy, mask=mask_r)


def forward(hidden: Tensor, head: Head, pairs: Pairs, stats: list[str]) -> tuple[Rows, Tensor]:
    """Statistics of every row, and the logit of every pair's target (NaN outside the vocabulary).

    Wants R > 0.  Workspace: at most seven values a row and segment.
    """
    (R, D), V, weight, bias = hidden.shape, head.vocab_size, head.weight, head.bias
    half = hidden.dtype == weight.dtype != torch.float32
    tile = TENSOR_CORES if half else FP32
    n_segments = -(-V // tile["SEGMENT"])
    want: dict[str, Any] = {
        "WANT_ENTROPY": "entropy" in stats,
        "WANT_CERTAINTY": "self_certainty" in stats,
        "WANT_GREEDY": "is_greedy" in stats,
    }
    head_flags: dict[str, Any] = {
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": head.softcap is not None,
        "HAS_TEMPERATURE": head.temperature != 1.0,
        "WIDEN": INTERPRETED or not half,
    }
    chosen = hidden.new_full(pairs.target.shape, float("nan"), dtype=torch.float32)
    part = hidden.new_empty((5, n_segments, R), dtype=torch.float32)
    greedy_part = torch.empty((n_segments, R), dtype=torch.int64, device=hidden.device)
    out = hidden.new_empty((5, R), dtype=torch.float32)
    greedy = torch.empty_like(greedy_part[0])
    with torch.cuda.device_of(hidden):  # Triton launches on the current device, not the tensor's
        _segment_kernel[(triton.cdiv(R, tile["BLOCK_R"]) * n_segments,)](
            hidden, weight, weight if bias is None else bias,
            pairs.target, pairs.first, chosen, part, greedy_part,
            R, V, D, n_segments,
            hidden.stride(0), hidden.stride(1), weight.stride(0), weight.stride(1),
            0 if bias is None else bias.stride(0),
            head.temperature, head.softcap or 0.0,
            **head_flags, **want, **tile,
        )  # fmt: skip
        _merge_kernel[(triton.cdiv(R, MERGE["BLOCK_R"]),)](
            part, greedy_part, out, greedy, R, n_segments, **want, **MERGE
        )
    top, log_mass, entropy, self_certainty, n_valid = out
    certain = want["WANT_CERTAINTY"]
    return Rows(
        top,
        log_mass,
        entropy if want["WANT_ENTROPY"] else None,
        self_certainty if certain else None,
        n_valid if certain else None,
        greedy if want["WANT_GREEDY"] else None,
    ), chosen
