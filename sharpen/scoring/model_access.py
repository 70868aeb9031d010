"""How a model turns hidden rows into logits, read from its configuration.

    logits = softcap(x W^T + b) / temperature,    softcap(z) = c tanh(z / c)

S scored tokens, D hidden, V vocabulary.

Families write the scale their own way: Cohere multiplies by `logit_scale`, Granite divides by
`logits_scaling`, HyperCLOVA X multiplies by it, Falcon-H1 has another name; Gemma caps and does not
scale, Muse scales and then caps. A configuration says what the numbers are, not what the code does
with them, so `readings` lists every meaning they can have, and the probe finds the true one.

Run a transformers model on one padded batch: hidden rows, or logits, that predict.

B sequences, L padded length, S scored tokens, D hidden, V vocabulary.

No `position_ids` are passed: rows are padded on the right, so a model's own positions are those
of the row alone, also where they do not begin at 0 (OPT, RoBERTa) or do not exist.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from sharpen.errors import SharpenError
from sharpen.models import ModelLimits
from sharpen_kernels import TokenStats, linear_logprob
from sharpen_kernels.linear_logprob import Statistic

from .batching import Batch

if TYPE_CHECKING:
    import transformers

DIVISORS = ("logits_scaling",)
FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class Head:
    """One way to read logits off a linear layer."""

    temperature: float = 1.0
    softcap: float | None = None

    def token_stats(
        self,
        model: "transformers.PreTrainedModel",
        hidden: Float[Tensor, "R D"],
        target: Int64[Tensor, " S"],
        *,
        rows: Int64[Tensor, " S"] | None = None,
        stats: Sequence[Statistic] = ("logprob",),
    ) -> TokenStats:
        """Statistics of `target` under the logits of `hidden`; see `linear_logprob`.

        The weight is taken from the model at each call, so it may be trained or replaced between
        two calls. Nothing of size [R, V] is held.
        """
        layer = output_layer(model)
        assert layer is not None, "checked when the route was chosen"
        return self.layer_stats(layer, hidden, target, rows=rows, stats=stats)

    def layer_stats(
        self,
        layer: nn.Linear,
        hidden: Float[Tensor, "R D"],
        target: Int64[Tensor, " S"],
        *,
        rows: Int64[Tensor, " S"] | None = None,
        stats: Sequence[Statistic] = ("logprob",),
    ) -> TokenStats:
        """`token_stats` of a model whose head is `layer`."""
        device = layer.weight.device
        return linear_logprob(
            hidden.to(device),
            layer.weight,
            target.to(device),
            rows=None if rows is None else rows.to(device),
            bias=layer.bias,
            temperature=self.temperature,
            softcap=self.softcap,
            stats=stats,
        )


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


def readings(config: "transformers.PreTrainedConfig") -> list[Head]:
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


LOGITS_BYTES = 2**28  # fp32 logits of one batch on the logits route; chosen


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
    """What the backbone of `model` hands to the head; None if there is no such thing."""
    backbone = backbone_of(model)
    if backbone is None:
        return None
    out = backbone(**accepted(backbone, input_ids=ids, attention_mask=mask, use_cache=False))
    return getattr(out, "last_hidden_state", None)


def hidden_rows(model: "transformers.PreTrainedModel", batch: Batch) -> Float[Tensor, "S D"]:
    """The hidden row that predicts each scored token of `batch`; differentiable."""
    hidden_BLD = hidden_states(model, batch.ids, batch.mask)
    assert hidden_BLD is not None, "checked when the route was chosen"
    return hidden_BLD.flatten(0, 1)[batch.rows.to(hidden_BLD.device)]


def logit_rows(model: "transformers.PreTrainedModel", batch: Batch) -> Float[Tensor, "S V"]:
    """The logits, as the model computes them, of each scored token of `batch`; differentiable.

    Allocates [B, K, V] where K columns span those that predict, if the model can be told which
    columns to project; else [B, L, V].

    Raises:
        SharpenError: If the model returns logits for some other number of columns.
    """
    L = batch.ids.shape[1]
    column_S = batch.rows % L
    first, last = int(column_S.min()), int(column_S.max())
    keep_K = torch.arange(first, last + 1, device=batch.ids.device)
    asked = accepted(model, use_cache=False, logits_to_keep=keep_K)
    out = model(input_ids=batch.ids, attention_mask=batch.mask, **asked)
    logits: Tensor = out.logits
    if logits.shape[1] not in (L, len(keep_K)):
        raise SharpenError(
            f"{type(model).__name__} must return logits for {L} columns, got {logits.shape[1]}; "
            "adapters that insert tokens cannot be scored."
        )
    if logits.shape[1] == L:
        logits = logits[:, first : last + 1]
    K = logits.shape[1]
    row_S = batch.rows // L * K + column_S - first
    return logits.flatten(0, 1)[row_S.to(logits.device)]


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
