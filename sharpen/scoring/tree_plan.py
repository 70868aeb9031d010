"""A forward of one packed row, in which every token attends to its ancestors in a tree.

T packed tokens of one row, H heads, K size of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sharpen_kernels.tree import Tree
from sharpen_kernels.tree_attention import tree_attention

from .hooks import LayerMask, Layers, Scores, SharingError


@dataclass(frozen=True, eq=False)
class TreePlan:
    """One row of packed tokens, as `tree` says."""

    tree: Tree

    def mask(self, layers: Layers) -> LayerMask:
        """See `Plan`."""
        window = window_of(layers.allows, layers.n_query, layers.n_key, self.tree.T)
        return TreeMask(self.tree, window)


class TreeMask(LayerMask):
    """The tree, and the window of some layers.

    Not a dataclass: FSDP takes those apart on their way into a layer, and casts what is inside.
    """

    def __init__(self, tree: Tree, window: int | None):
        self.tree = tree
        # tokens that a query sees, itself among them; None for all
        self.window = window

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        """See `LayerMask`."""
        T = self.tree.T
        if q.shape[0] != 1 or q.shape[2] != T or k.shape[2] != T:
            raise SharingError(f"queries {tuple(q.shape)}, keys {tuple(k.shape)}")
        out_HTK = tree_attention(
            q[0],
            k[0],
            v[0],
            self.tree,
            window=self.window,
            softcap=scores.softcap,
            sinks=scores.sinks,
            scale=scores.scale,
        )
        return out_HTK.transpose(0, 1)[None]


def window_of(allows: Callable[..., Tensor], n_query: int, n_key: int, T: int) -> int | None:
    """The sliding window of the mask that `allows(batch, head, query, key)`, None for all tokens.

    Read off the mask's own answers, wherever the model keeps the number. Two neighbouring rows
    tell a window from chunks, whose rows differ in how many tokens they see.

    Raises:
        SharingError: If the mask is neither causal nor a causal sliding window.
    """
    if (n_query, n_key) != (T, T):
        raise SharingError(f"it attends from {n_query} to {n_key} of {T} tokens")
    zero, key_T = torch.tensor(0), torch.arange(T)
    rows = {q: allows(zero, zero, torch.tensor(q), key_T).cpu() for q in {T - 1, max(T - 2, 0)}}
    window = int(rows[T - 1].sum())
    for query, seen_T in rows.items():
        if not torch.equal(seen_T, (key_T > query - window) & (key_T <= query)):
            raise SharingError("its mask is neither causal nor a sliding window")
    return None if window == T else window
