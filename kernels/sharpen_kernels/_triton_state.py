"""The state of `_state.Partial` in Triton: a tile of logits enters it, and two of them merge.

A state is a tuple of [BLOCK_R] vectors in the order of FIELDS; a field that WANT leaves out
stays as it began and costs nothing. The law is that of `_state.merge`: sums are centred on the
maximum so far, squares about each part's own mean (Chan et al. 1979).

fp fusion is off in every launch: what is fused is written `tl.fma`, so no compiler decides a bit by
what else a kernel computes.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# of the partials [len(FIELDS), segments, R]; a column is an int32, kept bit for bit in an fp32
FIELDS = (
    *("top", "mass", "sum_ez", "m2", "sum_e2"),
    *("sum_pow", "sum_z", "n_valid", "second", "column"),
)
N_FIELDS = tl.constexpr(len(FIELDS))
# bits of WANT
SUM_EZ = tl.constexpr(1)
M2 = tl.constexpr(2)  # with SUM_EZ
SUM_E2 = tl.constexpr(4)
SUM_POW = tl.constexpr(8)
SUM_Z = tl.constexpr(16)  # and n_valid
COLUMN = tl.constexpr(32)
SECOND = tl.constexpr(64)  # with COLUMN
BITS = {"sum_ez": 1, "m2": 2, "sum_e2": 4, "sum_pow": 8, "sum_z": 16, "n_valid": 16}
BITS |= {"column": 32, "second": 64}
# exp of it is 0; what it scales must be 0 as well, whatever the power of the gap
FAR = tl.constexpr(-1e3)
NONE = tl.constexpr(2**31 - 1)


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
    top, mass, sum_ez, m2, sum_e2, sum_pow, sum_z, n_valid, second, column = state
    top = tl.where(fresh, float("-inf"), top)
    mass = tl.where(fresh, 0.0, mass)
    if SUM_EZ & WANT:
        sum_ez = tl.where(fresh, 0.0, sum_ez)
    if M2 & WANT:
        m2 = tl.where(fresh, 0.0, m2)
    if SUM_E2 & WANT:
        sum_e2 = tl.where(fresh, 0.0, sum_e2)
    if SUM_POW & WANT:
        sum_pow = tl.where(fresh, 0.0, sum_pow)
    if SUM_Z & WANT:
        sum_z = tl.where(fresh, 0.0, sum_z)
        n_valid = tl.where(fresh, 0.0, n_valid)
    if COLUMN & WANT:
        column = tl.where(fresh, 0, column)
    if SECOND & WANT:
        second = tl.where(fresh, float("-inf"), second)
    return (top, mass, sum_ez, m2, sum_e2, sum_pow, sum_z, n_valid, second, column)


@triton.jit
def _mean(sum_ez, mass):
    return sum_ez / tl.where(mass == 0.0, 1.0, mass)


@triton.jit
def _chan(a_mass, a_sum_ez, a_m2, b_mass, b_sum_ez, b_m2):
    """Squares about two means, of sums with one centre, as squares about the common mean."""
    apart = _mean(b_sum_ez, b_mass) - _mean(a_sum_ez, a_mass)
    share = a_mass * _mean(b_mass, a_mass + b_mass)
    return tl.fma(share, apart * apart, a_m2 + b_m2)


@triton.jit
def moved(state, shift, order, WANT: tl.constexpr):
    """`state` with its sums centred on `shift` instead of on its own top."""
    top, mass, sum_ez, m2, sum_e2, sum_pow, sum_z, n_valid, second, column = state
    gap = tl.where(top == float("-inf"), 0.0, top - shift)
    near = tl.maximum(gap, FAR)
    scale = exp(near)
    if SUM_EZ & WANT:
        sum_ez = scale * tl.fma(mass, near, sum_ez)
    if M2 & WANT:
        m2 = scale * m2
    if SUM_E2 & WANT:
        sum_e2 = scale * scale * sum_e2
    if SUM_POW & WANT:
        sum_pow = exp(order * gap) * sum_pow
    if SUM_Z & WANT:
        sum_z = tl.fma(n_valid, gap, sum_z)
    mass = scale * mass
    return (top, mass, sum_ez, m2, sum_e2, sum_pow, sum_z, n_valid, second, column)


@triton.jit
def summed(a, b, top, WANT: tl.constexpr):
    """Sums of two states about one centre; the columns of `a` are the lower ones."""
    a_top, a_mass, a_sum_ez, a_m2, a_sum_e2, a_sum_pow, a_sum_z, a_valid, a_second, a_col = a
    b_top, b_mass, b_sum_ez, b_m2, b_sum_e2, b_sum_pow, b_sum_z, b_valid, b_second, b_col = b
    mass = a_mass + b_mass
    sum_ez, m2, sum_e2, sum_pow = a_sum_ez, a_m2, a_sum_e2, a_sum_pow
    sum_z, n_valid, second, column = a_sum_z, a_valid, a_second, a_col
    if SUM_EZ & WANT:
        sum_ez = a_sum_ez + b_sum_ez
    if M2 & WANT:
        m2 = _chan(a_mass, a_sum_ez, a_m2, b_mass, b_sum_ez, b_m2)
    if SUM_E2 & WANT:
        sum_e2 = a_sum_e2 + b_sum_e2
    if SUM_POW & WANT:
        sum_pow = a_sum_pow + b_sum_pow
    if SUM_Z & WANT:
        sum_z = a_sum_z + b_sum_z
        n_valid = a_valid + b_valid
    if COLUMN & WANT:
        column = tl.where(b_top > a_top, b_col, a_col)
    if SECOND & WANT:
        second = tl.maximum(tl.minimum(a_top, b_top), tl.maximum(a_second, b_second))
    return (top, mass, sum_ez, m2, sum_e2, sum_pow, sum_z, n_valid, second, column)


@triton.jit
def _shift(top):
    # all columns so far may be masked: shift by 0 there, or -inf - -inf is nan
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def joined(left, right, order, WANT: tl.constexpr):
    """The state of two neighbouring runs of columns, `left` the lower ones."""
    top = tl.maximum(left[0], right[0])
    shift = _shift(top)
    return summed(moved(left, shift, order, WANT), moved(right, shift, order, WANT), top, WANT)


@triton.jit
def with_tile(
    state,
    z,  # [BLOCK_R, columns] logits to the right of those in `state`
    offs_v,  # [columns] int32
    lost,  # [BLOCK_R] what rounding took from `sum_z` so far
    order,
    WANT: tl.constexpr,
):
    """`state` and the columns of `z`, and what rounding has taken from its `sum_z`.

    `sum_z` grows with the columns while the others stay near 1: its roundings are kept (Knuth's
    two-sum), or they would be the error of `self_certainty`.
    """
    tile_top = tl.max(z, axis=1)  # drops nan; the mass below does not
    top = tl.maximum(state[0], tile_top)
    shift = _shift(top)
    centred = moved(state, shift, order, WANT)
    old_top, mass, sum_ez, m2, sum_e2, sum_pow, sum_z, n_valid, second, column = centred
    if COLUMN & WANT:
        at_top = tl.where(z == tile_top[:, None], offs_v[None, :], NONE)
        tile_column = tl.min(at_top, axis=1)
        column = tl.where(tile_top > old_top, tile_column, column)
        if SECOND & WANT:
            rest = tl.where(offs_v[None, :] == tile_column[:, None], float("-inf"), z)
            second = tl.maximum(second, tl.max(rest, axis=1))
            second = tl.maximum(second, tl.minimum(old_top, tile_top))
    c = z - shift[:, None]
    if SUM_Z & WANT:
        valid = z != float("-inf")
        n_valid += tl.sum(tl.where(valid, 1.0, 0.0), axis=1)
        more = tl.sum(tl.where(valid, c, 0.0), axis=1)
        both = sum_z + more
        kept = both - sum_z
        lost += (sum_z - (both - kept)) + (more - kept)
        sum_z = both
    if SUM_POW & WANT:
        sum_pow += tl.sum(exp(order * c), axis=1)
    e = exp(c)
    added = tl.sum(e, axis=1)
    if SUM_E2 & WANT:
        sum_e2 += tl.sum(e * e, axis=1)
    if SUM_EZ & WANT:
        # a masked column adds 0; 0 * -inf would add nan
        c = tl.maximum(c, FAR)
        moment = tl.sum(e * c, axis=1)
        if M2 & WANT:
            apart = c - _mean(moment, added)[:, None]
            about = tl.sum(e * apart * apart, axis=1)
            m2 = _chan(mass, sum_ez, m2, added, moment, about)
        sum_ez += moment
    mass += added
    return (top, mass, sum_ez, m2, sum_e2, sum_pow, sum_z, n_valid, second, column), lost


@triton.jit
def with_lost(state, lost, WANT: tl.constexpr):
    """`state` with the roundings of its `sum_z` put back."""
    top, mass, sum_ez, m2, sum_e2, sum_pow, sum_z, n_valid, second, column = state
    if SUM_Z & WANT:
        sum_z += lost
    return (top, mass, sum_ez, m2, sum_e2, sum_pow, sum_z, n_valid, second, column)


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
        sum_ez = tl.load(at + 2 * step, mask=mask_r, other=0.0)
        m2 = tl.load(at + 3 * step, mask=mask_r, other=0.0)
        sum_e2 = tl.load(at + 4 * step, mask=mask_r, other=0.0)
        sum_pow = tl.load(at + 5 * step, mask=mask_r, other=0.0)
        sum_z = tl.load(at + 6 * step, mask=mask_r, other=0.0)
        n_valid = tl.load(at + 7 * step, mask=mask_r, other=0.0)
        second = tl.load(at + 8 * step, mask=mask_r, other=0.0)
        column = tl.load(at + 9 * step, mask=mask_r, other=0.0).to(tl.int32, bitcast=True)
        right = (top, mass, sum_ez, m2, sum_e2, sum_pow, sum_z, n_valid, second, column)
        state = joined(state, right, order, WANT)
    store(out_ptr + offs_r, tl.cast(out_step, tl.int64), state, mask_r)
