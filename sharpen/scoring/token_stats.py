"""Statistics of every completion token of many pairs, batch by batch, in input order.

S scored tokens, V vocabulary.  Two routes, one contract:

    "hidden"   hidden rows x head in `linear_logprob`; never a tensor of size [S, V]
    "logits"   the model's own logits, of one batch at a time, of a smaller budget
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Int64
from torch import Tensor

from sharpen.errors import InputError
from sharpen.limits import ModelLimits
from sharpen_kernels import TokenStats, token_logprob
from sharpen_kernels.stats import NAMES, Statistic

from .batching import inverse_of, make_batches
from .forward import hidden_rows, input_device, logit_rows, rope_boundary
from .head import Head
from .pairs import Pair

if TYPE_CHECKING:
    import transformers

LOGITS_BYTES = 2**28  # fp32 logits of one batch on the logits route; chosen


def token_stats(
    model: "transformers.PreTrainedModel",
    pairs: Sequence[Pair],
    *,
    head: Head | None,
    max_tokens: int,
    stats: Sequence[Statistic],
) -> TokenStats:
    """Statistics of all completion tokens of `pairs`, end to end; differentiable in the model.

    Args:
        model: Run in the mode it is in.
        pairs: Prompt and completion ids; the prompt has at least one.
        head: How to read logits off hidden rows; None takes the logits route.
        max_tokens: Budget of one batch, in padded tokens.
        stats: Which statistics; see `TokenStats`.
    """
    if head is None:
        V = ModelLimits.of(model).vocab_size
        max_tokens = min(max_tokens, LOGITS_BYTES // (4 * V))
    parts, places = [], []
    for batch in make_batches(pairs, max_tokens, boundary=rope_boundary(model)):
        places.append(batch.place)
        batch = batch.to(input_device(model))
        if head is not None:
            hidden_SD = hidden_rows(model, batch)
            parts.append(head.token_stats(model, hidden_SD, batch.target, stats=stats))
        else:
            logits_SV = logit_rows(model, batch)
            target_S = batch.target.to(logits_SV.device)
            parts.append(token_logprob(logits_SV, target_S, stats=stats))
    return _join(parts, inverse_of(places), stats, input_device(model))


def check_stats(stats: Sequence[str]) -> tuple[Statistic, ...]:
    """The statistics to compute: the log-prob and `stats`, each once.

    Raises:
        InputError: If one is unknown.
    """
    unknown = [name for name in stats if name not in NAMES]
    if unknown:
        raise InputError(f"`stats` must be of {', '.join(NAMES)}, got {unknown[0]!r}.")
    return tuple(dict.fromkeys(cast(Sequence[Statistic], ["logprob", *stats])))


def on_cpu(x: Tensor) -> Tensor:
    """`x` on the CPU, floats in fp32."""
    return x.to("cpu", torch.float32) if x.is_floating_point() else x.cpu()


def _join(
    parts: list[TokenStats],
    inverse: Int64[Tensor, " S"],
    stats: Sequence[Statistic],
    device: torch.device,
) -> TokenStats:
    if not parts:
        nothing = torch.zeros(0, 1, device=device)
        return token_logprob(nothing, nothing[:, 0].long(), stats=stats)
    columns = {}
    for name in stats:
        column_S = torch.cat([getattr(part, name) for part in parts])
        columns[name] = column_S[inverse.to(column_S.device)]
    return TokenStats(**columns)
