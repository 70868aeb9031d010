"""Concurrent calls of one completion each, rated together: grouped by prompt, in one thread.

Hosts that ask for one reward at a time ask for many at once. Calls that arrive within a short wait,
or while a batch is being rated, make the next batch; completions of one prompt stand together, so
that the prompt is read once. A call that cannot be rated fails alone: its batch is halved until it
is found.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from sharpen.errors import ServiceError

from .unscorable import Rated

Ids = tuple[int, ...]
# prompts, completions of each -> rewards of each, or why there is none
Rate = Callable[[list[list[int]], list[list[list[int]]]], list[list[Rated]]]


@dataclass(frozen=True, eq=False)
class Call:
    """One completion that waits for its reward."""

    prompt: Ids
    completion: Ids
    future: "asyncio.Future[Rated]"


class MicroBatches:
    """Rates single completions in batches; for one event loop.

    Args:
        rate: Rates completions of several prompts; called from one thread of its own, never twice
            at a time.
        wait_s: How long the first call of a batch waits for others.
        max_calls: Most calls in a batch.
    """

    def __init__(self, rate: Rate, *, wait_s: float = 0.01, max_calls: int = 1024):
        self._rate = rate
        self._wait_s = wait_s
        self._max_calls = max_calls
        self._pending: list[Call] = []
        self._runner: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sharpen-rate")

    async def reward(self, prompt: Sequence[int], completion: Sequence[int]) -> Rated:
        """The reward of one completion, or why it has none.

        Raises:
            Exception: Whatever rating it alone raises.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Rated] = loop.create_future()
        self._pending.append(Call(tuple(prompt), tuple(completion), future))
        if self._runner is None or self._runner.done():
            self._runner = loop.create_task(self._run())
        return await future

    async def _run(self) -> None:
        while self._pending:
            await asyncio.sleep(self._wait_s)
            # a caller that was cancelled wants nothing any more
            waiting = [call for call in self._pending if not call.future.done()]
            batch, self._pending = waiting[: self._max_calls], waiting[self._max_calls :]
            if batch:
                await self._answer(batch)

    async def _answer(self, batch: list[Call]) -> None:
        groups: dict[Ids, list[Call]] = {}
        for call in batch:
            groups.setdefault(call.prompt, []).append(call)
        prompts = [list(prompt) for prompt in groups]
        completions = [[list(call.completion) for call in calls] for calls in groups.values()]
        loop = asyncio.get_running_loop()
        try:
            rewards = await loop.run_in_executor(self._thread, self._rate, prompts, completions)
        except Exception as error:
            # a server that is away is away for all of them
            if len(batch) == 1 or isinstance(error, ServiceError):
                for call in batch:
                    _fail(call, error)
                return
            half = len(batch) // 2
            await self._answer(batch[:half])
            await self._answer(batch[half:])
            return
        for calls, values in zip(groups.values(), rewards, strict=True):
            for call, value in zip(calls, values, strict=True):
                if not call.future.done():
                    call.future.set_result(value)


def _fail(call: Call, error: Exception) -> None:
    if not call.future.done():
        call.future.set_exception(error)
