"""What the scorer reads off a transformers model: its backbone, its head, its modes.

A head is one linear layer, whose logits may be scaled and capped:

    logits = softcap(x W^T + b) / temperature,    softcap(z) = c tanh(z / c)

Families write the scale their own way: Cohere multiplies by `logit_scale`, Granite divides by
`logits_scaling`, HyperCLOVA X multiplies by it, Falcon-H1 has another name; Gemma caps and does not
scale, Muse scales and then caps. A configuration says what the numbers are, not what the code does
with them, so `candidate_heads` lists every meaning they can have, and the probe finds the true one.

B sequences, L padded length, S scored tokens, R hidden rows that predict them, D hidden.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from sharpen.models import ModelLimits

if TYPE_CHECKING:
    import transformers

DIVISORS = ("logits_scaling",)
FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

LOGITS_BYTES = 2**28  # fp32 logits of one batch on the logits route; chosen


@dataclass(frozen=True)
class Head:
    """One way to read logits off a linear layer."""

    temperature: float = 1.0
    softcap: float | None = None


def output_layer(model: "transformers.PreTrainedModel") -> nn.Linear | None:
    """The head of `model` if calling it is x W^T + b and nothing else, or None.

    A hook, an adapter, a parametrisation, a quantised, sharded or offloaded weight would be left
    out of the arithmetic, so such a head does not count.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return None
    # accelerate replaces `forward` of a layer that it has placed, to move its input there
    replaced = "forward" in vars(head) and not hasattr(head, "_hf_hook")
    hooked = head._forward_hooks or head._forward_pre_hooks
    plain = (torch.Tensor, nn.Parameter)
    if replaced or hooked or type(head.weight) not in plain:
        return None
    if head.weight.is_meta or not head.weight.is_floating_point():
        return None
    return head


def candidate_heads(config: "transformers.PreTrainedConfig") -> list[Head]:
    """Every head that the numbers in `config` can mean, the likeliest first."""
    scales = [1 / x for x in _numbers(config, DIVISORS)]
    scales += [*_numbers(config, FACTORS), 1.0]
    heads = []
    for softcap in [*_numbers(config, SOFTCAPS), None]:
        for scale in scales:
            heads.append(Head(1 / scale, softcap))
            if softcap is not None:
                # c tanh(s z / c) = s c' tanh(z / c') with c' = c / s: scaled before the cap
                heads.append(Head(1 / scale, softcap / scale))
    return list(dict.fromkeys(heads))


def _numbers(config: "transformers.PreTrainedConfig", fields: tuple[str, ...]) -> list[float]:
    text = config.get_text_config()
    values = [getattr(text, field, None) for field in fields]
    return [float(x) for x in values if isinstance(x, (int, float)) and x > 0]


def backbone_of(model: "transformers.PreTrainedModel") -> nn.Module | None:
    """The part of `model` below its head; None if it has none that can be called alone."""
    # get_decoder() of some families is the model itself, of some the head
    named = [model.get_decoder(), model.base_model, getattr(model, "model", None)]
    outer = (model, model.get_output_embeddings())
    parts = (part for part in named if isinstance(part, nn.Module))
    return next((part for part in parts if all(part is not x for x in outer)), None)


def hidden_states(
    model: "transformers.PreTrainedModel",
    ids: Int64[Tensor, "B L"],
    mask: Int64[Tensor, "B L"] | None = None,
) -> Float[Tensor, "B L D"] | None:
    """What the backbone of `model` hands to the head; None if there is no such thing.

    No positions are passed: rows are padded on the right, so a model's own are those of the row
    alone, also where they do not begin at 0 (OPT, RoBERTa) or do not exist.
    """
    backbone = backbone_of(model)
    if backbone is None:
        return None
    out = backbone(**accepted(backbone, input_ids=ids, attention_mask=mask, use_cache=False))
    return getattr(out, "last_hidden_state", None)


def logits_budget(model: "transformers.PreTrainedModel", max_tokens: int) -> int:
    """`max_tokens`, or fewer whose fp32 logits fill `LOGITS_BYTES`."""
    return min(max_tokens, LOGITS_BYTES // (4 * ModelLimits.of(model).vocab_size))


def rope_boundary(model: "transformers.PreTrainedModel") -> int | None:
    """The sequence length at which `model` changes its rotary frequencies, or None.

    "longrope" (Phi-3) turns every row of a batch by the longest of them, so a short sequence must
    not share a batch with one above the boundary. The other kinds that follow the length change
    only beyond the model's context, which is refused.
    """
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    for rope in [parameters, *(x for x in parameters.values() if isinstance(x, dict))]:
        if rope.get("rope_type") == "longrope":
            return int(rope["original_max_position_embeddings"])
    return None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module has the training flag that it had."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
# a forward takes whatever its module takes
def forward_is(module: nn.Module, forward: Any) -> Iterator[None]:
    """While open, a call of `module` runs `forward` between the module's own hooks."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def input_device(model: "transformers.PreTrainedModel") -> torch.device:
    """Where `model` wants its token ids."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.device


# values go to forward() as they are, whatever they are
def accepted(module: nn.Module, **options: Any) -> dict[str, Any]:
    """Those of `options` that `module.forward` names, or that of the model inside an adapter."""
    base = getattr(module, "get_base_model", lambda: module)()
    names = inspect.signature(base.forward).parameters
    return {name: value for name, value in options.items() if name in names}
