"""Once per model: which way of sharing a prompt gives the scores of each sequence alone?

    tree    one packed row per batch, every shared token once    `hooks`, `tree_forward`
    cache   the prompt into a cache, completions in batches      `prefix_cache`
    none    every sequence whole, in padded batches              `forward`

No list of model types can tell: a recurrent layer, a position that does not come from
`position_ids` or a mask that a model makes itself all give wrong scores in silence. So each way is
tried on a few random tokens and compared with the sequences alone (`agreement`).
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from sharpen.limits import ModelLimits

from .agreement import Truth
from .batching import make_batches
from .forward import backbone_of, evaluating, hidden_rows, input_device, logit_rows, rope_boundary
from .head import Head
from .hooks import SharingError as SharingError
from .hooks import install, uninstall
from .packing import plan
from .pairs import Pair
from .prefix_cache import cached_parts, groups_of
from .tree_forward import hidden_source, logit_source

if TYPE_CHECKING:
    import transformers

logger = logging.getLogger(__name__)

Sharing = Literal["tree", "cache", "none"]
WAYS: tuple[Sharing, ...] = get_args(Sharing)


class Predicting(NamedTuple):
    """What predicts some scored tokens: hidden rows, or logits, and who reads them."""

    source: Tensor  # [R, D] or [R, V]
    rows: Tensor | None  # [S] the row that predicts each token; None: row s token s
    target: Tensor  # [S]
    place: Tensor  # [S] on the CPU: where each token stands in input order


@dataclass(frozen=True)
class Choice:
    """The way found, and why in words."""

    sharing: Sharing
    reason: str


def predicting(
    model: "transformers.PreTrainedModel",
    pairs: Sequence[Pair],
    *,
    head: Head | None,
    max_tokens: int,
    sharing: Sharing,
) -> Iterator[Predicting]:
    """Batches that together predict every completion token of `pairs` once."""
    boundary = rope_boundary(model)
    if sharing == "tree":
        for packed in plan(pairs, max_tokens, boundary=boundary):
            row = packed.to(input_device(model))
            source = logit_source(model, row) if head is None else hidden_source(model, row)
            yield Predicting(source, row.rows, row.target, row.place)
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
        place = batch.place if places_K is None else places_K[batch.place]
        batch = batch.to(input_device(model))
        source = logit_rows(model, batch) if head is None else hidden_rows(model, batch)
        yield Predicting(source, None, batch.target, place)


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


def find_sharing(
    model: "transformers.PreTrainedModel", head: Head | None, ways: Sequence[Sharing] = WAYS
) -> Choice:
    """The first of `ways` that scores a few random sequences as each alone scores.

    Runs in eval mode without gradients. Leaves the hooks of tree attention in the model if that
    is the way, and no other trace.
    """
    with torch.no_grad(), evaluating(model):
        pairs = _probe_pairs(model)
        truth = Truth(
            model, lambda: torch.cat([_logprobs(model, [pair], head, "none") for pair in pairs])
        )
        truth.allow(_logprobs(model, pairs, head, "none"))
        refused = []
        for way in ways:
            if way == "none":
                break
            reason = _try(model, pairs, head, way, truth)
            if reason is None:
                return Choice(way, "; ".join(["it scores as each sequence alone", *refused]))
            refused.append(f"{way}: {reason}")
    return Choice("none", "; ".join(refused) or "it was asked for")


def _try(
    model: "transformers.PreTrainedModel",
    pairs: list[Pair],
    head: Head | None,
    way: Sharing,
    truth: Truth,
) -> str | None:
    """Why `way` does not do for this model, or None."""
    if way == "tree":
        why = install(model)
        if why is not None:
            return why
    try:
        why = truth.fault(_logprobs(model, pairs, head, way))
    # a model may fail in any way at what it was not made for; the reason is logged
    except Exception as failure:
        why = (
            str(failure).splitlines()[0]
            if isinstance(failure, SharingError)
            else (f"{type(failure).__name__}: {failure}".splitlines()[0])
        )
    if why is not None and way == "tree":
        uninstall(model)
    return why


def _probe_pairs(model: "transformers.PreTrainedModel") -> list[Pair]:
    """Two prompts; completions of unequal lengths, two of them with an opening in common."""
    limits = ModelLimits.of(model)
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(limits.vocab_size, (n,), generator=generator).tolist()

    room = 64 if limits.max_length is None else min(64, limits.max_length)
    prompt, opening = ids(room // 2), ids(room // 6)
    endings = [ids(n) for n in (room // 3, 1, room // 8)]
    pairs = [(prompt, opening + ending) for ending in endings[1:]]
    pairs += [(prompt, endings[0]), (ids(room // 4), ids(2))]
    return [(p, c) for p, c in pairs if p and c]


def _logprobs(
    model: "transformers.PreTrainedModel", pairs: list[Pair], head: Head | None, way: Sharing
) -> Float32[Tensor, " S"]:
    from .token_stats import token_stats

    found = token_stats(model, pairs, head=head, max_tokens=2**14, stats=("logprob",), sharing=way)
    assert found.logprob is not None
    return found.logprob.float()
