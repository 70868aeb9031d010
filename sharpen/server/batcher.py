"""Dynamic micro-batching: one thread that owns a scorer, and a bounded queue before it.

A job is a prompt with completions to score; the jobs of one request are queued together, and their
results are promised by one future. A job waits until nothing new has come for `wait_seconds`,
until it has waited `MAX_WAITS` times that, or until the queue fills a batch; behind a busy scorer
jobs gather by themselves. A batch is one call of the scorer, in which jobs of a prompt stand
together, so that the prompt is read once. If the call fails, its jobs are tried again in halves: a
job that cannot be scored fails alone.
"""

import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np

from sharpen.errors import ServiceError
from sharpen.scoring.scores import Scores
from sharpen_kernels import TokenStats

from .errors import HTTPError, shutting_down

logger = logging.getLogger(__name__)

MAX_WAITS = 10
MAX_RETRY_AFTER = 60  # seconds


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


def split(scores: Scores, jobs: Sequence[Job]) -> list[TokenStats]:
    """The token statistics of each job, from the scores of all of them."""
    columns: dict[str, Any] = {k: x for k, x in vars(scores.tokens).items() if x is not None}
    found, start = [], 0
    for job in jobs:
        stop = start + job.n_own
        found.append(TokenStats(**{name: x[start:stop] for name, x in columns.items()}))
        start = stop
    return found


@dataclass(frozen=True)
class Batch:
    """One call of the scorer: what it read, a prompt of several jobs once, and how long it took."""

    n_jobs: int
    n_prompts: int
    n_completions: int
    n_tokens: int
    seconds: float


Result = TypeVar("Result")


@dataclass(eq=False)
class PendingRequest(Generic[Result]):
    """The jobs of one request, and the promise of their results in the same order."""

    n_jobs: int
    results: dict[int, Result] = field(default_factory=dict)
    future: "Future[list[Result]]" = field(default_factory=Future)
    is_abandoned: bool = False

    def deliver(self, index: int, result: Result) -> None:
        """One job is done."""
        self.results[index] = result
        if len(self.results) == self.n_jobs:
            with contextlib.suppress(InvalidStateError):
                self.future.set_result([self.results[i] for i in range(self.n_jobs)])

    def fail(self, error: Exception) -> None:
        """One job cannot be done, so the request cannot."""
        self.is_abandoned = True
        # a second failure, or nobody waits any more
        with contextlib.suppress(InvalidStateError):
            # a traceback would keep the tensors of the call alive
            self.future.set_exception(error.with_traceback(None))


@dataclass(frozen=True, eq=False)
class _Item(Generic[Result]):
    job: Job
    request: PendingRequest[Result]
    index: int
    arrived: float


