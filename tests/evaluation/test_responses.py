import dataclasses
import itertools

import numpy as np
import pytest

from sharpen.evaluation import Outcome, Texts
from sharpen.evaluation.report import group_examples


@pytest.fixture
def run():
    """Five fates, the likelier of two samples first; greedy right in prompts 1 and 3."""
    return Outcome(
        {"logprob": np.tile([-1.0, -2.0], (5, 1))},
        np.ones((5, 2), dtype=bool),
        np.array([[1, 0], [0, 1], [0, 1], [1, 1], [0, 0]], dtype=bool),
        np.array([0, 1, 0, 1, 0], dtype=bool),
    )


def indices(groups):
    return {group.title: [example.index for example in group.examples] for group in groups}


def test_every_fate_has_its_group(run, texts_of):
    groups = group_examples(run, texts_of(run), reward="logprob", limit=100)
    assert indices(groups) == {
        "Greedy wrong, chosen right": [0],
        "Greedy right, chosen wrong": [1],
        "Both wrong, though a correct response was sampled": [2],
        "Both right": [3],
        "Both wrong, no correct response among the samples": [4],
    }


def test_fewer_groups_without_greedy_and_one_without_a_checker(run, texts_of):
    no_greedy = dataclasses.replace(run, greedy_correct_P=None)
    groups = group_examples(no_greedy, texts_of(run), reward="logprob", limit=100)
    assert sorted(itertools.chain(*indices(groups).values())) == [0, 1, 2, 3, 4]
    assert len(groups) == 3
    ungraded = dataclasses.replace(no_greedy, correct_PG=None)
    groups = group_examples(ungraded, texts_of(run), reward="logprob", limit=100)
    assert indices(groups) == {"All prompts": [0, 1, 2, 3, 4]}
    assert groups[0].examples[0].chosen is not None
    assert groups[0].examples[0].chosen.is_correct is None


def test_limit_is_dealt_evenly(make_outcome, texts_of):
    outcome = make_outcome(P=60, G=3)
    groups = group_examples(outcome, texts_of(outcome), reward="logprob", limit=20)
    shown = [len(group.examples) for group in groups]
    assert sum(shown) == 20
    assert sum(group.total for group in groups) == 60
    spare = [len(g.examples) for g in groups if len(g.examples) < g.total]
    assert max(shown) - min(spare) <= 1


def test_rejected_is_the_best_that_differs(run):
    three = Outcome(
        {"logprob": np.array([[-1.0, -2.0, -3.0]])},
        np.ones((1, 3), dtype=bool),
        answers=[["4", "4", "5"]],
    )
    texts = Texts(["p"], [["same", "same", "other"]])
    (group,) = group_examples(three, texts, reward="logprob", limit=1)
    assert group.examples[0].chosen is not None
    assert group.examples[0].rejected is not None
    assert group.examples[0].rejected.text == "other"

    distinct = Texts(["p"], [["one", "two", "three"]])
    by_text, by_vote = (
        group_examples(three, distinct, reward=reward, limit=1)[0].examples[0].rejected
        for reward in ("logprob", "majority")
    )
    assert by_text is not None
    assert by_vote is not None
    assert (by_text.text, by_vote.text) == ("two", "three")


def test_nothing_to_choose_or_to_reject_is_none(run, texts_of):
    dead = dataclasses.replace(run, valid_PG=np.zeros((5, 2), dtype=bool))
    for group in group_examples(dead, texts_of(run), reward="logprob", limit=5):
        assert all(e.chosen is None and e.rejected is None for e in group.examples)
    alike = Texts(["p"] * 5, [["same", "same"]] * 5)
    for group in group_examples(run, alike, reward="logprob", limit=5):
        assert all(e.chosen is not None and e.rejected is None for e in group.examples)
