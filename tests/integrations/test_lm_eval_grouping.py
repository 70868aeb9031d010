"""Requests cut, ordered and dealt out: each once, whatever their order."""

import random
from itertools import groupby, pairwise

import pytest

from sharpen.errors import InputError
from sharpen.integrations.lm_eval.grouping import chunks, fitted


@pytest.mark.parametrize(
    ("context", "length", "kept"),
    [
        # 4 + 3 tokens, of which the last is not read
        (4, 6, 4),
        (4, 5, 3),
        (9, 3, 1),
    ],
)
def test_a_context_keeps_the_end_that_fits(context, length, kept):
    ids = list(range(context))
    assert fitted("r", ids, [7, 8, 9], length) == ids[context - kept :]


@pytest.mark.parametrize(
    ("context", "continuation", "message"),
    [
        ([], [1], "r: .* got no token in the context"),
        ([1], [], "r: .* got no token in the continuation"),
        ([1], [1] * 5, "r: the continuation must fit `max_length` of 4 tokens, got 5"),
    ],
    ids=["context", "continuation", "long"],
)
def test_what_cannot_be_read_is_refused(context, continuation, message):
    with pytest.raises(InputError, match=message):
        fitted("r", context, continuation, 4)


def requests(n):
    draw = random.Random(0)
    shots = [[5, 6, 7], [5, 6], [9]]
    return [([*draw.choice(shots), draw.randrange(3)], [draw.randrange(9)]) for _ in range(n)]


def by_context(asked, numbers):
    """Runs of requests of one context."""
    return [list(run) for _, run in groupby(numbers, key=lambda i: asked[i][0])]


def size(asked, run):
    """Tokens of requests of one context."""
    return len(asked[run[0]][0]) + sum(len(asked[i][1]) for i in run)


def test_every_request_is_beside_those_of_its_context():
    asked = requests(60)
    (numbers,) = chunks(asked, 10**6)
    assert sorted(numbers) == list(range(60))
    runs = by_context(asked, numbers)
    # in their own order
    assert all(run == sorted(run) for run in runs)
    contexts = [asked[run[0]][0] for run in runs]
    assert contexts == sorted(contexts)
    assert len(set(map(tuple, contexts))) == len(contexts)


def test_chunks_hold_neighbours_up_to_the_budget():
    asked = requests(60)
    found = list(chunks(asked, 40))
    assert [[i for chunk in found for i in chunk]] == list(chunks(asked, 10**6))
    assert len(found) > 1
    for chunk, following in pairwise(found):
        runs = by_context(asked, chunk)
        held = sum(size(asked, run) for run in runs)
        assert held <= 40 or len(runs) == 1
        assert held + size(asked, by_context(asked, following)[0]) > 40


def test_a_context_above_the_budget_goes_alone():
    asked = [([1] * 50, [2]), ([1], [2]), ([3], [4])]
    assert list(chunks(asked, 10)) == [[1], [0], [2]]
    assert list(chunks([], 10)) == []
