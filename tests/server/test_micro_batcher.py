import threading
import time

import pytest
import torch

from helpers.tiny import tiny
from sharpen.errors import InputError
from sharpen.scoring import Scorer
from sharpen.scoring.scores import Scores
from sharpen.server.batcher import Job, MicroBatcher
from sharpen.server.errors import HTTPError, http_error_of
from sharpen_kernels import TokenStats

LONG = 20.0  # seconds; nothing that a test waits for on purpose


class Recorded:
    """Scores every token with its id, and keeps what each call was given."""

    def __init__(self, fails=lambda completions: False, gate=None):
        self.calls, self.threads = [], set()
        self.fails, self.gate = fails, gate
        self.begun = threading.Event()

    def __call__(self, prompts, completions, *, stats):
        self.begun.set()
        if self.gate is not None:
            assert self.gate.wait(LONG)
        self.calls.append((prompts, completions, stats))
        self.threads.add(threading.get_ident())
        flat = [float(x) for group in completions for c in group for x in c]
        if any(map(self.fails, [c for group in completions for c in group])):
            raise RuntimeError("poisoned")
        lengths = [[len(c) for c in group] for group in completions]
        return Scores.of(TokenStats(logprob=torch.tensor(flat)), lengths)


def values(ticket):
    return [tokens.logprob.tolist() for tokens in ticket.future.result(timeout=LONG)]


def busy(batcher, score):
    """Keeps the thread inside a call, so that what comes next has to queue."""
    ticket = batcher.submit([Job([0], [[0]])])
    assert score.begun.wait(LONG)
    return ticket


def test_requests_of_one_prompt_are_one_call_and_stand_together():
    score = Recorded()
    batcher = MicroBatcher(score)
    tickets = [batcher.submit([Job([1, 2], [[i], [i, i]])]) for i in range(2)]
    other = batcher.submit([Job([9], [[7]])])
    tickets += [batcher.submit([Job([1, 2], [[i], [i, i]])]) for i in range(2, 5)]
    with batcher:
        assert [values(t) for t in tickets] == [[[i, i, i]] for i in map(float, range(5))]
        assert values(other) == [[7.0]]
    ((prompts, completions, _),) = score.calls
    # neighbours, which the scorer reads as one
    assert prompts == [[1, 2]] * 5 + [[9]]
    assert completions == [[[i], [i, i]] for i in range(5)] + [[[7]]]


def test_a_batch_has_the_bits_of_the_scorer_alone():
    scorer = Scorer(tiny())
    batcher = MicroBatcher(Scorer(tiny()).score)
    tickets = [batcher.submit([Job([5, 6, 7], [[i, i + 1]])]) for i in range(6)]
    want = scorer.score([[5, 6, 7]], [[[i, i + 1] for i in range(6)]]).tokens.logprob
    with batcher:
        got = torch.cat([t.future.result(timeout=LONG)[0].logprob for t in tickets])
    assert torch.equal(got, want)


