"""The state of `_rows.Partial` in Triton: a tile enters it, and two of them merge.

A state is a tuple of [BLOCK_R] vectors in the order of FIELDS; a field that WANT leaves out
stays as it began and costs nothing. The law is that of `_rows.merge`: sums are centred on the
maximum so far, squares about each part's own mean (Chan et al. 1979).
"""

import triton
import triton.language as tl

from ._fused_tile import exp

# of the partials [len(FIELDS), segments, R]; a column is an int32, kept bit for bit in an fp32
FIELDS = (
    "top", "mass", "spread", "square", "squares", "powers", "total", "n_valid", "second", "column",
)  # fmt: skip
N_FIELDS = tl.constexpr(len(FIELDS))
# bits of WANT
SPREAD = tl.constexpr(1)
SQUARE = tl.constexpr(2)  # with SPREAD
SQUARES = tl.constexpr(4)
POWERS = tl.constexpr(8)
TOTAL = tl.constexpr(16)  # and n_valid
COLUMN = tl.constexpr(32)
SECOND = tl.constexpr(64)  # with COLUMN
BITS = {
    "spread": 1, "square": 2, "squares": 4, "powers": 8, "total": 16, "n_valid": 16,
    "column": 32, "second": 64,
}  # fmt: skip
# exp of it is 0; what it scales must be 0 as well, whatever the power of the gap
FAR = tl.constexpr(-1e3)
NONE = tl.constexpr(2**31 - 1)


def wanted_bits(fields: frozenset[str]) -> int:
    """WANT for the fields of a `Partial` that a call needs."""
    bits = 0
    for name in fields & BITS.keys():
        bits |= BITS[name]
    return bits


@triton.jit
def empty(BLOCK_R: tl.constexpr):
    """The state of no columns."""
    zero = tl.zeros([BLOCK_R], tl.float32)
    low = tl.full([BLOCK_R], float("-inf"), tl.float32)
    column = tl.zeros([BLOCK_R], tl.int32)
    return (low, zero, zero, zero, zero, zero, zero, zero, low, column)


@triton.jit
def restart(state, fresh, WANT: tl.constexpr):
    """`state`, or that of no columns where `fresh`."""
    top, mass, spread, square, squares, powers, total, n_valid, second, column = state
    top = tl.where(fresh, float("-inf"), top)
    mass = tl.where(fresh, 0.0, mass)
    if SPREAD & WANT:
        spread = tl.where(fresh, 0.0, spread)
    if SQUARE & WANT:
        square = tl.where(fresh, 0.0, square)
    if SQUARES & WANT:
        squares = tl.where(fresh, 0.0, squares)
    if POWERS & WANT:
        powers = tl.where(fresh, 0.0, powers)
    if TOTAL & WANT:
        total = tl.where(fresh, 0.0, total)
        n_valid = tl.where(fresh, 0.0, n_valid)
    if COLUMN & WANT:
        column = tl.where(fresh, 0, column)
    if SECOND & WANT:
        second = tl.where(fresh, float("-inf"), second)
    return (top, mass, spread, square, squares, powers, total, n_valid, second, column)


@triton.jit
def _mean(spread, mass):
    return spread / tl.where(mass == 0.0, 1.0, mass)


@triton.jit
def _chan(a_mass, a_spread, a_square, b_mass, b_spread, b_square):
    """Squares about two means, of sums with one centre, as squares about the common mean."""
    apart = _mean(b_spread, b_mass) - _mean(a_spread, a_mass)
    share = a_mass * _mean(b_mass, a_mass + b_mass)
    return tl.fma(share, apart * apart, a_square + b_square)


@triton.jit
def _moved(state, shift, order, WANT: tl.constexpr):
    """`state` with its sums centred on `shift` instead of on its own top."""
    top, mass, spread, square, squares, powers, total, n_valid, second, column = state
    gap = tl.where(top == float("-inf"), 0.0, top - shift)
    near = tl.maximum(gap, FAR)
    scale = exp(near)
    if SPREAD & WANT:
        spread = scale * tl.fma(mass, near, spread)
    if SQUARE & WANT:
        square = scale * square
    if SQUARES & WANT:
        squares = scale * scale * squares
    if POWERS & WANT:
        powers = exp(order * gap) * powers
    if TOTAL & WANT:
        total = tl.fma(n_valid, gap, total)
    mass = scale * mass
    return (top, mass, spread, square, squares, powers, total, n_valid, second, column)


@triton.jit
def _joined(a, b, top, WANT: tl.constexpr):
    """Sums of two states about one centre; the columns of `a` are the lower ones."""
    a_top, a_mass, a_spread, a_square, a_squares, a_powers, a_total, a_valid, a_second, a_col = a
    b_top, b_mass, b_spread, b_square, b_squares, b_powers, b_total, b_valid, b_second, b_col = b
    mass = a_mass + b_mass
    spread, square, squares, powers = a_spread, a_square, a_squares, a_powers
    total, n_valid, second, column = a_total, a_valid, a_second, a_col
    if SPREAD & WANT:
        spread = a_spread + b_spread
    if SQUARE & WANT:
        square = _chan(a_mass, a_spread, a_square, b_mass, b_spread, b_square)
    if SQUARES & WANT:
        squares = a_squares + b_squares
    if POWERS & WANT:
        powers = a_powers + b_powers
    if TOTAL & WANT:
        total = a_total + b_total
        n_valid = a_valid + b_valid
    if COLUMN & WANT:
        column = tl.where(b_top > a_top, b_col, a_col)
    if SECOND & WANT:
        second = tl.maximum(tl.minimum(a_top, b_top), tl.maximum(a_second, b_second))
    return (top, mass, spread, square, squares, powers, total, n_valid, second, column)


