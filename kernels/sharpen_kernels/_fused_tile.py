"""One tile of logits, on the chip: the same bits wherever it is computed.

    z = softcap(hidden W^T + b) / temperature, -inf in masked columns and past the vocabulary

The forward pass, the ranks, the best columns and the backward pass of `linear_logprob` all call
`product` and `logits` below, with one shape of tile and one order of sums, so a logit that is
compared, chosen or differentiated is the logit that entered the row's sum.

R hidden rows, V vocabulary, D hidden.  fp fusion is off in every launch: what is fused is written
`tl.fma`, so no compiler decides a bit by what else a kernel computes.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """e^x; what is below 2^-126 is 0, which saves half of the instructions of `tl.exp`."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def tanh(y):
    # 1 - 2 / (e^2y + 1) cancels near 0: there, the polynomial of Cephes' tanhf
    y2 = y * y
    series = tl.fma(y2, -5.70498872745e-3, 2.06390887954e-2)
    series = tl.fma(y2, series, -5.37397155531e-2)
    series = tl.fma(y2, series, 1.33314422036e-1)
    series = tl.fma(y2, series, -3.33332819422e-1)
    series = tl.fma(y * y2, series, y)
    far = 1.0 - 2.0 / (exp(2 * tl.abs(y)) + 1.0)
    return tl.where(tl.abs(y) < 0.625, series, tl.where(y < 0, -far, far))


@triton.jit
def divide(x, by):
    # one Newton step on x * (1 / by): the nearest quotient, without the branches of a division
    inverse = 1.0 / by
    near = x * inverse
    step = tl.fma(tl.fma(-near, by, x), inverse, near)
    # inf - inf is nan
    return tl.where(tl.abs(near) == float("inf"), near, step)


@triton.jit
def grouped(unit, n_blocks, n_columns, GROUP_R: tl.constexpr):
    """Block of rows, and of columns, of a unit of work.

    Blocks of rows run fastest inside groups of GROUP_R, so that the programs of one moment share
    a little of the weight and of the hidden rows, both in L2.
    """
    per_group = tl.maximum(GROUP_R * n_columns, 1)
    first = unit // per_group * GROUP_R
    group = tl.maximum(tl.minimum(n_blocks - first, GROUP_R), 1)
    return first + unit % per_group % group, unit % per_group // group


