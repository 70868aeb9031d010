"""The k best columns of rows of logits in Triton, exactly as `_rows.largest` finds them.

The k best of a row lie in the k runs of columns that lead, a run being ranked by its best column
(larger logit first, of a tie the one further left): each run beyond has k columns ahead of its
best. So one read of the row leaves its runs' maxima, and the k leading runs are read again.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import largest
from ._triton_logits import Reading, load_logits

# chosen: a run is 64 bytes of bf16
RUN = 32
MAXIMA: dict[str, Any] = {"BLOCK_V": 4096, "num_warps": 4, "enable_fp_fusion": False}
CANDIDATES: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
# of the maxima of some rows, and as much three times over for their order
BLOCK_ELEMENTS = 2**22


@triton.jit
def _maxima_kernel(
    logits_ptr,  # in  [R, >= V]
    bias_ptr,
    vocab_mask_ptr,
    maxima_ptr,  # out [some rows, n_runs] fp32
    first_row,
    V,
    n_runs,
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
    RUN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    N: tl.constexpr = BLOCK_V // RUN
    row = (tl.program_id(0) // tl.cdiv(V, BLOCK_V)).to(tl.int64)
    tile = tl.program_id(0) % tl.cdiv(V, BLOCK_V)
    if IS_ALIGNED:
        # tells the compiler
        stride_r = stride_r // VECTOR * VECTOR
    offs_n = tile * N + tl.arange(0, N)
    offs_v = offs_n[:, None] * RUN + tl.arange(0, RUN)[None, :]
    logits_ptr += (first_row + row) * stride_r
    if (tile + 1) * BLOCK_V <= V:
        z = load_logits(
            logits_ptr, bias_ptr, vocab_mask_ptr, offs_v, offs_v < V,
            stride_v, stride_b, softcap, inverse_softcap, inverse_temperature,
            True, HAS_BIAS, HAS_MASK, HAS_SOFTCAP, HAS_TEMPERATURE,
        )  # fmt: skip
    else:
        z = load_logits(
            logits_ptr, bias_ptr, vocab_mask_ptr, offs_v, offs_v < V,
            stride_v, stride_b, softcap, inverse_softcap, inverse_temperature,
            False, HAS_BIAS, HAS_MASK, HAS_SOFTCAP, HAS_TEMPERATURE,
        )  # fmt: skip
    tl.store(maxima_ptr + row * n_runs + offs_n, tl.max(z, axis=1), mask=offs_n < n_runs)


@triton.jit
def _candidates_kernel(
    logits_ptr,  # in  [R, >= V]
    bias_ptr,
    vocab_mask_ptr,
    run_ptr,  # in  [some rows, n_best] int64
    z_ptr,  # out [some rows, n_best, RUN] fp32
    first_row,
    V,
    n_best,
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
    RUN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    run = tl.load(run_ptr + row * n_best + offs_k, mask=offs_k < n_best, other=0)
    offs_v = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    z = load_logits(
        logits_ptr + (first_row + row) * stride_r, bias_ptr, vocab_mask_ptr,
        offs_v, (offs_v < V) & (offs_k < n_best)[:, None],
        stride_v, stride_b, softcap, inverse_softcap, inverse_temperature,
        False, HAS_BIAS, HAS_MASK, HAS_SOFTCAP, HAS_TEMPERATURE,
    )  # fmt: skip
    at = (row * n_best + offs_k)[:, None] * RUN + tl.arange(0, RUN)[None, :]
    tl.store(z_ptr + at, z, mask=(offs_k < n_best)[:, None])


def best(x: Reading, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row [R, k], falling, and their columns, lowest first of a tie.

    Where V < k the rest is -inf, of any column. Workspace: some 64 MiB at most.
    """
    logits: Tensor = x.tensors[0]
    run_width: dict[str, Any] = {"RUN": RUN}
    n_runs = -(-x.V // RUN)
    n_best = min(k, n_runs)
    step = max(1, BLOCK_ELEMENTS // max(n_runs, n_best * RUN))
    values = logits.new_empty((x.R, k), dtype=torch.float32)
    columns = torch.empty((x.R, k), dtype=torch.int64, device=logits.device)
    offset = torch.arange(RUN, device=logits.device)
    for first in range(0, x.R, step):
        n = min(step, x.R - first)
        maxima = logits.new_empty((n, n_runs), dtype=torch.float32)
        _maxima_kernel[(n * triton.cdiv(x.V, MAXIMA["BLOCK_V"]),)](
            *x.tensors, maxima, first, x.V, n_runs,
            *x.numbers, **x.flags, **x.vectors, **run_width, **MAXIMA,
        )  # fmt: skip
        # in the order of their columns, so that of a tie the first is the lowest
        run = largest(maxima, n_best)[1].sort(dim=1).values
        z = logits.new_empty((n, n_best * RUN), dtype=torch.float32)
        _candidates_kernel[(n,)](
            *x.tensors, run, z, first, x.V, n_best, *x.numbers, **x.flags,
            **run_width, BLOCK_K=triton.next_power_of_2(n_best), **CANDIDATES,
        )  # fmt: skip
        rows = slice(first, first + n)
        values[rows], at = largest(z, k)
        column = (run[:, :, None] * RUN + offset).view(n, -1)
        columns[rows] = column.gather(1, at)
    return values, columns
