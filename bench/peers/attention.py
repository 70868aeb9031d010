"""Attention on a tree by its mask, and flash kernels on a causal sequence.

A call "tree" takes the tree and gives the attention on it, "causal" is the attention itself: of
queries, keys and values [heads, T, K].
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention import flex_attention as flex
from torch.nn.functional import pad, scaled_dot_product_attention

from bench.peers.finding import Call, Peer
from bench.peers.tree_attention import compiled_flex, flash_tree_attention
from sharpen_kernels.tree import Tree
from sharpen_kernels.tree_attention import tree_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
TILE = 128  # FlexAttention wants whole ones when it is compiled


def _on(attend: Callable[..., Tensor]) -> Callable[[Tree], Attend]:
    return lambda tree: lambda q, k, v: attend(q, k, v, tree)


def _flex(tree: Tree) -> Attend:
    """One compilation for all lengths; the block mask is made before, as for many layers."""
    is_cuda = tree.end.is_cuda
    extra = -tree.T % TILE if is_cuda else 0
    tail = torch.arange(tree.T, tree.T + extra, device=tree.end.device)
    end = torch.cat([tree.end, tail + 1])

    def sees(_batch, _head, row, col):
        return (col <= row) & (row < end[col])

    mask = flex.create_block_mask(sees, None, None, len(end), len(end), device=str(end.device))
    call: Any = compiled_flex() if is_cuda else flex.flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide = (pad(x, (0, 0, 0, extra))[None] if extra else x[None] for x in (q, k, v))
        return call(*wide, block_mask=mask, enable_gqa=True)[0, :, : tree.T]

    return attend


def _sdpa(backend: SDPBackend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            one = q[None], k[None], v[None]
            return scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)[0]

    return attend


def _flash(module: str) -> dict[str, Call]:
    call = importlib.import_module(module).flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = call(*(x.transpose(0, 1)[None] for x in (q, k, v)), causal=True)
        return (found[0] if isinstance(found, tuple) else found)[0].transpose(0, 1)

    return {"causal": attend}


def _cascade() -> dict[str, Call]:
    importlib.import_module("flash_attn.flash_attn_interface")
    return {"tree": _on(flash_tree_attention)}


PEERS = (
    Peer("ours", lambda: {"tree": _on(tree_attention)}),
    Peer("FlexAttention", lambda: {"tree": _flex}),
    Peer("ours, by flash-attn", _cascade, ("cuda",)),
    Peer("causal, flash-attn 3", lambda: _flash("flash_attn_interface"), ("cuda",)),
    Peer("causal, flash-attn 2", lambda: _flash("flash_attn"), ("cuda",)),
    Peer("causal, SDPA flash", lambda: {"causal": _sdpa(SDPBackend.FLASH_ATTENTION)}),
    Peer("causal, SDPA cuDNN", lambda: {"causal": _sdpa(SDPBackend.CUDNN_ATTENTION)}, ("cuda",)),
)
