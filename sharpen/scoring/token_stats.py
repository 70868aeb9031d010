"""Statistics of every completion token of many pairs, batch by batch, in input order.

S scored tokens, R hidden rows that predict them, V vocabulary.  Two routes, one contract:

    "hidden"   hidden rows x head in `linear_logprob`; never a tensor of size [R, V]
    "logits"   the model's own logits, of one batch at a time, of a smaller budget

and three ways to get the rows that predict, in `predicting`.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Int64
from torch import Tensor

from sharpen.errors import InputError
from sharpen_kernels import TokenStats, token_logprob
from sharpen_kernels.stats import NAMES, Statistic

from .batching import inverse_of
from .forward import input_device, logits_budget
from .head import Head
from .pairs import Pair
from .predicting import Sharing, predicting

if TYPE_CHECKING:
    import transformers


def token_stats(
    model: "transformers.PreTrainedModel",
    pairs: Sequence[Pair],
    *,
    head: Head | None,
    max_tokens: int,
    stats: Sequence[Statistic],
    sharing: Sharing = "none",
    temperature: float = 1.0,
) -> TokenStats:
    """Statistics of all completion tokens of `pairs`, end to end; differentiable in the model.

    Args:
        model: Run in the mode it is in.
        pairs: Prompt and completion ids; the prompt has at least one.
        head: How to read logits off hidden rows; None takes the logits route.
        max_tokens: Budget of one batch, in padded tokens.
        stats: Which statistics; see `TokenStats`.
        sharing: How completions of one prompt share it; `find_sharing` says what a model can.
        temperature: Divides the model's logits.
    """
    if head is None:
        max_tokens = logits_budget(model, max_tokens)
    else:
        head = replace(head, temperature=head.temperature * temperature)
    parts, places = [], []
    batches = predicting(model, pairs, head=head, max_tokens=max_tokens, sharing=sharing)
    for source, rows, target, place in batches:
        places.append(place)
        if head is not None:
            parts.append(head.token_stats(model, source, target, rows=rows, stats=stats))
        else:
            rows = None if rows is None else rows.to(source.device)
            target = target.to(source.device)
            options = {"rows": rows, "temperature": temperature, "stats": stats}
            parts.append(token_logprob(source, target, **options))
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


def check_temperature(temperature: float) -> None:
    """Refuse what logits cannot be divided by.

    Raises:
        InputError: If it is not above 0 and finite.
    """
    if not 0 < temperature < math.inf:
        raise InputError(f"`temperature` must be above 0 and finite, got {temperature}.")


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
