"""Once per model: which way of sharing a prompt gives the scores of each sequence alone?

No list of model types can tell: a recurrent layer, a position that does not come from
`position_ids` or a mask that a model makes itself all give wrong scores in silence. So each way of
`predicting` is tried on a few random tokens and compared with the sequences alone (`agreement`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float32
from torch import Tensor

from sharpen.limits import ModelLimits

from .agreement import Truth
from .forward import evaluating
from .head import Head
from .hooks import SharingError, install, uninstall
from .pairs import Pair
from .predicting import WAYS, Sharing
from .token_stats import token_stats

if TYPE_CHECKING:
    import transformers


@dataclass(frozen=True)
class Choice:
    """The way found, and why in words."""

    sharing: Sharing
    reason: str


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
    found = token_stats(model, pairs, head=head, max_tokens=2**14, stats=("logprob",), sharing=way)
    assert found.logprob is not None
    return found.logprob.float()
