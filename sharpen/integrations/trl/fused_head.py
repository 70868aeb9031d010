"""TRL's fused head, over prompts that are computed once.

`trl.trainer.add_fused_lm_head` gives `model(..., labels=labels, fused_lm_head=True)`, from which
all of TRL's trainers read per-token log-probs, entropies and more. This one answers the same call
with the same `FusedCausalLMOutput`; what several rows of the batch begin with, above all the prompt
of a group, goes through the layers once.
"""

import functools
import importlib
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sharpen.errors import InputError

from .shared_stats import SharedStats

if TYPE_CHECKING:
    import transformers

# what a trainer hands over beside ids, mask and labels, and means nothing here
HARMLESS = ("use_cache", "num_items_in_batch", "return_dict")

INSTALL = 'pip install "sharpen[trl]"'
# of TRL 1.15 and 1.16, as their metadata say; sharpen itself runs on 3.10
PYTHON = (3, 11)


# a module of a package that may not be there
def host(name: str = "trl") -> Any:
    """The module `name` of TRL.

    Raises:
        InputError: If TRL is not there, or older than 1.15, or cannot be: it needs Python 3.11.
    """
    if sys.version_info < PYTHON:
        here = ".".join(map(str, sys.version_info[:2]))
        raise InputError(
            f"TRL must be 1.15 or later, which needs Python 3.11 or later, got Python {here}; make "
            f"an environment of 3.11 and {INSTALL}."
        )
    try:
        trainer = importlib.import_module("trl.trainer")
        found = importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"TRL must be installed, got {error}; {INSTALL}.") from error
    if not hasattr(trainer, "add_fused_lm_head"):
        version = importlib.import_module("trl").__version__
        raise InputError(f"TRL must be 1.15 or later, got {version}; {INSTALL}.")
    return found


def add_fused_lm_head(
    model: "transformers.PreTrainedModel",
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: Sequence[str] = ("log_probs",),
    *,
    max_tokens: int = 16384,
) -> None:
    """As `trl.trainer.add_fused_lm_head`, with shared prompts; may be called on top of it.

    Without `fused_lm_head=True` the model's forward is the one that it had. Rows may be padded on
    both sides; positions are those of the row without its padding, as in generation. Log-probs and
    logits are never rounded to half precision, whatever the model's dtype.

    Args:
        model: Causal language model; before PEFT or accelerate wraps it, or the one inside.
        temperature: Divides the logits.
        cast_lm_head_to_fp32: Must be False: products are summed up in fp32 anyway.
        outputs: Per-token fields of `FusedCausalLMOutput` beside the log-probs.
        max_tokens: Tokens of one packed row.

    Raises:
        InputError: If TRL is not installed, an option is not as above, or the model is not causal.
            Calls raise it for what is not a padded batch of token ids.
    """
    put_head(model, temperature, cast_lm_head_to_fp32, outputs, max_tokens)


@dataclass
class HeadCalls:
    """How often a head was called with `fused_lm_head=True`."""

    n: int = 0


def put_head(
    model: "transformers.PreTrainedModel",
    temperature: float,
    cast_lm_head_to_fp32: bool,
    outputs: Sequence[str],
    max_tokens: int,
) -> HeadCalls:
    """`add_fused_lm_head`, with a count of the calls that the head will get."""
    output_class = host("trl.trainer.utils").FusedCausalLMOutput
    calls = HeadCalls()
    if cast_lm_head_to_fp32:
        raise InputError(
            "`cast_lm_head_to_fp32` must be False with shared prompts, got True; leave it out: "
            "this head never rounds logits, whatever the dtype of its weight."
        )
    with bare_forward(model):
        stats = SharedStats(model, temperature=temperature, outputs=outputs, max_tokens=max_tokens)
    own = model.forward

    @torch.compiler.disable
    # what the model takes, and what TRL adds
    def fused(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, **rest: Any) -> Any:
        _check_rest(rest)
        n_items = rest.get("num_items_in_batch")
        labels = labels.to(input_ids.device)
        found = stats(input_ids, attention_mask, labels)
        mask = labels[:, 1:].to(found["log_probs"].device) != -100
        divisor = mask.sum().clamp(min=1) if n_items is None else n_items
        return output_class(loss=-found["log_probs"].sum() / divisor, label_mask=mask, **found)

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return own(*args, **kwargs)
        calls.n += 1
        if args or kwargs.get("input_ids") is None or kwargs.get("labels") is None:
            raise InputError(
                "the shared head must be given `input_ids` and `labels` by name, got "
                f"{', '.join(kwargs) or 'none'}; prompt-learning adapters and embeddings as "
                "inputs are not supported, LoRA is."
            )
        kwargs.setdefault("attention_mask", None)
        return fused(**kwargs)

    model.forward = types.MethodType(forward, model)
    return calls


def _check_rest(rest: dict[str, Any]) -> None:
    """Reject arguments that would change the log-probs."""
    odd = [name for name, x in rest.items() if name not in HARMLESS and x is not None]
    if "output_router_logits" in odd and not rest["output_router_logits"]:
        odd.remove("output_router_logits")
    if odd:
        raise InputError(
            f"the shared head must be given token ids, a mask and labels alone, got "
            f"`{odd[0]}`; images, packed rows and router losses need TRL's own trainer."
        )


@contextmanager
def bare_forward(model: nn.Module) -> Iterator[None]:
    """While open the forward is the class's own, outside what a trainer wrapped around it.

    accelerate's wrapper turns autocast on: probed through it, a head would seem to be another.
    """
    is_placed = hasattr(model, "_hf_hook")  # by device_map, whose wrapper moves tensors
    wrapped = None if is_placed else vars(model).pop("forward", None)
    try:
        yield
    finally:
        if wrapped is not None:
            model.forward = wrapped
