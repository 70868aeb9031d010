"""Attention along the paths of a token tree: the prompt once, each completion on top of it.

    z[h, q, j] = softcap(scale * q[h, q] . k[g(h), j]),    softcap(u) = c tanh(u / c)
    out[h, q]  = sum_j exp(z[h, q, j] - lse[h, q]) v[g(h), j],    j an ancestor of q or q itself
    lse[h, q]  = log(sum_j exp(z[h, q, j]) + exp(sinks[h]))

The ancestors are the columns j <= q < end[j] (`Tree`), inside a sliding window those with
position[q] - position[j] < window.  On a GPU one online-softmax kernel reads that interval
(`_tree_attention_triton`), on a CPU the tree is cut into ordinary attention calls that are merged
by log-sum-exp, forward and backward (`_tree_attention_cpu`).

H query heads, Hkv key heads, head h reads g(h) = h // (H / Hkv), T packed tokens, K head size of
queries and keys, Kv of values.  Softmax and sums are fp32 (fp64 for fp64), memory is O(T).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from . import _tree_attention_cpu as cascade
from ._launch import FLOATS, check_device, check_dtype, check_shape
from .tree import Tree, tree_mask


def tree_attention(
    q: Float[Tensor, "H T K"],
    k: Float[Tensor, "Hkv T K"],
    v: Float[Tensor, "Hkv T Kv"],
    tree: Tree,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " H"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "H T Kv"]:
    scale = q.shape[2] ** -0.5 if scale is None else scale
    rule = cascade.Rule(tree.end, tree.position, scale, softcap, window)
    return _F.apply(q, k, v, sinks, tree.table, rule)


class _F(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, table, rule):
        out, lse = cascade.forward(q, k, v, sinks, table, rule)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = sinks, table, rule
        return out

    @staticmethod
    def backward(ctx, g):
        return *cascade.backward(g, ctx.saved_tensors, *ctx.rest), None, None


def tree_attention_reference(
    q: Float[Tensor, "H T K"],
    k: Float[Tensor, "Hkv T K"],
    v: Float[Tensor, "Hkv T Kv"],
    tree: Tree,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " H"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "H T Kv"]:
    """`tree_attention` in plain PyTorch over [H, T, T]: fp64 in gives an fp64 oracle."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(wide).repeat_interleave(q.shape[0] // k.shape[0], dim=0) for x in (k, v))
    z = q.to(wide) @ k.mT * (q.shape[2] ** -0.5 if scale is None else scale)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z.masked_fill(~tree_mask(tree, window), float("-inf"))
    if sinks is not None:
        z = torch.cat([z, sinks.to(wide)[:, None, None].expand(-1, tree.T, 1)], dim=2)
    return (z.softmax(dim=2)[:, :, : tree.T] @ v).to(q.dtype)
