"""Tree attention in transformers models, through its two public hooks and no change of a model.

A mask hook returns the tree of the forward that is under way instead of a mask, and the model
carries it through its layers to the attention hook. The tree is looked up where masks are built,
once a forward and outside checkpointed layers: a lookup inside a layer would find nothing when
gradient checkpointing runs it again in backward, on a thread of autograd's.

Both hooks are installed once and stay. Without a tree they call what the model used before, so
that `generate`, training steps and a recomputed layer find the implementation they began with.

T packed tokens of one row, H heads, K size of a head.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sharpen.errors import SharpenError
from sharpen_kernels.tree import Tree
from sharpen_kernels.tree_attention import tree_attention

if TYPE_CHECKING:
    import transformers

# by what they fall back to; no "sdpa" or "flash" inside: transformers looks for these in names
NAMES = {"eager": "shared_prefix_plain", "sdpa": "shared_prefix_fused"}

_tree: ContextVar[Tree | None] = ContextVar("tree", default=None)


class SharingError(SharpenError):
    """The model cannot share prompts in this way, or not in the mode that it is in."""


@dataclass(frozen=True, eq=False)
class TreeMask:
    """What takes the place of a layer's mask."""

    tree: Tree
    window: int | None  # tokens that a query sees, itself among them; None for all


@contextmanager
def attending(tree: Tree) -> Iterator[None]:
    """Forwards inside see one row of packed tokens as `tree` says."""
    token = _tree.set(tree)
    try:
        yield
    finally:
        _tree.reset(token)


def install(model: "transformers.PreTrainedModel") -> str | None:
    """Install both hooks in `model`; why not, if they cannot be."""
    from transformers import AttentionInterface, AttentionMaskInterface

    base = model.config.get_text_config()._attn_implementation
    if base in NAMES.values():
        return None
    if base not in NAMES:
        return f"attention implementation {base!r} has no tree form; load with 'sdpa' or 'eager'"
    if not hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS"):
        return "its layers do not use transformers' AttentionInterface"
    name = NAMES[base]
    AttentionInterface.register(name, _attention_hook(base))
    AttentionMaskInterface.register(name, _mask_hook(base))
    model.set_attn_implementation(name)
    taken = model.config.get_text_config()._attn_implementation
    return None if taken == name else "transformers refused the attention hook"


def uninstall(model: "transformers.PreTrainedModel") -> None:
    """Give `model` back what `install` took the place of."""
    taken = model.config.get_text_config()._attn_implementation
    for base, name in NAMES.items():
        if taken == name:
            model.set_attn_implementation(base)


def _mask_hook(base: str) -> Callable[..., Any]:
    def mask(*args: Any, **kwargs: Any) -> Any:
        tree = None if torch.compiler.is_compiling() else _tree.get()
        if tree is not None:
            if kwargs.get("use_vmap"):
                raise SharingError("its mask is a pattern of its own")
            size = (kwargs["q_length"], kwargs["kv_length"], tree.end.shape[0])
            return TreeMask(tree, window_of(kwargs["mask_function"], *size))
        from transformers import AttentionMaskInterface

        return AttentionMaskInterface()[base](*args, **kwargs)

    return mask


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


def _attention_hook(base: str) -> Callable[..., Any]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if not isinstance(attention_mask, TreeMask):
            return _base_attention(base, module)(
                module, query, key, value, attention_mask, **kwargs
            )
        T = attention_mask.tree.end.shape[0]
        if query.shape[0] != 1 or query.shape[2] != T or key.shape[2] != T:
            raise SharingError(f"queries {tuple(query.shape)}, keys {tuple(key.shape)}")
        if kwargs.get("dropout"):
            raise SharingError("attention dropout is on; put the model in eval mode")
        if kwargs.get("position_bias") is not None:
            raise SharingError("it adds a position bias")
        out_HTK = tree_attention(
            query[0],
            key[0],
            value[0],
            attention_mask.tree,
            window=attention_mask.window,
            softcap=kwargs.get("softcap"),
            sinks=kwargs.get("s_aux"),
            scale=kwargs.get("scaling"),
        )
        return out_HTK.transpose(0, 1)[None], None

    return attention


def _base_attention(base: str, module: nn.Module) -> Callable[..., Any]:
    from transformers import AttentionInterface

    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return AttentionInterface()[base]
