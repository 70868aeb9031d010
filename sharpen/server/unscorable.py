"""Samples that have no reward, and what they get: an error, or one number that the user chose.

A sample has no reward if it is empty (its 0 nats would beat every other), if it is longer than the
model's context, or if its log-prob or its reward is not finite. Hosts that train ask for the reward
of every sample, and end the run where one is rejected.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sharpen.errors import InputError, SharpenError, check_value

logger = logging.getLogger(__name__)

SETTING = "unscorable_reward"
Cause = Literal["empty", "too_long", "not_finite"]


@dataclass(frozen=True)
class Unscorable:
    """In place of a reward.

    Attributes:
        cause: Of which kind.
        why: In words, without a full stop.
        error: What to raise where such a sample is rejected; None has one made of `why`.
    """

    cause: Cause
    why: str
    error: SharpenError | None = None


# causes that the log has, with what the samples got
_LOGGED: set[tuple[Cause, str]] = set()


class UnscorableReward:
    """What samples without a reward get.

    Args:
        reward: A finite number; None rejects the sample.
        observe: Called with the cause of each sample that gets `reward`.

    Raises:
        InputError: If `reward` is not finite.
    """

    def __init__(
        self, reward: float | None = None, observe: Callable[[Cause], object] | None = None
    ):
        if reward is not None:
            check_value(SETTING, reward, math.isfinite(reward), "a finite number")
        self._reward = reward
        self._observe = observe

    @property
    def is_error(self) -> bool:
        """Whether such a sample is rejected."""
        return self._reward is None

    def resolve(self, rated: float | Unscorable) -> float:
        """The reward, or the number in its place: counted, and logged once for each cause.

        Raises:
            SharpenError: If there is neither.
        """
        if not isinstance(rated, Unscorable):
            return rated
        if self._reward is None:
            raise rated.error or InputError(
                f"{rated.why}; set `{SETTING}` to what such a response shall get, a finite number, "
                "and training goes on."
            )
        if self._observe is not None:
            self._observe(rated.cause)
        given = f"`{SETTING}`, {self._reward:g}"
        if (rated.cause, given) not in _LOGGED:
            _LOGGED.add((rated.cause, given))
            logger.warning(
                "a response has no reward (%s); it gets %s. Others of its kind will too, and are "
                "not logged.",
                rated.why,
                given,
            )
        return self._reward


# of a host's configuration
def finite_or_none(given: object) -> float | None:
    """The setting `unscorable_reward`.

    Raises:
        InputError: If it is neither a finite number nor None.
    """
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not math.isfinite(given):
        raise InputError(f"`{SETTING}` must be a finite number, or left out, got {given!r}.")
    return float(given)


def why_not_finite(value: float) -> str:
    """Where a log-prob or a reward that is NaN or infinite comes from."""
    if math.isnan(value):
        return "NaN in the weights, or overflow in half precision"
    return "the model calls one of its tokens impossible"
