"""Log-probs that a sampler kept: where they say all that a reward asks, no forward is needed.

What a fused head returns, from prompts that are computed once: no host in here.

B sequences, L padded length.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from sharpen.errors import InputError
from sharpen.models import ModelLimits
from sharpen.scoring.pairs import pair_up
from sharpen.scoring.probe import probe_model
from sharpen.scoring.token_stats import Sharing, scoring_path, shared_or_whole, token_stats
from sharpen_kernels import TokenStats
from sharpen_kernels.linear_logprob import Statistic

from .batches import scattered, scored_rows

if TYPE_CHECKING:
    import transformers

# of a rollout's extra fields
NAMES = ("completion_logprobs", "sampler_logprobs", "logprobs")


# whatever else a trainer passes to a reward
def sampler_logprobs(
    given: Mapping[str, Any], completion_ids: Sequence[Sequence[int]]
) -> list[list[float]] | None:
    """Nats of each token of each completion, NaN where the sampler has none; None if not given.

    Args:
        given: What the reward function was called with; the first of `NAMES` that is there counts.
        completion_ids: Token ids of each completion.

    Raises:
        InputError: If there is not one number for each token.

    Example:
        >>> sampler_logprobs({"completion_logprobs": [[-0.5, None]]}, [[7, 2]])
        [[-0.5, nan]]
    """
    name = next((name for name in NAMES if given.get(name) is not None), None)
    if name is None:
        return None
    rows = given[name]
    if len(rows) != len(completion_ids):
        raise InputError(
            f"`{name}` must hold one list for each of {len(completion_ids)} completions, "
            f"got {len(rows)}."
        )
    found = []
    for i, (row, ids) in enumerate(zip(rows, completion_ids, strict=True)):
        row = [] if row is None else row
        numbers = all(x is None or isinstance(x, (int, float)) for x in row)
        if len(row) != len(ids) or not numbers:
            raise InputError(
                f"`{name}`[{i}] must hold one number or None for each of {len(ids)} tokens, got "
                f"{len(row) if numbers else 'lists'}; hand over those of the sampled tokens."
            )
        found.append([math.nan if x is None else float(x) for x in row])
    return found


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
        self.route = probe_model(model, "auto")

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
        route, head = self.route
        path = scoring_path(self.model, head)

        def run(way: Sharing) -> TokenStats:
            return token_stats(
                path,
                pairs,
                max_tokens=self.max_tokens,
                stats=tuple(names),
                sharing=way,
                pack_unshared=False,
                temperature=self.temperature,
            )

        tokens = shared_or_whole(run, route.sharing)
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
