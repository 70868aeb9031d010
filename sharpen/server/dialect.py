"""What every dialect of the server is: a body to jobs, and their statistics to an answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sharpen.limits import ModelLimits
from sharpen.scoring.rewards import stats_needed
from sharpen.scoring.scores import Scores
from sharpen_kernels import TokenStats

from .jobs import Job
from .limits import ServerLimits
from .refusal import RefusedError
from .texts import Texts
from .unscorable import Unscorable

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
