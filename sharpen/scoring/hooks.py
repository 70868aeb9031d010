"""Attention of our own in transformers models, through two public hooks and no change of a model.

While a plan is under way a mask hook returns what the plan makes of each mask, a `LayerMask`, and
the model carries it through its layers to the attention hook, which calls it. The plan is looked
up where masks are built, once a forward and outside checkpointed layers: a lookup inside a layer
would find nothing when gradient checkpointing runs it again in backward, on a thread of autograd's.

Both hooks are installed once and stay. Without a plan they call what the model used before, so
that `generate`, training steps and a recomputed layer find the implementation they began with.
What of the model is compiled stays so, and is left out while a plan is under way: its graphs were
traced, or would be looked up, without one.

B rows, H heads, L queries, K size of a head, T packed tokens of one row.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sharpen.errors import SharpenError
from sharpen_kernels.tree import Tree
from sharpen_kernels.tree_attention import tree_attention

if TYPE_CHECKING:
    import transformers


class HookName(str):
    """The name of a hook, which a copy of the model, or its pickle, has as what it falls back to.

    Another process may never have registered the hook.
    """

    base: str

    def __new__(cls, name: str, base: str) -> "HookName":
        """A name that is copied as `base`."""
        made = super().__new__(cls, name)
        made.base = base
        return made

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (self.base,)


# by what they fall back to; no "sdpa" or "flash" inside: transformers looks for these in names
NAMES = {
    base: HookName(name, base)
    for base, name in (("eager", "shared_prefix_plain"), ("sdpa", "shared_prefix_fused"))
}


class SharingError(SharpenError):
    """The model cannot share prompts in this way, or not in the mode that it is in."""


@dataclass(frozen=True)
class AttentionOptions:
    """How a layer turns products of queries and keys into logits of attention.

    Attributes:
        scale: Of the products; None for K ** -0.5.
        softcap: The cap c of c tanh(z / c); None for no cap.
        sinks: One more logit a head, which takes mass and has no value; None for none.
    """

    scale: float | None
    softcap: float | None
    sinks: Tensor | None


class LayerMask(ABC):
    """What takes the place of a layer's mask: the attention itself."""

    @abstractmethod
    def attend(
        self,
        module: nn.Module,
        q: Float[Tensor, "B H L K"],
        k: Tensor,
        v: Tensor,
        options: AttentionOptions,
    ) -> Float[Tensor, "B L H Kv"]:
        """The layer's output, a token's heads side by side.

        Raises:
            SharingError: If the layer hands over something else than was planned for.
        """


class Watched(NamedTuple):
    """The mask that a model has anyway, and who sees the keys and values of each layer."""

    mask: Any
    watch: Callable[[nn.Module, Tensor, Tensor], None]


class Layers(NamedTuple):
    """What is known where masks are built, of the layers that share one.

    Attributes:
        allows: Whether (batch, head, query, key) attends.
        n_query: Tokens of this forward.
        n_key: Tokens that they may attend to.
        own_mask: Builds the mask that the model has without a plan.
    """

    allows: Callable[..., Tensor]
    n_query: int
    n_key: int
    own_mask: Callable[[], Any]


@runtime_checkable
class ForwardPlan(Protocol):
    """What is computed in a forward, beside the token ids."""

    def mask(self, layers: Layers) -> LayerMask | Watched:
        """What these layers are handed as their mask.

        Raises:
            SharingError: If the plan cannot keep to this mask.
        """
        ...


_plan: ContextVar[ForwardPlan | None] = ContextVar("plan", default=None)


@contextmanager
def under(plan: ForwardPlan) -> Iterator[None]:
    """Forwards inside go by `plan`, and none of them through `torch.compile`."""
    token = _plan.set(plan)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _plan.reset(token)


def is_installed(model: "transformers.PreTrainedModel") -> bool:
    """Whether both hooks are in `model`."""
    return model.config.get_text_config()._attn_implementation in NAMES.values()


def install(model: "transformers.PreTrainedModel") -> str | None:
    """Install both hooks in `model`; why not, if they cannot be."""
    from transformers import AttentionInterface, AttentionMaskInterface

    if is_installed(model):
        return None
    base = model.config.get_text_config()._attn_implementation
    if base not in NAMES:
        return f"attention implementation {base!r} has no tree form; load with 'sdpa' or 'eager'"
    # of its parts: the model itself may be wrapped, by PEFT or torch.compile
    files = {sys.modules[type(part).__module__] for part in model.modules()}
    if not any(hasattr(file, "ALL_ATTENTION_FUNCTIONS") for file in files):
        return "its layers do not use transformers' AttentionInterface"
    name = NAMES[base]
    AttentionInterface.register(name, _attention_hook(base))
    AttentionMaskInterface.register(name, _mask_hook(base))
    model.set_attn_implementation(name)
    return None if is_installed(model) else "transformers refused the attention hook"


def uninstall(model: "transformers.PreTrainedModel") -> None:
    """Give `model` back what `install` took the place of."""
    taken = model.config.get_text_config()._attn_implementation
    for base, name in NAMES.items():
        if taken == name:
            model.set_attn_implementation(base)


def _mask_hook(base: str) -> Callable[..., Any]:
    def own(*args: Any, **kwargs: Any) -> Any:
        from transformers import AttentionMaskInterface

        return AttentionMaskInterface()[base](*args, **kwargs)

    def mask(*args: Any, **kwargs: Any) -> Any:
        plan = None if torch.compiler.is_compiling() else _plan.get()
        if plan is not None:
            if kwargs.get("use_vmap"):
                raise SharingError("its mask is a pattern of its own")
            sizes = kwargs["q_length"], kwargs["kv_length"]
            return plan.mask(Layers(kwargs["mask_function"], *sizes, lambda: own(*args, **kwargs)))
        return own(*args, **kwargs)

    return mask


def _attention_hook(base: str) -> Callable[..., Any]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(attention_mask, (Watched, LayerMask)):
            query, key, value = _as_autocast(query, key, value)
        if isinstance(attention_mask, Watched):
            attention_mask.watch(module, key, value)
            attention_mask = attention_mask.mask
        if not isinstance(attention_mask, LayerMask):
            return _base_attention(base, module)(
                module, query, key, value, attention_mask, **kwargs
            )
        if kwargs.get("dropout"):
            raise SharingError("attention dropout is on; put the model in eval mode")
        if kwargs.get("position_bias") is not None:
            raise SharingError("it adds a position bias")
        options = AttentionOptions(
            kwargs.get("scaling"), kwargs.get("softcap"), kwargs.get("s_aux")
        )
        return attention_mask.attend(module, query, key, value, options), None

    return attention


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the dtype that PyTorch's own attention takes under autocast; rotary ones come mixed."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def _base_attention(base: str, module: nn.Module) -> Callable[..., Any]:
    from transformers import AttentionInterface

    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return AttentionInterface()[base]


@dataclass(frozen=True, eq=False)
class TreePlan:
    """One row of packed tokens, as `tree` says."""

    tree: Tree

    def mask(self, layers: Layers) -> LayerMask:
        """See `ForwardPlan`."""
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

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions
    ) -> Tensor:
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
            softcap=options.softcap,
            sinks=options.sinks,
            scale=options.scale,
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
