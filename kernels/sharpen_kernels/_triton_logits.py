"""What Triton kernels over logits share: how a logit is read, and sums of one fixed order.

A sum that `tl.sum` takes has the order of the layout, which Triton picks by alignment and by what
else the kernel computes. The sums here spell theirs out: the same bits in every specialisation.
Wants launches without fp fusion, which would differ likewise; `tl.fma` asks for it by name.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._fused_tile import exp
from ._logits import Read

INF = tl.constexpr(float("inf"))


@triton.jit
def tanh(y):
    """The hyperbolic tangent, off by two units in the last place, and rising in y."""
    # 1 - 2 e / (1 + e) cancels near 0: a polynomial there, fitted to a relative error of 3e-9
    y2 = y * y
    near = tl.fma(y2, -0.005895163547, 0.020795976705)
    near = tl.fma(y2, near, -0.053783831901)
    near = tl.fma(y2, near, 0.133319241477)
    near = tl.fma(y2, near, -0.333332980030)
    near = tl.fma(y * y2, near, y)
    e = exp(-2 * tl.abs(y))
    far = 1 - 2 * e / (1 + e)
    return tl.where(tl.abs(y) < 0.6, near, tl.where(y < 0, -far, far))


@triton.jit
def logit(
    x,
    bias,
    softcap,
    inverse_softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
):
    """`x` as it enters the distribution, but for the mask."""
    z = x.to(tl.float32)
    if HAS_BIAS:
        z += bias.to(tl.float32)
    if HAS_SOFTCAP:
        z = softcap * tanh(z * inverse_softcap)
    if HAS_TEMPERATURE:
        z *= inverse_temperature
    return z


@triton.jit
def _load(ptr, offs, stride, inside, IS_WHOLE: tl.constexpr):
    if IS_WHOLE:
        return tl.load(ptr + offs.to(tl.int64) * stride)
    else:
        return tl.load(ptr + offs.to(tl.int64) * stride, mask=inside, other=0)


@triton.jit
def load_logits(
    logits_ptr,  # of the row
    bias_ptr,  # [>= V], read if HAS_BIAS
    vocab_mask_ptr,  # [>= V] uint8, read if HAS_MASK
    offs_v,
    inside,  # columns to read; the others are -inf
    stride_v,
    stride_b,
    softcap,
    inverse_softcap,
    inverse_temperature,
    IS_WHOLE: tl.constexpr,  # `inside` is true everywhere
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
):
    """Logits of a row at `offs_v`, of any shape; -inf outside and where the mask is."""
    x = _load(logits_ptr, offs_v, stride_v, inside, IS_WHOLE)
    bias = 0.0
    if HAS_BIAS:
        bias = _load(bias_ptr, offs_v, stride_b, inside, IS_WHOLE)
    z = logit(
        x, bias, softcap, inverse_softcap, inverse_temperature,
        HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE,
    )  # fmt: skip
    if HAS_MASK:
        z = tl.where(_load(vocab_mask_ptr, offs_v, 1, inside, IS_WHOLE) != 0, z, -INF)
    if not IS_WHOLE:
        z = tl.where(inside, z, -INF)
    return z


@triton.jit
def load_lanes(
    logits_ptr,
    bias_ptr,
    vocab_mask_ptr,
    offs_v,  # [LANES] of the first of VECTOR neighbouring columns
    V,
    stride_v,
    stride_b,
    softcap,
    inverse_softcap,
    inverse_temperature,
    IS_WHOLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    VECTOR: tl.constexpr,
    STEP: tl.constexpr = tl.constexpr(1),  # noqa: B008  a constant
):
    """Logits [LANES, VECTOR] of a row, -inf from V on and where the mask is; VECTOR a thread.

    Where the addresses are aligned in one load. Elsewhere in VECTOR loads, which Triton would
    give to neighbouring threads, to pass what they found on to their lane.
    """
    if IS_ALIGNED:
        offs_v = offs_v[:, None] + tl.arange(0, VECTOR)[None, :]
    if IS_ALIGNED or STEP == VECTOR:
        return load_logits(
            logits_ptr, bias_ptr, vocab_mask_ptr, offs_v, offs_v < V,
            stride_v, stride_b, softcap, inverse_softcap, inverse_temperature,
            IS_WHOLE, HAS_BIAS, HAS_MASK, HAS_SOFTCAP, HAS_TEMPERATURE,
        )  # fmt: skip
    else:
        even = load_lanes(
            logits_ptr, bias_ptr, vocab_mask_ptr, offs_v, V,
            stride_v, stride_b, softcap, inverse_softcap, inverse_temperature,
            IS_WHOLE, HAS_BIAS, HAS_MASK, HAS_SOFTCAP, HAS_TEMPERATURE, False, VECTOR, 2 * STEP,
        )  # fmt: skip
        odd = load_lanes(
            logits_ptr, bias_ptr, vocab_mask_ptr, offs_v + STEP, V,
            stride_v, stride_b, softcap, inverse_softcap, inverse_temperature,
            IS_WHOLE, HAS_BIAS, HAS_MASK, HAS_SOFTCAP, HAS_TEMPERATURE, False, VECTOR, 2 * STEP,
        )  # fmt: skip
        both = tl.join(even, odd)
        if STEP == 1:
            both = tl.reshape(both, [offs_v.shape[0], VECTOR])
        return both


@triton.jit
def load_tile(
    logits_ptr,
    bias_ptr,
    vocab_mask_ptr,
    offs_v,  # [LANES]
    V,
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
    UNROLL: tl.constexpr,
):
    """Logits [LANES, VECTOR, 2, ...] of UNROLL times LANES vectors, all of them columns.

    Loads of their own, joined: in a load of them all Triton may give a lane's to several warps.
    """
    if UNROLL == 1:
        return load_lanes(
            logits_ptr, bias_ptr, vocab_mask_ptr, offs_v, V,
            stride_v, stride_b, softcap, inverse_softcap, inverse_temperature,
            True, HAS_BIAS, HAS_MASK, HAS_SOFTCAP, HAS_TEMPERATURE, IS_ALIGNED, VECTOR,
        )  # fmt: skip
    else:
        HALF: tl.constexpr = UNROLL // 2
        left = load_tile(
            logits_ptr, bias_ptr, vocab_mask_ptr, offs_v, V,
            stride_v, stride_b, softcap, inverse_softcap, inverse_temperature,
            HAS_BIAS, HAS_MASK, HAS_SOFTCAP, HAS_TEMPERATURE, IS_ALIGNED, VECTOR, HALF,
        )  # fmt: skip
        right = load_tile(
            logits_ptr, bias_ptr, vocab_mask_ptr, offs_v + HALF * VECTOR * offs_v.shape[0], V,
            stride_v, stride_b, softcap, inverse_softcap, inverse_temperature,
            HAS_BIAS, HAS_MASK, HAS_SOFTCAP, HAS_TEMPERATURE, IS_ALIGNED, VECTOR, HALF,
        )  # fmt: skip
        return tl.join(left, right)


@triton.jit
def fold(x, ROWS: tl.constexpr, N: tl.constexpr):
    """Sums [ROWS] of `x` [ROWS, N], N a power of 2 up to 1024, by neighbouring pairs."""
    x = tl.reshape(x, [ROWS, N])
    for _ in tl.static_range(10):  # pyright: ignore[reportGeneralTypeIssues]  Triton unrolls it
        if x.shape[1] > 1:
            a, b = tl.split(tl.reshape(x, [ROWS, x.shape[1] // 2, 2]))
            x = a + b
    return tl.reshape(x, [ROWS])


@triton.jit
def fold_product(x, y, ROWS: tl.constexpr, N: tl.constexpr):
    """Sums [ROWS] of `x * y`, both [ROWS, N], as `fold` takes them; N above 1."""
    a, b = tl.split(tl.reshape(x, [ROWS, N // 2, 2]))
    c, d = tl.split(tl.reshape(y, [ROWS, N // 2, 2]))
    return fold(tl.fma(b, d, a * c), ROWS, N // 2)


@triton.jit
def fold_top_two(first, second, ROWS: tl.constexpr, N: tl.constexpr):
    """The two largest [ROWS] out of pairs of falling numbers, both [ROWS, N]."""
    first = tl.reshape(first, [ROWS, N])
    second = tl.reshape(second, [ROWS, N])
    for _ in tl.static_range(10):  # pyright: ignore[reportGeneralTypeIssues]  Triton unrolls it
        if first.shape[1] > 1:
            a, b = tl.split(tl.reshape(first, [ROWS, first.shape[1] // 2, 2]))
            c, d = tl.split(tl.reshape(second, [ROWS, second.shape[1] // 2, 2]))
            first = tl.maximum(a, b)
            second = tl.maximum(tl.minimum(a, b), tl.maximum(c, d))
    return tl.reshape(first, [ROWS]), tl.reshape(second, [ROWS])


@triton.jit
def fold_lanes(x, LANES: tl.constexpr):
    """The sum of `x` [LANES], a scalar."""
    # of one element: no order
    return tl.sum(fold(x, 1, LANES), axis=0)


class Reading:
    """What the launch of a kernel over logits takes, whatever the kernel."""

    def __init__(self, logits: Tensor, read: Read, bias: Tensor | None = None):
        mask = read.vocab_mask
        self.V = read.vocab_size
        self.R = logits.shape[0]
        bytes_or_any = logits if mask is None else mask.contiguous().view(torch.uint8)
        self.tensors: tuple[Tensor, Tensor, Tensor] = (
            logits,
            logits if bias is None else bias,
            bytes_or_any,
        )
        # a product each, as PyTorch divides on a GPU; a tiny temperature must not make 0 * inf
        largest = torch.finfo(torch.float32).max
        softcap = read.softcap or 1.0
        stride_r, stride_v = logits.stride()
        # each a number to Triton, an int or a float
        self.numbers: tuple[Any, Any, Any, Any, Any, Any] = (
            stride_r,
            stride_v,
            0 if bias is None else bias.stride(0),
            softcap,
            min(1 / softcap, largest),
            min(1 / read.temperature, largest),
        )
        self.flags: dict[str, Any] = {
            "HAS_BIAS": bias is not None,
            "HAS_MASK": mask is not None,
            "HAS_SOFTCAP": read.softcap is not None,
            "HAS_TEMPERATURE": read.temperature != 1.0,
        }
        # logits in 16 bytes, the widest load of a thread
        vector = 16 // logits.element_size()
        at_16_bytes = logits.data_ptr() % 16 == 0 and stride_r % vector == 0
        self.vectors: dict[str, Any] = {
            "IS_ALIGNED": stride_v == 1 and at_16_bytes,
            "VECTOR": vector,
        }
