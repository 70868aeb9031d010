"""Samples that no reward can be computed of: refused, or given a reward that was chosen before.

Hosts that train ask for the reward of every sample, and end where one is refused.
"""

import logging
import math
from collections.abc import Callable
from typing import Literal

from sharpen.errors import InputError, SharpenError

logger = logging.getLogger(__name__)

Cause = Literal["empty", "not_finite", "too_long"]


class Unscorable:
    """What reward routes answer for a sample that cannot be rated.

    Args:
        reward: The reward of such a sample; None refuses it.
        observe: Told the cause of each that is not refused.

    Raises:
        InputError: If `reward` is no finite number.
    """

    def __init__(
        self, reward: float | None = None, observe: Callable[[Cause], object] | None = None
    ):
        if reward is not None and not math.isfinite(reward):
            raise InputError(
                f"`unscorable_reward` must be a finite number, got {reward}; hosts read no other."
            )
        self._reward = reward
        self._observe = observe
        self._told: set[Cause] = set()

    @property
    def is_refused(self) -> bool:
        """Whether such a sample is refused."""
        return self._reward is None

    def reward_of(self, cause: Cause, refusal: SharpenError) -> float:
        """The reward of a sample, which is counted, and logged if it is the first of its cause.

        Raises:
            SharpenError: `refusal`, if such samples are refused.
        """
        if self._reward is None:
            raise refusal
        if self._observe is not None:
            self._observe(cause)
        if cause not in self._told:
            self._told.add(cause)
            logger.warning(
                "the reward of a sample is %g, as of all that cannot be rated; the first that is "
                "%s: %s",
                self._reward,
                cause,
                refusal,
            )
        return self._reward
