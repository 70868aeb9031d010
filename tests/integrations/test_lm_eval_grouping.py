"""Requests cut, regrouped and dealt out: each once, whatever their order."""

import random
from itertools import pairwise

import pytest

from sharpen.errors import InputError
from sharpen.integrations.lm_eval.grouping import fitted, grouped, stretches


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


def test_every_request_is_in_the_group_of_its_context():
    asked = requests(60)
    groups = grouped(asked)
    seen = [i for group in groups for i in group.requests]
    assert sorted(seen) == list(range(60))
    for group in groups:
        assert [asked[i] for i in group.requests] == [
            (group.context, continuation) for continuation in group.continuations
        ]
    contexts = [tuple(group.context) for group in groups]
    assert contexts == sorted(set(contexts))


def test_stretches_hold_neighbours_up_to_the_budget():
    groups = grouped(requests(60))
    found = list(stretches(groups, 40))
    assert [group for stretch in found for group in stretch] == groups
    assert len(found) > 1
    for stretch, following in pairwise(found):
        held = sum(group.tokens for group in stretch)
        assert held <= 40 or len(stretch) == 1
        assert held + following[0].tokens > 40


def test_a_group_above_the_budget_goes_alone():
    groups = grouped([([1] * 50, [2]), ([1], [2]), ([3], [4])])
    assert [len(stretch) for stretch in stretches(groups, 10)] == [1, 1, 1]
    assert list(stretches([], 10)) == []
