"""Batches of what predicts each completion token: hidden rows or logits, in one of three ways.

    tree    one packed row per batch, every shared token once    `hooks`, `tree_forward`
    cache   the prompt into a cache, completions in batches      `prefix_cache`
    none    every sequence whole, in padded batches              `forward`

Sequences that share nothing are packed by "tree" as well, side by side in one row.

S scored tokens, R rows that predict, D hidden, V vocabulary, K tokens of pairs that are kept.

Statistics of every completion token of many pairs, batch by batch, in input order.

S scored tokens, R hidden rows that predict them, V vocabulary.  Two routes, one contract:

    "hidden"   hidden rows x head in `linear_logprob`; never a tensor of size [R, V]
    "logits"   the model's own logits, of one batch at a time, of a smaller budget

and three ways to get the rows that predict, in `predicting`.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple, cast, get_args

import torch
from jaxtyping import Int64
from torch import Tensor

from sharpen.errors import InputError
from sharpen_kernels import TokenStats, token_logprob
from sharpen_kernels.stats import NAMES, Statistic

from .batching import Batch, inverse_of, make_batches
from .hooks import hidden_source, logit_source
from .model_access import (
    Head,
    backbone_of,
    hidden_rows,
    input_device,
    logit_rows,
    logits_budget,
    rope_boundary,
)
from .packing import PackedRow, plan
from .pairs import Pair
from .prefix_cache import cached_parts, groups_of

if TYPE_CHECKING:
    import transformers

Sharing = Literal["tree", "cache", "none"]
WAYS: tuple[Sharing, ...] = get_args(Sharing)


class Predicting(NamedTuple):
    """What predicts some scored tokens: hidden rows, or logits, and who reads them."""

    source: Tensor  # [R, D] or [R, V]
    rows: Tensor | None  # [S] the row that predicts each token; None: row s token s
    target: Tensor  # [S]
    place: Tensor  # [S] on the CPU: where each token stands in input order


def predicting(
    model: "transformers.PreTrainedModel",
    pairs: Sequence[Pair],
    *,
    head: Head | None,
    max_tokens: int,
    sharing: Sharing,
) -> Iterator[Predicting]:
    """Batches that together predict every completion token of `pairs` once."""
    boundary, device = rope_boundary(model), input_device(model)
    if sharing == "tree":
        for row in plan(pairs, max_tokens, boundary=boundary):
            yield predicted(model, row.to(device), head)
        return
    rest: Sequence[Pair] = pairs
    places_K = None
    if sharing == "cache":
        groups, alone = groups_of(pairs, boundary)
        module = model if head is None else backbone_of(model)
        assert module is not None, "checked when the route was chosen"
        for part in cached_parts(model, module, pairs, groups, max_tokens):
            yield Predicting(*part)
        # an empty completion keeps its place and is in no batch
        kept = set(alone)
        rest = [pair if i in kept else (pair[0], []) for i, pair in enumerate(pairs)]
        places_K = _places(pairs, kept)
    for batch in make_batches(rest, max_tokens, boundary=boundary):
        part = predicted(model, batch.to(device), head)
        yield part if places_K is None else part._replace(place=places_K[part.place])


def predicted(
    model: "transformers.PreTrainedModel", batch: PackedRow | Batch, head: Head | None
) -> Predicting:
    """What one forward predicts, of a batch that is where the model is."""
    if isinstance(batch, PackedRow):
        source = logit_source(model, batch) if head is None else hidden_source(model, batch)
        return Predicting(source, batch.rows, batch.target, batch.place)
    source = logit_rows(model, batch) if head is None else hidden_rows(model, batch)
    return Predicting(source, None, batch.target, batch.place)


def _places(pairs: Sequence[Pair], kept: set[int]) -> Int64[Tensor, " K"]:
    """Places among all tokens of those of the pairs that are kept."""
    kept_S = [i in kept for i, (_, completion) in enumerate(pairs) for _ in completion]
    return torch.tensor(kept_S, dtype=torch.bool).nonzero()[:, 0]


def any_shared(pairs: Sequence[Pair]) -> bool:
    """Whether some token of `pairs` is read once for two of them by a tree or from a cache."""
    read = [pair for pair in pairs if pair[1]]
    # completions of a prompt stand side by side; else, the tree tells
    if any(one == other for (one, _), (other, _) in pairwise(read)):
        return True
    rows = plan(read, sys.maxsize)
    return rows.packed < rows.naive


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
