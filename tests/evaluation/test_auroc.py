import math

import numpy as np
import pytest

from sharpen.errors import InputError
from sharpen.evaluation.metrics import within_prompt_auroc


def pairs(reward_G, correct_G, may_G):
    """The definition, pair by pair: how many are in order, ties half, and how many there are."""
    able = [g for g in range(len(reward_G)) if may_G[g] and not math.isnan(reward_G[g])]
    scores = [
        1.0 if reward_G[i] > reward_G[j] else 0.5 if reward_G[i] == reward_G[j] else 0.0
        for i in able
        for j in able
        if correct_G[i] and not correct_G[j]
    ]
    return sum(scores), len(scores)


def test_hand_worked():
    # right 4, 2 and 1 against wrong 3 and 2: 2, 1/2 and 0 of 2
    reward_PG = np.array([[4.0, 3.0, 2.0, 2.0, 1.0]])
    correct_PG = np.array([[True, False, True, False, True]])
    found = within_prompt_auroc(reward_PG, correct_PG)
    assert found.mean == found.pooled == 2.5 / 6
    assert found.n_pairs_P.tolist() == [6]


def test_every_pair_counted_gives_the_same():
    rng = np.random.default_rng(0)
    P, G = 40, 9
    reward_PG = rng.integers(0, 5, (P, G)).astype(np.float64)
    reward_PG[rng.random((P, G)) < 0.1] = np.nan
    reward_PG[rng.random((P, G)) < 0.1] = -np.inf
    correct_PG = rng.random((P, G)) < rng.random((P, 1))
    valid_PG = rng.random((P, G)) < 0.8
    found = within_prompt_auroc(reward_PG, correct_PG, valid_PG)
    want = [pairs(*row) for row in zip(reward_PG, correct_PG, valid_PG, strict=True)]
    area_P = [won / n if n else math.nan for won, n in want]
    np.testing.assert_allclose(found.auroc_P, area_P, rtol=1e-12)
    assert found.n_pairs_P.tolist() == [n for _, n in want]
    assert found.mean == pytest.approx(np.nanmean(area_P), rel=1e-12)
    assert found.pooled == pytest.approx(sum(w for w, _ in want) / sum(n for _, n in want))
    assert 0 < found.n_prompts == sum(n > 0 for _, n in want) < P


def test_a_reward_that_only_tells_prompts_apart_is_a_coin():
    # the first prompt is easy and has the high rewards
    reward_PG = np.array([[9.0] * 4, [1.0] * 4])
    correct_PG = np.array([[True, True, True, False], [True, False, False, False]])
    assert within_prompt_auroc(reward_PG, correct_PG).mean == 0.5


def test_prompts_of_one_class_are_left_out():
    reward_PG = np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])
    correct_PG = np.array([[True, True], [False, False], [False, True]])
    found = within_prompt_auroc(reward_PG, correct_PG)
    assert (found.mean, found.pooled, found.n_prompts) == (1.0, 1.0, 1)
    assert np.isnan(found.auroc_P).tolist() == [True, True, False]
    none = within_prompt_auroc(reward_PG[:2], correct_PG[:2])
    assert math.isnan(none.mean)
    assert math.isnan(none.pooled)
    assert none.n_prompts == 0


def test_prompts_and_pairs_weigh_differently():
    reward_PG = np.array([[2.0, 1.0, np.nan, np.nan], [1.0, 2.0, 2.0, 2.0]])
    correct_PG = np.array([[True, False, True, True], [True, False, False, False]])
    found = within_prompt_auroc(reward_PG, correct_PG)
    assert (found.mean, found.pooled) == (0.5, 0.25)


def test_shapes_must_agree():
    with pytest.raises(InputError, match=r"`valid_PG` must be of the shape of `reward_PG`, \(1, 2"):
        within_prompt_auroc(np.zeros((1, 2)), np.ones((1, 2), bool), np.ones((1, 2), bool)[:, :1])
