"""Run a transformers model on one packed row: every shared token once.

T packed tokens, R hidden rows that predict, D hidden, V vocabulary.
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sharpen.errors import SharpenError

from .forward import accepted, backbone_of
from .hooks import under
from .packing import PackedRow
from .tree_plan import TreePlan

if TYPE_CHECKING:
    import transformers


def hidden_source(model: "transformers.PreTrainedModel", row: PackedRow) -> Float[Tensor, "R D"]:
    """The hidden rows of `row.source`, as the backbone hands them to the head; differentiable.

    The hooks of `hooks.py` must be installed in `model`.
    """
    backbone = backbone_of(model)
    assert backbone is not None, "checked when the route was chosen"
    out = _run(backbone, row)
    hidden_TD: Tensor = out.last_hidden_state[0]
    return hidden_TD[row.source.to(hidden_TD.device)]


def logit_source(model: "transformers.PreTrainedModel", row: PackedRow) -> Float[Tensor, "R V"]:
    """The logits of `row.source`, as the model computes them; differentiable.

    Allocates [R, V] if the model can be told which tokens to project, else [T, V].

    Raises:
        SharpenError: If the model returns logits for some other number of tokens.
    """
    T, R = len(row.ids), len(row.source)
    logits_KV: Tensor = _run(model, row, logits_to_keep=row.source).logits[0]
    if len(logits_KV) not in (T, R):
        raise SharpenError(
            f"{type(model).__name__} must return logits for {R} or {T} tokens, "
            f"got {len(logits_KV)}."
        )
    return logits_KV if len(logits_KV) == R else logits_KV[row.source.to(logits_KV.device)]


def _run(module: nn.Module, row: PackedRow, **options: Tensor):
    # a mask of ones: without it transformers reads sequences off the positions
    mask_T = torch.ones_like(row.ids)
    asked = accepted(
        module,
        input_ids=row.ids[None],
        attention_mask=mask_T[None],
        position_ids=row.tree.position[None],
        use_cache=False,
        **options,
    )
    with under(TreePlan(row.tree)):
        return module(**asked)
