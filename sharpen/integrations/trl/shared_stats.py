"""What a fused head returns, from prompts that are computed once: no host in here.

B sequences, L padded length.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from sharpen.errors import InputError
from sharpen.limits import ModelLimits
from sharpen.scoring.pairs import pair_up
from sharpen.scoring.route import find_route
from sharpen.scoring.routed import routed_stats
from sharpen_kernels import TokenStats
from sharpen_kernels.linear_logprob import Statistic

from .scored_rows import scattered, scored_rows

if TYPE_CHECKING:
    import transformers

# which statistics each output of TRL's head is made of
NEEDS: dict[str, tuple[Statistic, ...]] = {
    "log_probs": ("logprob",),
    "entropy": ("entropy",),
    "log_sum_sq_probs": ("sum_p2",),
    "mean_logits": ("lse", "self_certainty"),
    "is_top1": ("is_greedy",),
}


class SharedStats:
    """Per-token outputs of a causal LM on padded batches, what rows have in common computed once.

    Args:
        model: A loaded causal LM; its route is found here, by a few tiny forwards.
        temperature: Divides the logits.
        outputs: Names of `NEEDS`; the log-probs are always there.
        max_tokens: Tokens of one packed row. With gradients all rows of a call stay in memory,
            without only one does.

    Raises:
        InputError: If there is no such output, or a number is not above 0.
    """

    def __init__(
        self,
        model: "transformers.PreTrainedModel",
        *,
        temperature: float = 1.0,
        outputs: Sequence[str] = ("log_probs",),
        max_tokens: int = 16384,
    ):
        unknown = [name for name in outputs if name not in NEEDS]
        if unknown:
            raise InputError(f"`outputs` must be of {', '.join(NEEDS)}, got {unknown[0]!r}.")
        if temperature <= 0 or max_tokens < 1:
            raise InputError(
                f"`temperature` and `max_tokens` must be above 0, got {temperature}, {max_tokens}."
            )
        self.model = model
        self.temperature = temperature
        self.outputs = tuple(dict.fromkeys(["log_probs", *outputs]))
        self.max_tokens = max_tokens
        self.route = find_route(model, "auto")

    def __call__(
        self, ids: Int64[Tensor, "B L"], mask: Tensor | None, labels: Int64[Tensor, "B L"]
    ) -> dict[str, Tensor]:
        """Outputs by name, [B, L - 1] each, of the labels shifted left; 0 where none is scored.

        `log_probs` and `entropy` are differentiable, in a model that is trained also where nothing
        is scored.

        Raises:
            InputError: As `scored_rows`, and if the model cannot read a row.
        """
        rows = scored_rows(ids, mask, labels)
        pairs = pair_up(ModelLimits.of(self.model), rows.prompts, rows.completions)
        names: dict[Statistic, None] = {stat: None for name in self.outputs for stat in NEEDS[name]}
        tokens = routed_stats(
            self.model,
            pairs,
            tuple(names),
            route=self.route,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
        )
        V = ModelLimits.of(self.model).vocab_size
        found = {n: scattered(rows, _of(n, tokens, V), ids.shape) for n in self.outputs}
        if not pairs and torch.is_grad_enabled():
            found["log_probs"] = found["log_probs"] + _zero(self.model)
        return found


def _of(name: str, tokens: TokenStats, n_columns: int) -> Tensor:
    if name == "log_sum_sq_probs":
        assert tokens.sum_p2 is not None
        return tokens.sum_p2.log()
    if name == "mean_logits":
        assert tokens.lse is not None
        assert tokens.self_certainty is not None
        log_V = torch.tensor(float(n_columns)).log()
        return (tokens.lse - tokens.self_certainty).detach() - log_V
    if name == "is_top1":
        assert tokens.is_greedy is not None
        return tokens.is_greedy.bool()
    column_S = getattr(tokens, NEEDS[name][0])
    assert column_S is not None
    return column_S


def _zero(model: nn.Module) -> Tensor:
    """0 that every trained parameter is in: a step without a label is a step of no gradient."""
    parts = [p.flatten()[:1].sum() * 0 for p in model.parameters() if p.requires_grad]
    return torch.stack([x.float() for x in parts]).sum() if parts else torch.zeros(())
