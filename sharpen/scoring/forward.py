"""Run a transformers model on one padded batch: hidden rows, or logits, that predict.

B sequences, L padded length, S scored tokens, D hidden, V vocabulary.

No `position_ids` are passed: rows are padded on the right, so a model's own positions are those
of the row alone, also where they do not begin at 0 (OPT, RoBERTa) or do not exist.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from sharpen.errors import SharpenError
from sharpen.limits import ModelLimits

from .batching import Batch

if TYPE_CHECKING:
    import transformers

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
