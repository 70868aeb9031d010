"""What the routes know of the server, and what each makes of a body: jobs, and then an answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sharpen.models import ModelLimits
from sharpen.scoring.rewards import stats_needed
from sharpen.scoring.scores import Scores
from sharpen_kernels import TokenStats

from .batcher import Job
from .errors import HTTPError
from .limits import ServerLimits
from .text import Texts
from .unscorable import UnscorableReward, why_not_finite

Answer = Mapping[str, Any]


@dataclass(frozen=True)
class ParsedRequest:
    """A request that has been read and checked.

    Attributes:
        jobs: What to score, checked against the model.
        answer: From the statistics of each job, in order, to the body of the answer.
    """

    jobs: list[Job]
    answer: Callable[[Sequence[TokenStats]], Answer]


@dataclass(frozen=True)
class ServerState:
    """What a route needs to know of the server.

    Attributes:
        name: What the model is called.
        model: What ids the model accepts.
        limits: Of a request.
        texts: Reads text.
        reward: The reward of routes that answer one number per sample.
        unscorable: What they answer for a sample that has none.
    """

    name: str
    model: ModelLimits
    limits: ServerLimits
    texts: Texts
    reward: str = "logprob"
    unscorable: UnscorableReward = field(default_factory=UnscorableReward)

    def parsed(
        self, jobs: list[Job], answer: Callable[[Sequence[TokenStats]], Answer]
    ) -> ParsedRequest:
        """The request, unless it has too many tokens (413)."""
        self.limits.check_tokens(sum(job.n_tokens for job in jobs))
        return ParsedRequest(jobs, answer)


def stats_of(rewards: Sequence[str], more: Sequence[str] = ()) -> tuple[str, ...]:
    """The token statistics behind some rewards, and others; the log-prob first."""
    needs = [stat for reward in rewards for stat in stats_needed(reward)]
    return tuple(dict.fromkeys(["logprob", *needs, *more]))


def scores_of(job: Job, tokens: TokenStats, valid: Sequence[bool] | None = None) -> Scores:
    """The scores of one job."""
    lengths = [[len(completion) for completion in job.completions]]
    return Scores.of(tokens, lengths, None if valid is None else [valid])


def not_finite(logprob: torch.Tensor) -> str | None:
    """Why the log-probs of a completion are not all finite, or None if they are."""
    bad = (~logprob.isfinite()).nonzero().flatten().tolist()
    if not bad:
        return None
    value = logprob[bad[0]].item()
    return f"the log-prob of token {bad[0]} is {value}: {why_not_finite(value)}"


def reject_not_finite(name: str, logprob: torch.Tensor) -> None:
    """Reject an answer with 422 that would hold log-probs which are not finite."""
    why = not_finite(logprob)
    if why is not None:
        raise HTTPError(422, f"`{name}`: {why}.", param=name, code="not_finite")
