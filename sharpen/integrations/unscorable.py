"""Responses that have no reward: empty ones, those too long, those whose reward is no number.

A rating puts `Unscorable` in their place, so that the others of their batch keep their rewards.
The host is then given the number that the user named, or an error.
"""

import logging
import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from sharpen.errors import InputError

logger = logging.getLogger(__name__)

SETTING = "unscorable_reward"


@dataclass(frozen=True)
class Unscorable:
    """In place of a reward.

    Attributes:
        cause: Of which kind.
        why: In words, without a full stop.
    """

    cause: Literal["empty", "too_long", "not_finite"]
    why: str


Rated: TypeAlias = float | Unscorable

EMPTY = Unscorable("empty", "a completion must hold at least one token to be rated, got none")


def too_long(n_prompt: int, n_completion: int, max_length: int) -> Unscorable:
    """Of a completion that the model that rates cannot read to its end."""
    return Unscorable(
        "too_long",
        f"prompt and completion must fit the context of {max_length} tokens of the model that "
        f"rates, got {n_prompt} + {n_completion}",
    )


def not_finite(reward: str, value: float) -> Unscorable:
    """Of a completion whose reward is NaN or infinite."""
    why = "the model's logits are; look for NaN in its weights, or overflow in half precision"
    if not math.isnan(value):
        why = "the model calls one of its tokens impossible"
    return Unscorable("not_finite", f"`reward` {reward} is {value}: {why}".replace("nan", "NaN"))


# of a configuration
def checked(given: Any) -> float | None:
    """The setting `unscorable_reward`.

    Raises:
        InputError: If it is neither a finite number nor None.
    """
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not math.isfinite(given):
        raise InputError(f"`{SETTING}` must be a finite number, or left out, got {given!r}.")
    return float(given)


def settled(rated: Rated, otherwise: float | None) -> float:
    """The number that a host gets which takes numbers alone.

    Args:
        rated: A reward, or why there is none.
        otherwise: What the user wants in place of one; told once for each cause in the log.

    Raises:
        InputError: If there is no reward and nothing in its place.
    """
    if not isinstance(rated, Unscorable):
        return rated
    if otherwise is None:
        raise InputError(
            f"{rated.why}; set `{SETTING}` to what such a response shall get, a finite number, "
            "and training goes on."
        )
    tell(rated, f"`{SETTING}`, {otherwise:g}")
    return otherwise


# causes that the log has told
_TOLD: set[str] = set()


def tell(found: Unscorable, given: str) -> None:
    """Log that a response has no reward, once a process for each cause."""
    if found.cause in _TOLD:
        return
    _TOLD.add(found.cause)
    logger.warning(
        "a response has no reward (%s); it gets %s. Others of its kind will too, untold.",
        found.why,
        given,
    )
