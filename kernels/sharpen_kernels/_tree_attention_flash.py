"""Tree attention by flash-attn 2, where it is installed: the cascade with its kernels.

All runs are one ragged causal call; every run with descendants is one more, of all that follow it
on its keys.  Both are slices of the row.  flash-attn ignores the gradient of its log-sum-exp, so
backward enters each call again with the merged output and log-sum-exp, as on a CPU.

flash-attn aligns windows with the ends of a call, not with positions: a window that hides anything
is refused.
"""

import functools
import itertools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ._tree_attention_plan import Rule


@functools.cache
def _flash() -> ModuleType:
    try:
        from flash_attn import flash_attn_interface  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            '`implementation` "flash" wants flash-attn 2, which is not installed; '
            "`pip install flash-attn`, or use another."
        ) from error
    return flash_attn_interface


class _Call:
    """Queries from `row` on, in stretches `bounds_q`, on keys in stretches `bounds_k`."""

    def __init__(self, rows: slice, cols: slice, bounds: tuple[list[int], list[int]], causal: bool):
        self.rows, self.cols, self.causal = rows, cols, causal
        self.bounds = bounds

    def options(self, device: torch.device, rule: Rule) -> dict[str, Any]:
        """What flash-attn takes by name, forward and backward."""
        of_q, of_k = self.bounds
        to = functools.partial(torch.tensor, dtype=torch.int32, device=device)
        return {
            "cu_seqlens_q": to(of_q),
            "cu_seqlens_k": to(of_k),
            "max_seqlen_q": max(b - a for a, b in itertools.pairwise(of_q)),
            "max_seqlen_k": max(b - a for a, b in itertools.pairwise(of_k)),
            "dropout_p": 0.0,
            "softmax_scale": rule.scale,
            "causal": self.causal,
            "window_size_left": -1,
            "window_size_right": -1,
            "softcap": rule.softcap or 0.0,
            "alibi_slopes": None,
        }


def _calls(table: Tensor, rule: Rule) -> list[_Call]:
    """Own parts first, in one call; then what descends from each run."""
    runs = table.tolist()
    T = runs[-1][2]
    bounds = [0, *(stop for _, stop, _ in runs)]
    if rule.window is not None and int(rule.position.max()) >= rule.window:
        raise ValueError(
            f"`window` must hide nothing with flash-attn, got {rule.window} for a sequence of "
            f'{int(rule.position.max()) + 1} tokens; use "triton".'
        )
    calls = [_Call(slice(0, T), slice(0, T), (bounds, bounds), True)]
    for start, stop, end in runs:
        if stop < end:
            lengths = [0, end - stop], [0, stop - start]
            calls.append(_Call(slice(stop, end), slice(start, stop), lengths, False))
    return calls


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, table: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Output [H, T, Kv] in the dtype of q, log-sum-exp [H, T] in fp32; T above 0."""
    H, T, _ = q.shape
    total = q.new_empty((T, H, v.shape[2]), dtype=torch.float32)
    lse = q.new_empty((T, H), dtype=torch.float32)
    by_token = [x.transpose(0, 1) for x in (q, k, v)]
    for i, call in enumerate(_calls(table, rule)):
        over = by_token[0][call.rows], by_token[1][call.cols], by_token[2][call.cols]
        options = call.options(q.device, rule)
        part, part_lse, *_ = _flash()._flash_attn_varlen_forward(
            *over, return_softmax=False, **options
        )
        part_lse = part_lse.T  # [H, rows], as flash-attn 2 has it
        if i == 0:
            total.copy_(part)
            lse.copy_(part_lse)
        else:
            share = torch.sigmoid(part_lse - lse[call.rows])
            total[call.rows].lerp_(part.float(), share[..., None])
            lse[call.rows] = torch.logaddexp(lse[call.rows], part_lse)
    if sinks is not None:
        total *= torch.sigmoid(lse - sinks.float())[..., None]
        lse = torch.logaddexp(lse, sinks.float())
    return total.to(q.dtype).transpose(0, 1), lse.T


def backward(
    dout: Tensor, saved: tuple[Tensor, ...], sinks: Tensor | None, table: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and sinks; `saved` are q, k, v, the merged output and log-sum-exp."""
    q, k, v, out, lse = (x.transpose(0, 1) for x in saved)  # the token comes first
    dy = dout.transpose(0, 1).contiguous()
    totals = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v)]
    for call in _calls(table, rule):
        rows, cols = call.rows, call.cols
        inputs = q[rows], k[cols], v[cols]
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
        part_lse = lse[rows].T.contiguous()
        _flash()._flash_attn_varlen_backward(
            dy[rows], *inputs, out[rows], part_lse, *grads, deterministic=True,
            **call.options(q.device, rule),
        )  # fmt: skip
        for total, part, grad in zip(totals, (rows, cols, cols), grads, strict=True):
            total[part] += grad
    dsinks = None
    if sinks is not None:
        delta = (dy.float() * out).sum(-1)
        dsinks = -(torch.exp(sinks.float() - lse) * delta).sum(0).to(sinks.dtype)
    dq, dk, dv = (x.to(q.dtype).transpose(0, 1) for x in totals)
    return dq, dk, dv, dsinks
