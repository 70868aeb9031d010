"""Statistics of every completion token of many pairs, batch by batch, in input order.

S scored tokens, V vocabulary.  Two routes, one contract:

    "hidden"   hidden rows x head in `linear_logprob`; never a tensor of size [S, V]
    "logits"   the model's own logits, of one batch at a time, of a smaller budget
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sharpen.limits import ModelLimits
from sharpen_kernels import TokenStats
from sharpen_kernels.linear_logprob import Statistic

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
            parts.append(stats_of_logits(logits_SV, batch.target.to(logits_SV.device), stats))
    return _join(parts, inverse_of(places), stats, input_device(model))


def _join(
    parts: list[TokenStats],
    inverse: Int64[Tensor, " S"],
    stats: Sequence[Statistic],
    device: torch.device,
) -> TokenStats:
    if not parts:
        return TokenStats(**{name: torch.zeros(0, device=device) for name in stats})
    columns = {}
    for name in stats:
        column_S = torch.cat([getattr(part, name) for part in parts])
        columns[name] = column_S[inverse.to(column_S.device)]
    return TokenStats(**columns)


def stats_of_logits(
    logits: Float[Tensor, "S V"], target: Int64[Tensor, " S"], stats: Sequence[Statistic]
) -> TokenStats:
    """`linear_logprob`'s statistics from logits at hand; holds a few tensors of their size.

    A logit of -inf is a masked id: it has no part in the entropy, and is not among the ids
    that self-certainty is uniform over.
    """
    wide_SV = logits.to(torch.promote_types(logits.dtype, torch.float32))
    lse_S = wide_SV.logsumexp(dim=1)
    # not wide - lse, which rounds to above 0 where p is near 1
    logprob_SV = wide_SV.log_softmax(dim=1)
    masked_SV = wide_SV == float("-inf")
    finite_SV = logprob_SV.masked_fill(masked_SV, 0.0)
    columns = {
        "logprob": lambda: logprob_SV.gather(1, target[:, None]).squeeze(1),
        "lse": lambda: lse_S,
        "entropy": lambda: -(logprob_SV.exp() * finite_SV).sum(dim=1),
        "self_certainty": lambda: _self_certainty(finite_SV, (~masked_SV).sum(dim=1)),
        "is_greedy": lambda: torch.where(
            lse_S.isfinite(), (wide_SV.argmax(dim=1) == target).to(lse_S.dtype), float("nan")
        ),
    }
    return TokenStats(**{name: columns[name]() for name in stats})


def _self_certainty(
    logprob: Float[Tensor, "S V"], n_unmasked: Int64[Tensor, " S"]
) -> Float[Tensor, " S"]:
    return -logprob.sum(dim=1) / n_unmasked - n_unmasked.log()
