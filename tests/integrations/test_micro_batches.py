"""Concurrent single calls: one batch, each its own answer, the poisoned one alone."""

import asyncio
import threading

import pytest

from sharpen.errors import InputError, ServiceError
from sharpen.integrations.reward_model import reward_batcher, reward_of


class Rater:
    """The sum of a completion's ids, plus a hundred times the prompt's; 13 is poison."""

    def __init__(self, release=None):
        self.calls, self.threads = [], set()
        self.release = release
        self.error = InputError("13 is not rated")

    def __call__(self, prompts, completions):
        self.threads.add(threading.get_ident())
        self.calls.append((prompts, completions))
        if self.release is not None:
            assert self.release.wait(10)
        if any(13 in ids for group in completions for ids in group):
            raise self.error
        return [
            [100.0 * sum(prompt) + sum(ids) for ids in group]
            for prompt, group in zip(prompts, completions, strict=True)
        ]


def batcher(rater, wait_seconds=0.01):
    return reward_batcher(rater, wait_seconds=wait_seconds)


def gather(batches, calls):
    async def run():
        tasks = [asyncio.ensure_future(reward_of(batches, p, c)) for p, c in calls]
        return await asyncio.gather(*tasks, return_exceptions=True)

    return asyncio.run(run())


def test_calls_are_one_batch_with_a_prompts_together_and_answered_in_place():
    rater = Rater()
    calls = [([p], [c, c]) for c in range(1, 6) for p in (1, 2, 3)]
    assert gather(batcher(rater), calls) == [100.0 * p[0] + sum(c) for p, c in calls]
    assert len(rater.calls) == 1
    prompts, completions = rater.calls[0]
    # neighbours, which the scorer reads as one
    assert prompts == [[p] for p in (1, 2, 3) for _ in range(5)]
    assert completions == [[[c, c]] for c in range(1, 6)] * 3
    assert rater.threads.isdisjoint({threading.get_ident()})


def test_what_arrives_during_a_forward_is_the_next_batch():
    release = threading.Event()
    rater = Rater(release)
    batches = batcher(rater, wait_seconds=0.0)

    async def run():
        first = asyncio.ensure_future(reward_of(batches, [1], [1]))
        while not rater.calls:
            await asyncio.sleep(0.001)
        later = [asyncio.ensure_future(reward_of(batches, [1], [c])) for c in (2, 3)]
        await asyncio.sleep(0.01)
        release.set()
        return [await first, *[await call for call in later]]

    assert asyncio.run(run()) == [101.0, 102.0, 103.0]
    assert [c for _, c in rater.calls] == [[[[1]]], [[[2]], [[3]]]]
    assert len(rater.threads) == 1


def test_a_poisoned_call_fails_alone():
    rater = Rater()
    calls = [([p], [c]) for p in (1, 2) for c in (11, 12, 13, 14)]
    found = gather(batcher(rater), calls)
    for (prompt, ids), answer in zip(calls, found, strict=True):
        if ids == [13]:
            assert answer is rater.error
        else:
            assert answer == 100.0 * prompt[0] + ids[0]
    # halved, not one by one
    assert len(rater.calls) <= 2 * 2 * 4


def test_a_server_that_is_away_is_asked_once():
    rater = Rater()
    rater.error = ServiceError("away")
    found = gather(batcher(rater), [([1], [c]) for c in (11, 12, 13, 14)])
    assert found == [rater.error] * 4
    assert len(rater.calls) == 1


def test_a_cancelled_call_does_not_hold_up_the_others():
    rater = Rater()
    batches = batcher(rater, wait_seconds=0.02)

    async def run():
        calls = [asyncio.ensure_future(reward_of(batches, [1], [c])) for c in (1, 13, 3)]
        await asyncio.sleep(0)
        calls[1].cancel()
        return await asyncio.gather(*calls, return_exceptions=True)

    first, second, third = asyncio.run(run())
    assert (first, third) == (101.0, 103.0)
    assert isinstance(second, asyncio.CancelledError)
    assert len(rater.calls) == 1


def test_it_goes_on_after_a_pause():
    rater = Rater()
    batches = batcher(rater)

    async def run():
        first = await reward_of(batches, [1], [1])
        await asyncio.sleep(0.03)
        return first, await reward_of(batches, [1], [2])

    assert asyncio.run(run()) == (101.0, 102.0)
    assert len(rater.calls) == 2


@pytest.mark.parametrize("n", [0, 1])
def test_few_calls(n):
    assert gather(batcher(Rater()), [([1], [2])] * n) == [102.0] * n