@triton.jit
def _shift(top):
    # all columns so far may be masked: shift by 0 there, or -inf - -inf is nan
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def joined(left, right, order, WANT: tl.constexpr):
    """The state of two neighbouring runs of columns, `left` the lower ones."""
    top = tl.maximum(left[0], right[0])
    shift = _shift(top)
    return _joined(_moved(left, shift, order, WANT), _moved(right, shift, order, WANT), top, WANT)


@triton.jit
def with_tile(
    state,
    z,  # [BLOCK_R, columns] logits to the right of those in `state`
    offs_v,  # [columns] int32
    lost,  # [BLOCK_R] what rounding took from `total` so far
    order,
    WANT: tl.constexpr,
):
    """`state` and the columns of `z`, and what rounding has taken from its `total`.

    `total` grows with the columns while the others stay near 1: its roundings are kept (Knuth's
    two-sum), or they would be the error of `self_certainty`.
    """
    tile_top = tl.max(z, axis=1)  # drops nan; the mass below does not
    top = tl.maximum(state[0], tile_top)
    shift = _shift(top)
    moved = _moved(state, shift, order, WANT)
    old_top, mass, spread, square, squares, powers, total, n_valid, second, column = moved
    if COLUMN & WANT:
        at_top = tl.where(z == tile_top[:, None], offs_v[None, :], NONE)
        tile_column = tl.min(at_top, axis=1)
        column = tl.where(tile_top > old_top, tile_column, column)
        if SECOND & WANT:
            rest = tl.where(offs_v[None, :] == tile_column[:, None], float("-inf"), z)
            second = tl.maximum(second, tl.max(rest, axis=1))
            second = tl.maximum(second, tl.minimum(old_top, tile_top))
    c = z - shift[:, None]
    if TOTAL & WANT:
        valid = z != float("-inf")
        n_valid += tl.sum(tl.where(valid, 1.0, 0.0), axis=1)
        more = tl.sum(tl.where(valid, c, 0.0), axis=1)
        both = total + more
        kept = both - total
        lost += (total - (both - kept)) + (more - kept)
        total = both
    if POWERS & WANT:
        powers += tl.sum(exp(order * c), axis=1)
    e = exp(c)
    added = tl.sum(e, axis=1)
    if SQUARES & WANT:
        squares += tl.sum(e * e, axis=1)
    if SPREAD & WANT:
        # a masked column adds 0; 0 * -inf would add nan
        c = tl.maximum(c, FAR)
        moment = tl.sum(e * c, axis=1)
        if SQUARE & WANT:
            apart = c - _mean(moment, added)[:, None]
            about = tl.sum(e * apart * apart, axis=1)
            square = _chan(mass, spread, square, added, moment, about)
        spread += moment
    mass += added
    return (top, mass, spread, square, squares, powers, total, n_valid, second, column), lost


@triton.jit
def with_lost(state, lost, WANT: tl.constexpr):
    """`state` with the roundings of its `total` put back."""
    top, mass, spread, square, squares, powers, total, n_valid, second, column = state
    if TOTAL & WANT:
        total += lost
    return (top, mass, spread, square, squares, powers, total, n_valid, second, column)


@triton.jit
def store(part_ptr, step, state, mask):
    """Write each field of a state, `step` elements apart."""
    for i in tl.static_range(N_FIELDS - 1):  # pyright: ignore[reportGeneralTypeIssues]  of jit code
        tl.store(part_ptr + i * step, state[i], mask=mask)
    column = state[N_FIELDS - 1].to(tl.float32, bitcast=True)
    tl.store(part_ptr + (N_FIELDS - 1) * step, column, mask=mask)


@triton.jit
def merge_kernel(
    part_ptr,  # in  [len(FIELDS), n_segments, R] fp32
    out_ptr,  # out [len(FIELDS), ...] fp32: the first of R rows, fields out_step apart
    R,
    n_segments,
    out_step,
    order,
    WANT: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Merge the segments of each row, from the first column to the last."""
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    step = tl.cast(R, tl.int64) * n_segments
    state = empty(BLOCK_R)
    for segment in range(n_segments):
        at = part_ptr + tl.cast(segment, tl.int64) * R + offs_r
        top = tl.load(at, mask=mask_r, other=float("-inf"))
        mass = tl.load(at + step, mask=mask_r, other=0.0)
        spread = tl.load(at + 2 * step, mask=mask_r, other=0.0)
        square = tl.load(at + 3 * step, mask=mask_r, other=0.0)
        squares = tl.load(at + 4 * step, mask=mask_r, other=0.0)
        powers = tl.load(at + 5 * step, mask=mask_r, other=0.0)
        total = tl.load(at + 6 * step, mask=mask_r, other=0.0)
        n_valid = tl.load(at + 7 * step, mask=mask_r, other=0.0)
        second = tl.load(at + 8 * step, mask=mask_r, other=0.0)
        column = tl.load(at + 9 * step, mask=mask_r, other=0.0).to(tl.int32, bitcast=True)
        right = (top, mass, spread, square, squares, powers, total, n_valid, second, column)
        state = joined(state, right, order, WANT)
    store(out_ptr + offs_r, tl.cast(out_step, tl.int64), state, mask_r)