class MicroBatcher(Generic[Result]):
    """Scores the jobs of many threads, or of an event loop, in one thread.

    Args:
        score: `Scorer.score`, or what takes the same arguments; called by one thread alone.
        split: What `score` returns to one result per job.
        max_tokens: Tokens of one call, each prompt counted once; a larger job goes alone.
        max_queue: Jobs that may wait; those of one request may be more while no other waits.
        wait_seconds: How long the newest job waits for company.
        observe: Called by the thread after each call.

    Attributes:
        is_closing: Whether it takes no more.

    Example:
        >>> from sharpen.scoring import Scorer
        >>> with MicroBatcher(Scorer("game24").score) as batcher:
        ...     (tokens,) = batcher.submit([Job([1, 5], [[7, 2], [8]])]).future.result()
        >>> tokens.logprob.shape
        torch.Size([3])
    """

    def __init__(
        self,
        score: Callable[..., Any],
        split: Callable[[Any, Sequence[Job]], Sequence[Any]] = split,
        *,
        max_tokens: int = 16384,
        max_queue: int = 1024,
        wait_seconds: float = 0.005,
        observe: Callable[[Batch], None] | None = None,
    ):
        self.max_tokens = max_tokens
        self.max_queue = max_queue
        self.wait_seconds = wait_seconds
        self._score = score
        self._split = split
        self._observe = observe
        self._changed = threading.Condition()
        self._waiting: deque[_Item[Result]] = deque()
        self._n_waiting_tokens = 0
        self.is_closing = False
        self._tokens_per_second = 0.0
        self._thread = threading.Thread(target=self._run, name="sharpen-scorer", daemon=True)

    def __enter__(self) -> "MicroBatcher[Result]":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Begin to score."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def n_waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._waiting)

    def submit(self, jobs: Sequence[Job]) -> PendingRequest[Result]:
        """Queue the jobs of one request, all or none. Safe from any thread.

        Raises:
            HTTPError: 429 with `retry_after` if the queue is full, 503 once it is closed.
        """
        request: PendingRequest[Result] = PendingRequest(len(jobs))
        if not jobs:
            request.future.set_result([])
            return request
        now = time.monotonic()
        items = [_Item(job, request, i, now) for i, job in enumerate(jobs)]
        with self._changed:
            if self.is_closing:
                raise shutting_down()
            # more than the bound alone is let in while nothing waits, or it never would be
            if self._waiting and len(self._waiting) + len(jobs) > self.max_queue:
                raise HTTPError(
                    429,
                    f"{len(self._waiting)} prompts wait already, of at most {self.max_queue}, and "
                    f"the request has {len(jobs)}; send it again later.",
                    code="queue_full",
                    retry_after=self._retry_after(),
                )
            self._add(items)
            self._changed.notify()
        return request

    def abandon(self, request: PendingRequest[Result]) -> None:
        """Nobody waits for it any more: what is still queued of it is never scored."""
        with self._changed:
            request.is_abandoned = True
            self._keep([item for item in self._waiting if item.request is not request])
        request.future.cancel()

    def close(self, *, drop: bool = False) -> None:
        """Take no more, finish what waits, or reject it if `drop`, and end the thread."""
        dropped: list[_Item[Result]] = []
        with self._changed:
            self.is_closing = True
            if drop:
                dropped = list(self._waiting)
                self._keep([])
            self._changed.notify_all()
        _reject(dropped)
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        items: list[_Item[Result]] = []
        try:
            while items := self._next():
                self._work(items)
        finally:
            # nobody may wait for a thread that has ended
            with self._changed:
                self.is_closing = True
                dropped = [*items, *self._waiting]
                self._keep([])
            _reject(dropped)

    def _next(self) -> list[_Item[Result]]:
        """The next batch; empty at the end."""
        with self._changed:
            queue: list[_Item[Result]] = []
            while not queue and not (self.is_closing and not self._waiting):
                while (seconds := self._seconds_to_wait()) != 0:
                    self._changed.wait(seconds)
                # the rest of a request that has failed
                queue = [item for item in self._waiting if not item.request.is_abandoned]
                self._keep(queue)
            chosen = choose([item.job for item in queue], self.max_tokens)
            taken = set(chosen)
            self._keep([item for i, item in enumerate(queue) if i not in taken])
            return [queue[i] for i in chosen]

    def _seconds_to_wait(self) -> float | None:
        """0 to go on, None to sleep until something comes."""
        if self.is_closing:
            return 0.0
        if not self._waiting:
            return None
        if self._n_waiting_tokens >= self.max_tokens:
            return 0.0
        newest, oldest = self._waiting[-1].arrived, self._waiting[0].arrived
        until = min(newest + self.wait_seconds, oldest + MAX_WAITS * self.wait_seconds)
        return max(0.0, until - time.monotonic())

    def _keep(self, items: list[_Item[Result]]) -> None:
        self._waiting.clear()
        self._n_waiting_tokens = 0
        self._add(items)

    def _add(self, items: list[_Item[Result]]) -> None:
        for item in items:
            last = self._waiting[-1].job if self._waiting else None
            self._n_waiting_tokens += item.job.n_after(last)
            self._waiting.append(item)

    def _work(self, items: Sequence[_Item[Result]]) -> None:
        try:
            results = self._call([item.job for item in items])
        # whatever it is, the thread must outlive it, and the other jobs must not pay for it
        except Exception as error:
            # a server that is away is away for all of them
            if len(items) == 1 or isinstance(error, ServiceError):
                logger.warning("%d jobs cannot be scored: %s", len(items), error)
                for item in items:
                    item.request.fail(error)
                return
            middle = len(items) // 2
            halves = items[:middle], items[middle:]
        else:
            for item, result in zip(items, results, strict=True):
                item.request.deliver(item.index, result)
            return
        # outside the handler, whose error would keep the tensors of the call alive
        for half in halves:
            self._work(half)

    def _call(self, jobs: Sequence[Job]) -> Sequence[Result]:
        """The result of each job, from one call over all."""
        begun = time.monotonic()
        # in an order that does not depend on who came first
        stats = sorted({name for job in jobs for name in job.stats})
        prompts = [job.prompt for job in jobs]
        scores = self._score(prompts, [job.completions for job in jobs], stats=stats)
        results = self._split(scores, jobs)
        n_tokens_of = {job.key: len(job.prompt) for job in jobs}
        batch = Batch(
            n_jobs=len(jobs),
            n_prompts=len(n_tokens_of),
            n_completions=sum(len(job.completions) for job in jobs),
            n_tokens=sum(n_tokens_of.values()) + sum(job.n_own for job in jobs),
            seconds=time.monotonic() - begun,
        )
        self._tokens_per_second = batch.n_tokens / max(batch.seconds, 1e-9)
        if self._observe is not None:
            self._observe(batch)
        return results

    def _retry_after(self) -> int:
        """Whole seconds until half of the queue is gone, at the speed of the last call."""
        if not self._tokens_per_second:
            return 1
        seconds = self._n_waiting_tokens / 2 / self._tokens_per_second
        return min(MAX_RETRY_AFTER, max(1, math.ceil(seconds)))


def _reject(items: Sequence[_Item[Any]]) -> None:
    for item in items:
        item.request.fail(shutting_down())
