"""How a model is scored: what reads its head, and how completions share their prompt.

Both are found by running the model on a few random tokens, said once in the log.
"""

import logging
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from sharpen.errors import InputError

from .head import Head
from .hooks import install
from .predicting import WAYS, Sharing
from .probe import find_head
from .sharing import find_sharing

if TYPE_CHECKING:
    import transformers

logger = logging.getLogger(__name__)


class Route(NamedTuple):
    """How a model is scored.

    Attributes:
        sharing: "tree", "cache" or "none": how completions share their prompt.
        head: "hidden" projects hidden rows in `linear_logprob`. "logits" lets the model compute
            the logits of one small batch at a time: slower, as exact as its own arithmetic.
    """

    sharing: Sharing
    head: Literal["hidden", "logits"]


def find_route(model: "transformers.PreTrainedModel", sharing: str) -> tuple[Route, Head | None]:
    """The route of `model`, and how to read its head where that is "hidden".

    Raises:
        InputError: If the model is not causal, or does not score right when it shares as asked.
    """
    # odd shapes, tried once, are not worth graphs of a model that is compiled
    with torch.compiler.set_stance("force_eager"):
        return _find_route(model, sharing)


def take_route(model: "transformers.PreTrainedModel", route: Route) -> None:
    """Prepare `model` for the route that was found for its like elsewhere."""
    if route.sharing == "tree":
        why = install(model)
        assert why is None, why


def bounded_way(model: "transformers.PreTrainedModel", route: Route, head: Head | None) -> Sharing:
    """How its gradients are gathered in bounded memory.

    A prompt's graph can wait behind a cache, where the model scores right from one.
    """
    if route.sharing != "tree":
        return route.sharing
    with torch.compiler.set_stance("force_eager"):
        return find_sharing(model, head, ["cache"]).sharing


def _find_route(model: "transformers.PreTrainedModel", sharing: str) -> tuple[Route, Head | None]:
    name = type(model).__name__
    finding = find_head(model)
    if finding.head is None:
        logger.warning("%s takes the slower logits route: %s.", name, finding.reason)
    else:
        logger.info("%s takes the hidden route: %s.", name, finding.reason)
    choice = find_sharing(model, finding.head, [way for way in WAYS if sharing in ("auto", way)])
    if sharing not in ("auto", choice.sharing):
        raise InputError(
            f"`sharing` must be one that scores {name} right, got {sharing!r} "
            f"({choice.reason}); leave it at 'auto'."
        )
    logger.info("%s shares prompts by %r: %s.", name, choice.sharing, choice.reason)
    return Route(choice.sharing, "logits" if finding.head is None else "hidden"), finding.head