@triton.jit
def my_units(n_blocks, V, SEGMENT: tl.constexpr, BLOCK_V: tl.constexpr):
    """Of this program: its tiles in whole segments, all its tiles, tiles of the ragged segment.

    Whole segments come first; units of the ragged one are shorter, and last.
    """
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    whole = (n_blocks * (V // SEGMENT) - pid + programs - 1) // programs
    every = (n_blocks * tl.cdiv(V, SEGMENT) - pid + programs - 1) // programs
    rest_tiles = tl.cdiv(V % SEGMENT, BLOCK_V)
    whole_tiles = whole * (SEGMENT // BLOCK_V)
    return whole_tiles, whole_tiles + (every - whole) * rest_tiles, rest_tiles


@triton.jit
def place(
    t, n_blocks, whole_tiles, rest_tiles, V,
    SEGMENT: tl.constexpr, GROUP_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Block of rows, segment, tile in the segment, and whether it is the last, of tile `t`."""
    TILES: tl.constexpr = SEGMENT // BLOCK_V
    n_whole = V // SEGMENT
    is_whole = t < whole_tiles
    # no unit has 0 tiles, but a divisor must not
    per_unit = tl.where(is_whole, TILES, tl.maximum(rest_tiles, 1))
    since = tl.where(is_whole, t, t - whole_tiles)
    before = tl.where(is_whole, 0, whole_tiles // TILES)
    unit = tl.program_id(0) + (before + since // per_unit) * tl.num_programs(0)
    tile = since % per_unit
    block, segment = grouped(unit, n_blocks, n_whole, GROUP_R)  # pyright: ignore[reportGeneralTypeIssues]  of jit code
    block = tl.where(is_whole, block, unit - n_blocks * n_whole)
    segment = tl.where(is_whole, segment, n_whole)
    return block, segment, tile, tile == per_unit - 1


@triton.jit
def add_product(
    z,  # [BLOCK_R, BLOCK_V] fp32
    hidden,  # [R, D], a pointer, or a descriptor of [BLOCK_R, BLOCK_D] if TMA
    weight,  # [V, D], a pointer, or a descriptor of [BLOCK_V, BLOCK_D] if TMA
    row,
    column,
    k,
    R,
    V,
    D,
    stride_hr,
    stride_hd,
    stride_wv,
    stride_wd,
    TMA: tl.constexpr,
    WIDEN: tl.constexpr,  # multiply in fp32: dtypes differ, or the interpreter, blind to bf16
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`z` and block k of D of the product of a tile; what is past R, V and D is 0."""
    if TMA:
        x = hidden.load([row, k * BLOCK_D])  # [BLOCK_R, BLOCK_D]
        w = weight.load([column, k * BLOCK_D])  # [BLOCK_V, BLOCK_D]
    else:
        # offsets pass 2**31: 16k rows x 152k columns, a head of 256k x 8192
        offs_r = (tl.cast(row, tl.int64) + tl.arange(0, BLOCK_R))[:, None]
        offs_v = (tl.cast(column, tl.int64) + tl.arange(0, BLOCK_V))[:, None]
        offs_d = (tl.cast(k * BLOCK_D, tl.int64) + tl.arange(0, BLOCK_D))[None, :]
        x_ptr = hidden + offs_r * stride_hr + offs_d * stride_hd
        w_ptr = weight + offs_v * stride_wv + offs_d * stride_wd
        x = tl.load(x_ptr, mask=(offs_r < R) & (offs_d < D), other=0.0)
        w = tl.load(w_ptr, mask=(offs_v < V) & (offs_d < D), other=0.0)
    if WIDEN:
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    return tl.dot(x, w.T, z, input_precision="ieee")


@triton.jit
def product(
    hidden, weight, row, column, R, V, D, stride_hr, stride_hd, stride_wv, stride_wd,
    TMA: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The product of a whole tile, block by block of D as the forward pass adds it."""
    z = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    for k in range(tl.maximum(tl.cdiv(D, BLOCK_D), 1)):
        z = add_product(
            z, hidden, weight, row, column, k, R, V, D,
            stride_hr, stride_hd, stride_wv, stride_wd, TMA, WIDEN, BLOCK_R, BLOCK_V, BLOCK_D,
        )  # fmt: skip
    return z


@triton.jit
def logits(
    z,  # [BLOCK_R, columns] out of `add_product`
    offs_v,  # [columns]
    bias_ptr,  # [V] fp32, -inf where masked
    V,
    temperature,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
):
    """The logits of a product; what is masked turns -inf last, whatever came before."""
    kept = offs_v < V
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_v, mask=kept, other=float("-inf"))
        kept = bias != float("-inf")
        z += bias[None, :]
    if HAS_SOFTCAP:
        z = softcap * tanh(divide(z, softcap))
    if HAS_TEMPERATURE:
        z = divide(z, temperature)
    return tl.where(kept[None, :], z, float("-inf"))


@triton.jit
def _half(z, RIGHT: tl.constexpr):
    left, right = tl.split(tl.permute(tl.reshape(z, [z.shape[0], 2, z.shape[1] // 2]), [0, 2, 1]))
    if RIGHT:
        return right
    else:
        return left


@triton.jit
def piece(z, i: tl.constexpr, PIECES: tl.constexpr):
    """Run i, from the left, of the columns of a tile cut in PIECES (1, 2, 4 or 8) equal runs.

    What is derived from a tile is derived piece by piece: beside the accumulators a few of
    their size would not fit the registers.
    """
    if PIECES == 1:
        return z
    elif PIECES == 2:
        return _half(z, i)
    elif PIECES == 4:
        return _half(_half(z, i // 2), i % 2)
    else:
        return _half(_half(_half(z, i // 4), i // 2 % 2), i % 2)
