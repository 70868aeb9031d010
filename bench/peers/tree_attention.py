"""Tree attention by FlexAttention and by flash-attn 2: what ours is compared with, value by value.

FlexAttention takes the interval as a mask function and chooses tiles of its own: compiled on a GPU,
where it has gradients; eager on a CPU, forward only, all [T, T] logits at once. It wants tokens in
multiples of 128 when compiled: the row is padded with tokens that see nothing but themselves.

Around flash-attn is a cascade. All runs are one ragged causal call; every run with descendants is
one more, of all that follow it on its keys. Both are slices of the row. flash-attn ignores the
gradient of its log-sum-exp, so backward enters each call again with the merged output and
log-sum-exp, as ours does on a CPU. It aligns windows with the ends of a call, not with positions: a
window that hides anything is refused.
"""

import functools
import importlib
import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.functional import pad

from sharpen_kernels.tree import Rule, Tree

TILE = 128  # what T is padded to on a GPU


def rule_of(
    q: Tensor, tree: Tree, scale: float | None, softcap: float | None, window: int | None
) -> Rule:
    """The options of `sharpen_kernels.tree_attention` as its routes take them."""
    of_products = q.shape[2] ** -0.5 if scale is None else scale
    return Rule(tree.end, tree.position, of_products, softcap, window)


@functools.cache
def compiled_flex():
    """One compilation for rows of any length: one a length would take seconds each."""
    return torch.compile(flex.flex_attention, dynamic=True)


def flex_tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: Tree,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`tree_attention` by FlexAttention; differentiable in all of its tensors on a GPU."""
    rule = rule_of(q, tree, scale, softcap, window)
    T = q.shape[1]
    if T == 0:
        return (q.sum() + k.sum() + v.sum()) * q.new_zeros(q.shape[0], 0, v.shape[2])
    extra = -T % TILE if q.is_cuda else 0
    place = torch.arange(T, T + extra, device=q.device)
    end = torch.cat([rule.end, place + 1])
    position = pad(rule.position, (0, extra))
    q, k, v = (pad(x, (0, 0, 0, extra))[None] for x in (q, k, v))

    def sees(_batch, _head, row, col):
        seen = (col <= row) & (row < end[col])
        if rule.window is None:
            return seen
        return seen & (position[row] - position[col] < rule.window)

    def capped(logit, _batch, _head, _row, _col):
        assert rule.softcap is not None
        return rule.softcap * torch.tanh(logit / rule.softcap)

    size = end.shape[0]
    mask = flex.create_block_mask(sees, None, None, size, size, device=q.device.type)
    attend: Any = compiled_flex() if q.is_cuda else flex.flex_attention
    out, aux = attend(
        q,
        k,
        v,
        score_mod=None if rule.softcap is None else capped,
        block_mask=mask,
        scale=rule.scale,
        enable_gqa=True,
        return_aux=flex.AuxRequest(lse=True),
    )
    if sinks is not None:
        keep = torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype)[None, :, None])
        out = out * keep[..., None].to(out.dtype)
    return out[0, :, :T]


def flash_tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: Tree,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`tree_attention` by calls of flash-attn 2; differentiable in all of its tensors."""
    return _Flash.apply(q, k, v, sinks, tree.table, rule_of(q, tree, scale, softcap, window))


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, table, rule):
        out, lse = _forward(q, k, v, sinks, table, rule)
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.asked = table, rule
        return out

    @staticmethod
    def backward(ctx, *grads):
        *saved, sinks = ctx.saved_tensors
        return *_backward(grads[0], tuple(saved), sinks, *ctx.asked), None, None


def _forward(
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


def _backward(
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
        options = call.options(q.device, rule)
        tensors = dy[rows], *inputs, out[rows], part_lse, *grads
        _flash()._flash_attn_varlen_backward(*tensors, deterministic=True, **options)
        for total, part, grad in zip(totals, (rows, cols, cols), grads, strict=True):
            total[part] += grad
    dsinks = None
    if sinks is not None:
        delta = (dy.float() * out).sum(-1)
        dsinks = -(torch.exp(sinks.float() - lse) * delta).sum(0).to(sinks.dtype)
    dq, dk, dv = (x.to(q.dtype).transpose(0, 1) for x in totals)
    return dq, dk, dv, dsinks


def _calls(table: Tensor, rule: Rule) -> "list[_Call]":
    """Own parts first, in one call; then what descends from each run."""
    runs = table.tolist()
    T = runs[-1][2]
    bounds = [0, *(stop for _, stop, _ in runs)]
    if rule.window is not None and int(rule.position.max()) >= rule.window:
        raise ValueError(
            f"`window` must hide nothing with flash-attn, got {rule.window} for a sequence of "
            f"{int(rule.position.max()) + 1} tokens."
        )
    calls = [_Call(slice(0, T), slice(0, T), (bounds, bounds), True)]
    for start, stop, end in runs:
        if stop < end:
            lengths = [0, end - stop], [0, stop - start]
            calls.append(_Call(slice(stop, end), slice(start, stop), lengths, False))
    return calls


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


def _flash() -> Any:
    return importlib.import_module("flash_attn.flash_attn_interface")
