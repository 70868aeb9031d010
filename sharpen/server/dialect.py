"""Samples that no reward can be computed of: refused, or given a reward that was chosen before.

Hosts that train ask for the reward of every sample, and end where one is refused.

What every dialect of the server is: a body to jobs, and their statistics to an answer.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from sharpen.errors import InputError, SharpenError
from sharpen.models import ModelLimits
from sharpen.scoring.rewards import stats_needed
from sharpen.scoring.scores import Scores
from sharpen_kernels import TokenStats

from .batcher import Job
from .schemas import RefusedError, ServerLimits
from .text import Texts

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


Answer = Mapping[str, Any]


@dataclass(frozen=True)
class Asked:
    """A request that has been read.

    Attributes:
        jobs: What to score, checked against the model.
        answer: From the statistics of each job, in order, to the body of the answer.
    """

    jobs: list[Job]
    answer: Callable[[Sequence[TokenStats]], Answer]


@dataclass(frozen=True)
class Desk:
    """What a dialect needs to know of the server.

    Attributes:
        name: What the model is called.
        model: What ids the model accepts.
        limits: Of a request.
        texts: Reads text.
        reward: What hosts get that ask for one number.
        unscorable: What they get for a sample that cannot be rated.
    """

    name: str
    model: ModelLimits
    limits: ServerLimits
    texts: Texts
    reward: str = "logprob"
    unscorable: Unscorable = field(default_factory=Unscorable)

    def check(self, asked: Asked) -> Asked:
        """`asked`, if it is within the limits of one request.

        Raises:
            RefusedError: 413.
        """
        self.limits.check_tokens(sum(job.n_tokens for job in asked.jobs))
        return asked


def stats_of(rewards: Sequence[str], more: Sequence[str] = ()) -> tuple[str, ...]:
    """The token statistics behind some rewards, and others; the log-prob first."""
    needs = [stat for reward in rewards for stat in stats_needed(reward)]
    return tuple(dict.fromkeys(["logprob", *needs, *more]))


def scores_of(job: Job, tokens: TokenStats, valid: Sequence[bool] | None = None) -> Scores:
    """The scores of one job."""
    lengths = [[len(completion) for completion in job.completions]]
    return Scores.of(tokens, lengths, None if valid is None else [valid])


def broken(logprob: torch.Tensor) -> str | None:
    """Why the log-probs of a completion are no numbers, or None."""
    bad = (~logprob.isfinite()).nonzero().flatten().tolist()
    if not bad:
        return None
    value = logprob[bad[0]].item()
    why = "NaN in the weights, or overflow" if value != value else "masked out of the vocabulary"
    return f"the log-prob of token {bad[0]} is {value}: {why}"


def refuse_broken(name: str, logprob: torch.Tensor) -> None:
    """Refuse an answer that would hold no number.

    Raises:
        RefusedError: 422.
    """
    why = broken(logprob)
    if why is not None:
        raise RefusedError(422, f"`{name}`: {why}.", param=name, code="not_finite")