def test_one_thread_owns_the_scorer():
    score = Recorded()
    with MicroBatcher(score, wait_seconds=0.0) as batcher:
        threads = [
            threading.Thread(target=lambda: values(batcher.submit([Job([1], [[2]])])))
            for _ in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(score.threads) == 1
    assert threading.get_ident() not in score.threads


def test_a_job_that_fails_is_told_and_the_others_are_answered():
    score = Recorded(fails=lambda c: c == [13])
    batcher = MicroBatcher(score)
    good = [batcher.submit([Job([i % 3], [[i]])]) for i in range(9)]
    bad = batcher.submit([Job([1], [[13]])])
    with batcher:
        assert [values(t) for t in good] == [[[float(i)]] for i in range(9)]
        with pytest.raises(RuntimeError, match="poisoned"):
            values(bad)
        # and the thread goes on
        assert values(batcher.submit([Job([1], [[2]])])) == [[2.0]]


def test_a_request_of_many_jobs_is_answered_in_its_order():
    with MicroBatcher(Recorded(), max_tokens=3) as batcher:
        jobs = [Job([i % 2], [[10 * i]]) for i in range(7)]
        assert values(batcher.submit(jobs)) == [[10.0 * i] for i in range(7)]
        assert values(batcher.submit([])) == []


def test_what_waits_is_bounded_and_the_refusal_says_when_to_come_back():
    score = Recorded(gate=threading.Event())
    with MicroBatcher(score, max_queue=2, wait_seconds=0.0) as batcher:
        first = busy(batcher, score)
        kept = [batcher.submit([Job([1], [[i]])]) for i in range(2)]
        with pytest.raises(HTTPError, match="2 prompts wait already, of at most 2") as refused:
            batcher.submit([Job([1], [[5]])])
        assert refused.value.status == 429
        assert int(refused.value.headers["Retry-After"]) >= 1
        score.gate.set()
        assert [values(t) for t in (first, *kept)] == [[[0.0]], [[0.0]], [[1.0]]]
        assert values(batcher.submit([Job([1], [[5]])])) == [[5.0]]


def test_a_request_of_many_jobs_cannot_overshoot_the_bound():
    score = Recorded(gate=threading.Event())
    with MicroBatcher(score, max_queue=3, wait_seconds=0.0) as batcher:
        first = busy(batcher, score)
        # nothing waits, so that more than the bound gets in, or it never would
        large = batcher.submit([Job([1], [[i]]) for i in range(4)])
        with pytest.raises(HTTPError, match="4 prompts wait already, of at most 3, and"):
            batcher.submit([Job([1], [[5]])])
        batcher.abandon(large)
        kept = batcher.submit([Job([1], [[6]]), Job([1], [[7]])])
        with pytest.raises(HTTPError, match="2 prompts wait already, of at most 3, and"):
            batcher.submit([Job([1], [[8]]), Job([1], [[9]])])
        last = batcher.submit([Job([1], [[8]])])
        assert batcher.n_waiting == 3
        score.gate.set()
        assert [values(t) for t in (first, kept, last)] == [[[0.0]], [[6.0], [7.0]], [[8.0]]]


def test_what_nobody_waits_for_is_never_scored():
    score = Recorded(gate=threading.Event())
    with MicroBatcher(score, wait_seconds=0.0) as batcher:
        first = busy(batcher, score)
        gone = batcher.submit([Job([1], [[7]]), Job([2], [[8]])])
        kept = batcher.submit([Job([1], [[9]])])
        batcher.abandon(gone)
        assert batcher.n_waiting == 1
        score.gate.set()
        assert values(first) == [[0.0]]
        assert values(kept) == [[9.0]]
    assert [completions for _, completions, _ in score.calls] == [[[[0]]], [[[9]]]]
    assert gone.future.cancelled()


def test_the_rest_of_a_request_that_failed_is_not_scored():
    score = Recorded(fails=lambda c: c == [13])
    batcher = MicroBatcher(score, max_tokens=2, wait_seconds=0.0)
    bad = batcher.submit([Job([1], [[13]]), Job([2], [[8]])])
    with batcher, pytest.raises(RuntimeError, match="poisoned"):
        values(bad)
    assert len(score.calls) == 1


def test_closing_answers_what_was_accepted_and_takes_no_more():
    score = Recorded()
    batcher = MicroBatcher(score, wait_seconds=LONG)
    tickets = [batcher.submit([Job([1], [[i]])]) for i in range(3)]
    batcher.start()
    begun = time.monotonic()
    batcher.close()
    assert time.monotonic() - begun < LONG / 2
    assert [values(t) for t in tickets] == [[[0.0]], [[1.0]], [[2.0]]]
    assert not batcher.is_alive
    with pytest.raises(HTTPError, match="shutting down") as refused:
        batcher.submit([Job([1], [[2]])])
    assert refused.value.status == 503


def test_closing_at_once_refuses_what_waits():
    score = Recorded(gate=threading.Event())
    batcher = MicroBatcher(score, wait_seconds=0.0)
    batcher.start()
    first = busy(batcher, score)
    waits = batcher.submit([Job([1], [[5]])])
    threading.Timer(0.05, score.gate.set).start()
    batcher.close(drop=True)
    assert values(first) == [[0.0]]
    with pytest.raises(HTTPError, match="shutting down"):
        values(waits)


def test_a_full_batch_does_not_wait_for_company():
    with MicroBatcher(Recorded(), max_tokens=4, wait_seconds=LONG) as batcher:
        assert values(batcher.submit([Job([1, 2], [[3, 4]])])) == [[3.0, 4.0]]


def test_every_statistic_that_some_job_wants_is_computed_once():
    score = Recorded()
    batcher = MicroBatcher(score)
    batcher.submit([Job([1], [[2]], ("logprob", "entropy"))])
    batcher.submit([Job([1], [[2]], ("logprob", "margin"))])
    with batcher:
        pass
    assert [stats for *_, stats in score.calls] == [["entropy", "logprob", "margin"]]


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (InputError("`a` must be b."), 422, "`a` must be b."),
        (RuntimeError("CUDA out of memory. Tried"), 413, "more memory"),
        (ZeroDivisionError("x"), 500, "scoring failed (ZeroDivisionError: x)"),
        (HTTPError(429, "later"), 429, "later"),
    ],
)
def test_errors_have_the_status_that_clients_act_on(error, status, told):
    refusal = http_error_of(error)
    assert refusal.status == status
    assert told in refusal.body["error"]["message"]


# that the thread ends is the point
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_has_ended():
    def ends(*args, **kwargs):
        raise SystemExit

    batcher = MicroBatcher(ends, max_tokens=1)
    # one is taken by the thread, the other still queued
    tickets = [batcher.submit([Job([1], [[2]])]) for _ in range(2)]
    batcher.start()
    for ticket in tickets:
        with pytest.raises(HTTPError, match="shutting down"):
            ticket.future.result(timeout=LONG)
    with pytest.raises(HTTPError, match="shutting down"):
        batcher.submit([Job([1], [[2]])])
    batcher.close()
    assert not batcher.is_alive
