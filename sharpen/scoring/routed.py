"""Statistics of pairs by the route of a model, and whole where a call cannot go by it."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from sharpen_kernels import TokenStats
from sharpen_kernels.linear_logprob import Statistic

from .head import Head
from .hooks import SharingError
from .pairs import Pair
from .predicting import any_shared
from .route import Route
from .token_stats import token_stats

if TYPE_CHECKING:
    import transformers

logger = logging.getLogger(__name__)


def routed_stats(
    model: "transformers.PreTrainedModel",
    pairs: list[Pair],
    stats: Sequence[Statistic],
    *,
    route: tuple[Route, Head | None],
    max_tokens: int,
    sharing: str = "auto",
    temperature: float = 1.0,
) -> TokenStats:
    """`token_stats` of all completion tokens of `pairs`, end to end; differentiable.

    Args:
        model: Run in the mode it is in.
        pairs: Prompt and completion ids; the prompt has at least one.
        stats: Which statistics.
        route: What `find_route` found of `model`.
        max_tokens: Budget of one batch, in tokens.
        sharing: What was asked for; with "auto", pairs that share nothing are read whole.
        temperature: Divides the model's logits.
    """
    found, head = route
    options = {"head": head, "max_tokens": max_tokens, "temperature": temperature}
    run = partial(token_stats, model, pairs, stats=stats, **options)
    whole = sharing == "auto" and not any_shared(pairs)
    try:
        return run(sharing="none" if whole else found.sharing)
    except SharingError as error:
        # not met by the probe: dropout, checkpointing, a layer that long inputs alone reach
        logger.warning("whole sequences instead of shared prompts: %s", error)
        return run(sharing="none")
