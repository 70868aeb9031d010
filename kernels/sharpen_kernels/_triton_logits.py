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

from ._fused_tile import _tanh
from ._logits import Read

INF = tl.constexpr(float("inf"))


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
        z = softcap * _tanh(z * inverse_softcap)
    if HAS_TEMPERATURE:
        z *= inverse_temperature
    return z


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
    bias = 0.0
    at = offs_v.to(tl.int64) * stride_v
    if IS_WHOLE:
        x = tl.load(logits_ptr + at)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + offs_v * stride_b)
    else:
        x = tl.load(logits_ptr + at, mask=inside, other=0.0)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + offs_v * stride_b, mask=inside, other=0.0)
    z = logit(
        x, bias, softcap, inverse_softcap, inverse_temperature,
        HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE,
    )  # fmt: skip
    if HAS_MASK:
        if IS_WHOLE:
            z = tl.where(tl.load(vocab_mask_ptr + offs_v) != 0, z, -INF)
        else:
            inside = inside & (tl.load(vocab_mask_ptr + offs_v, mask=inside, other=0) != 0)
    if not IS_WHOLE:
        z = tl.where(inside, z, -INF)
    return z


@triton.jit
def fold(x, ROWS: tl.constexpr, N: tl.constexpr):
    """Sums [ROWS] of `x` [ROWS, N], N a power of 2, by neighbouring pairs."""
    if N == 1:
        return tl.reshape(x, [ROWS])
    else:
        a, b = tl.split(tl.reshape(x, [ROWS, N // 2, 2]))
        return fold(a + b, ROWS, N // 2)


@triton.jit
def fold_product(x, y, ROWS: tl.constexpr, N: tl.constexpr):
    """Sums [ROWS] of `x * y`, both [ROWS, N], by neighbouring pairs."""
    if N == 1:
        return tl.reshape(x * y, [ROWS])
    else:
        a, b = tl.split(tl.reshape(x, [ROWS, N // 2, 2]))
        c, d = tl.split(tl.reshape(y, [ROWS, N // 2, 2]))
        return fold(tl.fma(b, d, a * c), ROWS, N // 2)


@triton.jit
def fold_top_two(first, second, ROWS: tl.constexpr, N: tl.constexpr):
    """The two largest [ROWS] of two falling numbers each, both [ROWS, N]."""
    if N == 1:
        return tl.reshape(first, [ROWS]), tl.reshape(second, [ROWS])
    else:
        a, b = tl.split(tl.reshape(first, [ROWS, N // 2, 2]))
        c, d = tl.split(tl.reshape(second, [ROWS, N // 2, 2]))
        top, second_top = tl.maximum(a, b), tl.maximum(tl.minimum(a, b), tl.maximum(c, d))
        return fold_top_two(top, second_top, ROWS, N // 2)


@triton.jit
def fold_lanes(x, LANES: tl.constexpr):
    """The sum of `x` [LANES], a scalar."""
    # of one element: no order
    return tl.sum(fold(tl.reshape(x, [1, LANES]), 1, LANES), axis=0)


class Reading:
    """What the launch of a kernel over logits takes, whatever the kernel."""

    def __init__(self, logits: Tensor, read: Read, bias: Tensor | None = None):
        mask = read.vocab_mask
        self.V = read.vocab_size
        self.R = logits.shape[0]
        bytes_or_any = logits if mask is None else mask.contiguous().view(torch.uint8)
        self.tensors = (logits, logits if bias is None else bias, bytes_or_any)
        # a product each, as PyTorch divides on a GPU; a tiny temperature must not make 0 * inf
        largest = torch.finfo(torch.float32).max
        softcap = read.softcap or 1.0
        inverses = (min(1 / x, largest) for x in (softcap, read.temperature))
        self.numbers = (*logits.stride(), 0 if bias is None else bias.stride(0), softcap, *inverses)
        self.flags: dict[str, Any] = {
            "HAS_BIAS": bias is not None,
            "HAS_MASK": mask is not None,
            "HAS_SOFTCAP": read.softcap is not None,
            "HAS_TEMPERATURE": read.temperature != 1.0,
        }
        # logits in 16 bytes, the widest load of a thread
        vector = 16 // logits.element_size()
        self.vectors: dict[str, Any] = {
            "IS_ALIGNED": logits.stride(0) % vector == 0,
            "VECTOR": vector,
        }
