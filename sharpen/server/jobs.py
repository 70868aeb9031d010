"""Jobs: a prompt with completions to score; many jobs to one call of a scorer and back."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sharpen.scoring.scores import Scores
from sharpen_kernels import TokenStats

Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Job:
    """One prompt, some of its completions, and what is asked of their tokens.

    Attributes:
        prompt: Token ids, at least one.
        completions: Token ids of each completion.
        stats: Names of `TokenStats`, "logprob" among them.
    """

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]
    stats: tuple[str, ...] = ("logprob",)

    @cached_property
    def key(self) -> bytes:
        """Equal for equal prompts; bytes remember their hash, tuples do not."""
        return np.fromiter(self.prompt, np.int64, len(self.prompt)).tobytes()

    @cached_property
    def n_own(self) -> int:
        """Tokens of the completions."""
        return sum(map(len, self.completions))

    @property
    def n_tokens(self) -> int:
        """Tokens that a forward of this job alone reads, the prompt once."""
        return len(self.prompt) + self.n_own

    def n_after(self, other: "Job | None") -> int:
        """Tokens that this job adds to a batch which `other` is in, about.

        Its own, the prompt if that is another one, and not what its first completion begins with
        if that of `other` does too: whole texts are completions of their first token here.
        """
        if other is None or other.key != self.key:
            return self.n_tokens
        n = min(len(self._first), len(other._first))
        differs = self._first[:n] != other._first[:n]
        return self.n_own - (int(differs.argmax()) if differs.any() else n)

    @cached_property
    def _first(self) -> np.ndarray:
        first = self.completions[0] if self.completions else ()
        return np.fromiter(first, np.int64, len(first))


def choose(jobs: Sequence[Job], max_tokens: int) -> list[int]:
    """Indices of the jobs of the next micro-batch: the oldest, its prompt's, the next oldest.

    Jobs of a prompt stand together and count its tokens once. The oldest job is always among
    them, whatever its size, so none waits for ever.

    Args:
        jobs: That wait, oldest first.
        max_tokens: What the chosen ones may have together; one alone may have more.

    Example:
        >>> a, b, c = Job([1, 2], [[3]]), Job([5], [[6]]), Job([1, 2], [[4, 4]])
        >>> choose([a, b, c], max_tokens=6), choose([a, b, c], max_tokens=7)
        ([0, 2], [0, 2, 1])
    """
    of_prompt: dict[bytes, list[int]] = {}
    for i, job in enumerate(jobs):
        of_prompt.setdefault(job.key, []).append(i)
    chosen: list[int] = []
    left = max_tokens
    for members in of_prompt.values():
        previous: Job | None = None
        for i in members:
            left -= jobs[i].n_after(previous)
            # a later, smaller one must not overtake for ever
            if chosen and left < 0:
                return chosen
            chosen.append(i)
            previous = jobs[i]
    return chosen


def regroup(
    jobs: Sequence[Job],
) -> tuple[list[Sequence[int]], list[list[Sequence[int]]], list[Span]]:
    """Prompts, each once, their completions, and which completions are those of each job.

    Returns:
        Prompts and completions as `Scorer.score` takes them, and of each job the range of its
        completions among all of them, end to end.

    Example:
        >>> regroup([Job([1], [[2]]), Job([5], [[6]]), Job([1], [[3], [4]])])
        ([[1], [5]], [[[2], [3], [4]], [[6]]], [(0, 1), (3, 4), (1, 3)])
    """
    group_of: dict[bytes, int] = {}
    prompts: list[Sequence[int]] = []
    completions: list[list[Sequence[int]]] = []
    places: list[tuple[int, int]] = []
    for job in jobs:
        group = group_of.setdefault(job.key, len(prompts))
        if group == len(prompts):
            prompts.append(job.prompt)
            completions.append([])
        places.append((group, len(completions[group])))
        completions[group].extend(job.completions)
    starts = np.cumsum([0, *map(len, completions)]).tolist()
    spans = [
        (starts[group] + at, starts[group] + at + len(job.completions))
        for job, (group, at) in zip(jobs, places, strict=True)
    ]
    return prompts, completions, spans


def parted(scores: Scores, spans: Sequence[Span]) -> list[TokenStats]:
    """The token statistics of each range of completions."""
    offsets = scores.offsets.tolist()
    columns: dict[str, Any] = {k: x for k, x in vars(scores.tokens).items() if x is not None}
    return [
        TokenStats(**{name: x[offsets[a] : offsets[b]] for name, x in columns.items()})
        for a, b in spans
    ]
