"""Tree attention through PyTorch's FlexAttention: the interval as a mask function, tiles its own.

Compiled on a GPU, where it has gradients; eager on a CPU, forward only, all [T, T] logits at once.
A sink scales the output by sigmoid(lse - sink), which differentiates through `lse`.

FlexAttention wants tokens in multiples of 128 when compiled: the row is padded with tokens that
see nothing but themselves.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.functional import pad

from ._tree_attention_plan import Rule

TILE = 128  # what T is padded to on a GPU


@functools.cache
def _compiled():
    """One compilation for rows of any length: one a length would take seconds each."""
    return torch.compile(flex.flex_attention, dynamic=True)


def flex_tree_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, rule: Rule
) -> Tensor:
    """`tree_attention` on checked inputs; differentiable in all of them on a GPU."""
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
    attend: Any = _compiled() if q.is_cuda else flex.flex_attention
    out, aux = attend(
        q, k, v,
        score_mod=None if rule.softcap is None else capped,
        block_mask=mask, scale=rule.scale, enable_gqa=True, return_aux=flex.AuxRequest(lse=True),
    )  # fmt: skip
    if sinks is not None:
        keep = torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype)[None, :, None])
        out = out * keep[..., None].to(out.dtype)
    return out[0, :, :T]
