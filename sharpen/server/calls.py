"""One call of a scorer for many jobs, and what it was."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from sharpen.scoring.scores import Scores
from sharpen_kernels import TokenStats

from .jobs import Job, parted, regroup


@runtime_checkable
class Score(Protocol):
    """What the thread calls: `Scorer.score`."""

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[Sequence[int]]],
        *,
        stats: Sequence[str],
    ) -> Scores:
        """Scores of every completion of every prompt."""
        ...


@dataclass(frozen=True)
class Batch:
    """What one call of the scorer was."""

    n_jobs: int
    n_prompts: int
    n_completions: int
    n_tokens: int
    seconds: float


def called(score: Score, jobs: Sequence[Job]) -> tuple[list[TokenStats], Batch]:
    """The statistics of each job, from one call over all, and what the call was."""
    begun = time.monotonic()
    prompts, completions, spans = regroup(jobs)
    # in an order that does not depend on who came first
    stats = sorted({name for job in jobs for name in job.stats})
    results = parted(score(prompts, completions, stats=stats), spans)
    return results, Batch(
        n_jobs=len(jobs),
        n_prompts=len(prompts),
        n_completions=sum(map(len, completions)),
        n_tokens=sum(map(len, prompts)) + sum(job.n_own for job in jobs),
        seconds=time.monotonic() - begun,
    )
