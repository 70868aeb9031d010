"""Dynamic micro-batching: one thread that owns a scorer, and a bounded queue before it.

A job waits until nothing new has come for `wait_seconds`, until it has waited `LONGEST` times that,
or until the queue fills a batch; behind a busy scorer jobs gather by themselves. A batch is one
call of the scorer with the jobs regrouped by prompt. If the call fails, its jobs are tried again
in halves, so that only a job that fails alone is told so.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sharpen_kernels import TokenStats

from .calls import Batch, Score, called
from .jobs import Job, choose
from .refusal import RefusedError, shutting_down
from .tickets import Ticket

logger = logging.getLogger(__name__)

LONGEST = 10
MAX_RETRY_AFTER = 60


@dataclass(frozen=True, eq=False)
class _Item:
    job: Job
    ticket: Ticket
    index: int
    arrived: float


class MicroBatcher:
    """Scores the jobs of many threads, or of an event loop, in one thread.

    Args:
        score: `Scorer.score`; called by one thread alone.
        max_tokens: Tokens of one call, each prompt counted once; a larger job goes alone.
        max_queue: Jobs that may wait; those of one request may be more while no other waits.
        wait_seconds: How long the newest job waits for company.
        observe: Called by the thread after each call.

    Example:
        >>> from sharpen.scoring import Scorer
        >>> with MicroBatcher(Scorer("game24").score) as batcher:
        ...     (tokens,) = batcher.submit([Job([1, 5], [[7, 2], [8]])]).future.result()
        >>> tokens.logprob.shape
        torch.Size([3])
    """

    def __init__(
        self,
        score: Score,
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
        self._observe = observe
        self._changed = threading.Condition()
        self._waiting: deque[_Item] = deque()
        self._n_waiting_tokens = 0
        self._is_closing = False
        self._tokens_per_second = 0.0
        self._thread = threading.Thread(target=self._run, name="sharpen-scorer", daemon=True)

    def __enter__(self) -> "MicroBatcher":
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
    def is_closing(self) -> bool:
        """Whether it takes no more."""
        return self._is_closing

    @property
    def n_waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._waiting)

    def submit(self, jobs: Sequence[Job]) -> Ticket:
        """Queue the jobs of one request, all or none. Safe from any thread.

        Raises:
            RefusedError: 429 with `retry_after` if the queue is full, 503 once it is closed.
        """
        ticket = Ticket(len(jobs), [None] * len(jobs))
        if not jobs:
            ticket.future.set_result([])
            return ticket
        now = time.monotonic()
        items = [_Item(job, ticket, i, now) for i, job in enumerate(jobs)]
        with self._changed:
            if self._is_closing:
                raise shutting_down()
            # more than the bound alone is let in while nothing waits, or it never would be
            if self._waiting and len(self._waiting) + len(jobs) > self.max_queue:
                raise RefusedError(
                    429,
                    f"{len(self._waiting)} prompts wait already, of at most {self.max_queue}, and "
                    f"the request has {len(jobs)}; send it again later.",
                    code="queue_full",
                    retry_after=self._retry_after(),
                )
            self._add(items)
            self._changed.notify()
        return ticket

    def abandon(self, ticket: Ticket) -> None:
        """Nobody waits for it any more: what is still queued of it is never scored."""
        with self._changed:
            ticket.is_abandoned = True
            self._keep([item for item in self._waiting if item.ticket is not ticket])
        ticket.future.cancel()

    def close(self, *, drop: bool = False) -> None:
        """Take no more, finish what waits, or refuse it if `drop`, and end the thread."""
        dropped: list[_Item] = []
        with self._changed:
            self._is_closing = True
            if drop:
                dropped = list(self._waiting)
                self._keep([])
            self._changed.notify_all()
        _refuse(dropped)
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        items: list[_Item] = []
        try:
            while items := self._next():
                self._work(items)
        finally:
            # nobody may wait for a thread that has ended
            with self._changed:
                self._is_closing = True
                dropped = [*items, *self._waiting]
                self._keep([])
            _refuse(dropped)

    def _next(self) -> list[_Item]:
        """The next batch; empty at the end."""
        with self._changed:
            queue: list[_Item] = []
            while not queue and not (self._is_closing and not self._waiting):
                while (seconds := self._seconds_to_wait()) != 0:
                    self._changed.wait(seconds)
                # the rest of a request that has failed
                queue = [item for item in self._waiting if not item.ticket.is_abandoned]
                self._keep(queue)
            chosen = choose([item.job for item in queue], self.max_tokens)
            taken = set(chosen)
            self._keep([item for i, item in enumerate(queue) if i not in taken])
            return [queue[i] for i in chosen]

    def _seconds_to_wait(self) -> float | None:
        """0 to go on, None to sleep until something comes."""
        if self._is_closing:
            return 0.0
        if not self._waiting:
            return None
        if self._n_waiting_tokens >= self.max_tokens:
            return 0.0
        newest, oldest = self._waiting[-1].arrived, self._waiting[0].arrived
        until = min(newest + self.wait_seconds, oldest + LONGEST * self.wait_seconds)
        return max(0.0, until - time.monotonic())

    def _keep(self, items: list[_Item]) -> None:
        self._waiting.clear()
        self._n_waiting_tokens = 0
        self._add(items)

    def _add(self, items: list[_Item]) -> None:
        for item in items:
            last = self._waiting[-1].job if self._waiting else None
            self._n_waiting_tokens += item.job.n_after(last)
            self._waiting.append(item)

    def _work(self, items: Sequence[_Item]) -> None:
        try:
            results = self._call([item.job for item in items])
        # whatever it is, the thread must outlive it, and the other jobs must not pay for it
        except Exception as error:
            if len(items) == 1:
                logger.warning("a job cannot be scored: %s", error)
                items[0].ticket.fail(error)
                return
            middle = len(items) // 2
            halves = items[:middle], items[middle:]
        else:
            for item, tokens in zip(items, results, strict=True):
                item.ticket.deliver(item.index, tokens)
            return
        # outside the handler, whose error would keep the tensors of the call alive
        for half in halves:
            self._work(half)

    def _call(self, jobs: Sequence[Job]) -> list[TokenStats]:
        results, batch = called(self._score, jobs)
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


def _refuse(items: Sequence[_Item]) -> None:
    for item in items:
        item.ticket.fail(shutting_down())
