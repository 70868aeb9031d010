"""Forward of `token_logprob` in Triton: one program a row and segment, which reads each logit once.

A lane takes 16 bytes at a time and keeps running sums of its own, centred on its own running
maximum (online softmax, Milakov & Gimelshein 2018, arXiv:1805.02867): no thread waits for another
before the segment ends. Lanes are then summed, and segments merged from the first column on.

R rows of logits, S (row, target) pairs, V vocabulary.  Segments, lanes and the order of every sum
are fixed by the dtype alone, never by R, alignment or what is asked for; there are no atomics and
no compiler fuses on its own: a row has the same bits in any batch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _fused_state as law
from ._logits import Read
from ._pairs import Pairs
from ._rows import Partial
from ._token_logprob_best import best
from ._token_logprob_grad import backward as backward
from ._token_logprob_pairs import ahead, put_chosen
from ._triton_logits import (
    INF,
    Reading,
    fold,
    fold_lanes,
    fold_product,
    fold_top_two,
    load_lanes,
    load_logits,
    load_tile,
)
from .stats import Wanted

# chosen by the instructions and registers of the cubin, not measured: 64 bytes a thread in flight.
# SEGMENT: long enough that summing the lanes is little beside it, short enough that a few
# rows of a large vocabulary occupy the GPU
FORWARD: dict[str, Any] = {
    "SEGMENT": 32768, "UNROLL": 4, "LANES": 128, "num_warps": 4, "enable_fp_fusion": False,
}  # fmt: skip
MERGE: dict[str, Any] = {"BLOCK_R": 128, "num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _with_tile(
    state,  # of [LANES] lanes
    z,  # [LANES, N] logits to the right of those in `state`
    inside,  # the same shape: which of them are columns, read unless IS_WHOLE
    start,
    order,
    IS_WHOLE: tl.constexpr,
    WANT: tl.constexpr,
    LANES: tl.constexpr,
    N: tl.constexpr,
):
    """`state` and the columns of `z`; the total of a lane that has a masked column is -inf."""
    tile_top = tl.max(z, axis=1)  # drops nan; the mass below does not
    top = tl.maximum(state[0], tile_top)
    # all columns so far may be masked: shift by 0 there, or -inf - -inf is nan
    shift = tl.where(top == -INF, 0.0, top)
    c = z - shift[:, None]
    e = law.exp(c)
    mass = fold(e, LANES, N)
    zero = tl.zeros([LANES], tl.float32)
    spread, square, squares, powers, total, n_valid = zero, zero, zero, zero, zero, zero
    second = zero
    column = tl.zeros([LANES], tl.int32)
    if law.SPREAD & WANT:
        # a masked column adds 0; 0 * -inf would add nan
        near = tl.maximum(c, law.FAR)
        spread = fold_product(e, near, LANES, N)
        if law.SQUARE & WANT:
            mean = spread / tl.where(mass == 0.0, 1.0, mass)
            apart = near - mean[:, None]
            square = fold_product(e * apart, apart, LANES, N)
    if law.SQUARES & WANT:
        squares = fold_product(e, e, LANES, N)
    if law.POWERS & WANT:
        powers = fold(law.exp(order * c), LANES, N)
    if law.TOTAL & WANT:
        if IS_WHOLE:
            total = fold(c, LANES, N)
            n_valid += N
        else:
            total = fold(tl.where(inside, c, 0.0), LANES, N)
            n_valid = tl.sum(inside.to(tl.float32), axis=1)
    if law.COLUMN & WANT:
        # not the column but its tile: the segment's end looks there again
        column += start
    if law.SECOND & WANT:
        _, second = fold_top_two(z, tl.full([LANES, N], -INF, tl.float32), LANES, N)
    tile = (tile_top, mass, spread, square, squares, powers, total, n_valid, second, column)
    return law._joined(law._moved(state, shift, order, WANT), tile, top, WANT)


@triton.jit
def _row_kernel(
    logits_ptr,  # in  [R, >= V] fp16 | bf16 | fp32
    bias_ptr,  # in  [>= V], read if HAS_BIAS
    vocab_mask_ptr,  # in  [>= V] uint8, read if HAS_MASK
    part_ptr,  # out [len(FIELDS), ...] fp32: of this row and segment, fields part_step apart
    V,
    n_segments,
    part_row,  # elements from one row of `part_ptr` to the next
    part_segment,
    part_step,
    stride_r,
    stride_v,
    stride_b,
    softcap,
    inverse_softcap,
    inverse_temperature,
    order,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    IS_ALIGNED: tl.constexpr,  # rows begin at multiples of 16 bytes, and have no gaps
    WANT: tl.constexpr,
    VECTOR: tl.constexpr,
    SEGMENT: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
):
    STEP: tl.constexpr = LANES * VECTOR
    BLOCK_V: tl.constexpr = UNROLL * STEP
    row = (tl.program_id(0) // n_segments).to(tl.int64)  # row * stride_r passes 2**31
    segment = tl.program_id(0) % n_segments
    if IS_ALIGNED:
        # tells the compiler
        stride_r = stride_r // VECTOR * VECTOR
    logits_ptr += row * stride_r
    near = tl.arange(0, LANES) * VECTOR  # 16 bytes a lane
    offs_near = near[:, None] + tl.arange(0, VECTOR)[None, :]
    first = segment * SEGMENT
    whole = V // BLOCK_V * BLOCK_V
    state = law.empty(LANES)
    # no mask over whole tiles: with one, V alone could forbid wide loads
    for start in range(first, tl.minimum(first + SEGMENT, whole), BLOCK_V):
        z = load_tile(
            logits_ptr, bias_ptr, vocab_mask_ptr, start + near, V,
            stride_v, stride_b, softcap, inverse_softcap, inverse_temperature,
            HAS_BIAS, HAS_MASK, HAS_SOFTCAP, HAS_TEMPERATURE, IS_ALIGNED, VECTOR, UNROLL,
        )  # fmt: skip
        z = tl.reshape(z, [LANES, UNROLL * VECTOR])
        state = _with_tile(state, z, z == z, start, order, True, WANT, LANES, UNROLL * VECTOR)
    # only the last segment goes beyond them
    for start in range(tl.maximum(first, whole), tl.minimum(first + SEGMENT, V), STEP):
        z = load_lanes(
            logits_ptr, bias_ptr, vocab_mask_ptr, start + near, V,
            stride_v, stride_b, softcap, inverse_softcap, inverse_temperature,
            False, HAS_BIAS, HAS_MASK, HAS_SOFTCAP, HAS_TEMPERATURE, IS_ALIGNED, VECTOR,
        )  # fmt: skip
        inside = start + offs_near < V
        state = _with_tile(state, z, inside, start, order, False, WANT, LANES, VECTOR)

    # the lanes, each centred on the segment's top
    lane_top = state[0]
    top = tl.max(lane_top, axis=0)
    shift = tl.where(top == -INF, 0.0, top)
    moved = law._moved(state, shift, order, WANT)
    _, mass, spread, square, squares, powers, total, n_valid, second, tile = moved
    part_ptr += row * part_row + segment.to(tl.int64) * part_segment
    step = tl.full((), part_step, tl.int64)
    row_mass = fold_lanes(mass, LANES)
    tl.store(part_ptr, top)
    tl.store(part_ptr + step, row_mass)
    if law.SPREAD & WANT:
        row_spread = fold_lanes(spread, LANES)
        tl.store(part_ptr + 2 * step, row_spread)
        if law.SQUARE & WANT:
            # squares about each lane's mean become squares about the common one
            mean = row_spread / tl.where(row_mass == 0.0, 1.0, row_mass)
            apart = spread / tl.where(mass == 0.0, 1.0, mass) - mean
            tl.store(part_ptr + 3 * step, fold_lanes(square + mass * apart * apart, LANES))
    if law.SQUARES & WANT:
        tl.store(part_ptr + 4 * step, fold_lanes(squares, LANES))
    if law.POWERS & WANT:
        tl.store(part_ptr + 5 * step, fold_lanes(powers, LANES))
    if law.TOTAL & WANT:
        row_total = fold_lanes(total, LANES)
        row_valid = tl.sum(n_valid, axis=0)
        if row_total == -INF:
            # masked columns: they are told apart here alone, not in every tile of every row
            total = tl.zeros([LANES], tl.float32)
            n_valid = tl.zeros([LANES], tl.float32)
            for start in range(first, tl.minimum(first + SEGMENT, V), STEP):
                z = load_lanes(
                    logits_ptr, bias_ptr, vocab_mask_ptr, start + near, V,
                    stride_v, stride_b, softcap, inverse_softcap, inverse_temperature,
                    False, HAS_BIAS, HAS_MASK, HAS_SOFTCAP, HAS_TEMPERATURE, IS_ALIGNED, VECTOR,
                )  # fmt: skip
                valid = z != -INF
                total += fold(tl.where(valid, z - shift, 0.0), LANES, VECTOR)
                n_valid += tl.sum(valid.to(tl.float32), axis=1)
            row_total = fold_lanes(total, LANES)
            row_valid = tl.sum(n_valid, axis=0)
        tl.store(part_ptr + 6 * step, row_total)
        tl.store(part_ptr + 7 * step, row_valid)
    if law.SECOND & WANT:
        _, row_second = fold_top_two(lane_top, second, 1, LANES)
        tl.store(part_ptr + 8 * step, tl.max(row_second, axis=0))
    if law.COLUMN & WANT:
        # the lanes that hold the maximum look for it in the tile where they met it first
        column = tl.full([LANES, VECTOR], law.NONE, tl.int32)
        for start in range(0, BLOCK_V, STEP):
            offs_v = tile[:, None] + start + offs_near
            inside = (offs_v < V) & (lane_top == top)[:, None]
            z = load_logits(
                logits_ptr, bias_ptr, vocab_mask_ptr, offs_v, inside,
                stride_v, stride_b, softcap, inverse_softcap, inverse_temperature,
                False, HAS_BIAS, HAS_MASK, HAS_SOFTCAP, HAS_TEMPERATURE,
            )  # fmt: skip
            column = tl.minimum(column, tl.where(inside & (z == top), offs_v, law.NONE))
        lowest = tl.min(tl.min(column, axis=1), axis=0)
        tl.store(part_ptr + 9 * step, lowest.to(tl.float32, bitcast=True))


def n_segments(V: int) -> int:
    """Programs a row."""
    return -(-V // FORWARD["SEGMENT"])


def _bits(wanted: Wanted) -> dict[str, Any]:
    return {"WANT": law.wanted_bits(wanted.fields)}


def put_partials(x: Reading, part: Tensor, wanted: Wanted) -> None:
    """Write the partial of every row and segment into `part` [fields, n_segments, R]."""
    step, of_segment, of_row = part.stride()
    n = n_segments(x.V)
    _row_kernel[(x.R * n,)](
        *x.tensors, part, x.V, n, of_row, of_segment, step, *x.numbers, wanted.renyi_order,
        **x.flags, **x.vectors, **_bits(wanted), **FORWARD,
    )  # fmt: skip


def merged(part: Tensor, wanted: Wanted) -> Partial:
    """The partial of every row from those of its segments [fields, segments, R], contiguous."""
    fields, n, R = part.shape
    out = part[:, 0]
    if n > 1:
        out = part.new_empty((fields, R))
        law.merge_kernel[(triton.cdiv(R, MERGE["BLOCK_R"]),)](
            part, out, R, n, R, wanted.renyi_order, **_bits(wanted), **MERGE
        )
    found = {name: out[i] for i, name in enumerate(law.FIELDS) if name in wanted.fields}
    if "column" in found:
        found["column"] = found["column"].contiguous().view(torch.int32).long()
    return Partial(out[0], out[1], **found)


def forward(logits: Tensor, read: Read, pairs: Pairs, wanted: Wanted) -> tuple[Partial, Tensor]:
    """The partial of every row, and the logit of every pair's target.  Wants R > 0.

    Workspace: a few values a row and segment, and for the best columns what `best` says.
    """
    R = logits.shape[0]
    x = Reading(logits, read)
    part = logits.new_empty((len(law.FIELDS), n_segments(x.V), R), dtype=torch.float32)
    chosen = logits.new_full(pairs.target.shape, float("nan"), dtype=torch.float32)
    with torch.cuda.device_of(logits):  # Triton launches on the current device, not the tensor's
        put_partials(x, part, wanted)
        found = merged(part, wanted)
        put_chosen(x, pairs.row, pairs.target, 0, chosen)
        if "best" in wanted.fields:
            values, columns = best(x, wanted.k)
            found = found._replace(best=values, best_column=columns)
    return found, chosen


def ranks(logits: Tensor, read: Read, pairs: Pairs, chosen: Tensor) -> Tensor:
    """Unmasked columns ahead of each pair's target [S] int64; any number for a pair outside."""
    with torch.cuda.device_of(logits):
        return ahead(Reading(logits, read), pairs.row, pairs.target, 0, chosen)
