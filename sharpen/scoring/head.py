"""How a model turns hidden rows into logits, read from its configuration.

    logits = softcap(x W^T + b) / temperature,    softcap(z) = c tanh(z / c)

S scored tokens, D hidden, V vocabulary.

Families write the scale their own way: Cohere multiplies by `logit_scale`, Granite divides by
`logits_scaling`, HyperCLOVA X multiplies by it, Falcon-H1 has another name; Gemma caps and does not
scale, Muse scales and then caps. A configuration says what the numbers are, not what the code does
with them, so `readings` lists every meaning they can have, and the probe finds the true one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from sharpen_kernels import TokenStats, linear_logprob
from sharpen_kernels.linear_logprob import Statistic

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
