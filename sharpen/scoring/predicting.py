"""Batches of what predicts each completion token: hidden rows or logits, in one of three ways.

    tree    one packed row per batch, every shared token once    `hooks`, `tree_forward`
    cache   the prompt into a cache, completions in batches      `prefix_cache`
    none    every sequence whole, in padded batches              `forward`

Sequences that share nothing are packed by "tree" as well, side by side in one row.

S scored tokens, R rows that predict, D hidden, V vocabulary, K tokens of pairs that are kept.
"""

import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from jaxtyping import Int64
from torch import Tensor

from .batching import Batch, make_batches
from .forward import backbone_of, hidden_rows, input_device, logit_rows, rope_boundary
from .head import Head
from .packing import PackedRow, plan
from .pairs import Pair
from .prefix_cache import cached_parts, groups_of
from .tree_forward import hidden_source, logit_source

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
