""""""

import numpy as np
import pytest

from sharpen.evaluation import Outcome
from sharpen.evaluation.metrics import within_prompt_auroc
from sharpen.experiments.game24.rewards import (
    auroc_rows,
    covariance_rows,
    power_rows,
    prompt_rows,
    tilted_covariance,
)


def outcome_of(p, correct, **rewards):
    logprob_PG = np.log(np.array(p))
    arrays = {name: np.array(values) for name, values in rewards.items()}
    shape = logprob_PG.shape
    return Outcome({"logprob": logprob_PG, **arrays}, np.ones(shape, dtype=bool), np.array(correct))


def test_covariance_by_hand():
    outcome = outcome_of([[0.5, 0.25], [0.1, 0.2]], [[True, False], [True, False]])
    (row,) = covariance_rows([outcome])
    # (log 2) / 4 of the first, minus it of the second
    assert row["mean"] == pytest.approx(0.0, abs=1e-9)
    assert row["share_positive"] == 0.5
    rows = prompt_rows([outcome], ["one", "two"])
    assert [row["covariance"] for row in rows] == [
        pytest.approx(np.log(2) / 4, abs=1e-4),
        pytest.approx(-np.log(2) / 4, abs=1e-4),
    ]
    assert [row["accuracy"] for row in rows] == [0.5, 0.5]


def test_covariance_per_deviation_has_no_unit():
    correct = [[True, False, False], [False, True, False]]
    rewards = [[3.0, 1.0, 2.0], [0.0, 5.0, 1.0]]
    outcome = outcome_of(
        np.full((2, 3), 0.3), correct, one=rewards, two=(7 * np.array(rewards)).tolist()
    )
    by = {row["reward"]: row for row in covariance_rows([outcome])}
    assert by["two"]["per_sd_points"] == pytest.approx(by["one"]["per_sd_points"], abs=1e-3)
    assert by["two"]["mean"] == pytest.approx(7 * by["one"]["mean"], abs=1e-3)


@pytest.mark.parametrize("alpha", [1.0, 2.0, 4.0])
def test_it_is_the_slope_of_the_accuracy_in_alpha(alpha):
    # samples that are each completion once, weighed by p: all of the law
    p = np.array([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]])
    correct = np.array([[False, True, False, True], [True, False, False, True]])
    outcome = outcome_of(p, correct)

    def accuracy(a):
        # tilted_covariance weighs equal samples by p^(a - 1)
        w = p ** (a - 1)
        return (w * correct).sum(axis=1) / w.sum(axis=1)

    slope_P = (accuracy(alpha + 1e-5) - accuracy(alpha - 1e-5)) / 2e-5
    cov_P, accuracy_P, _ = tilted_covariance(outcome, alpha)
    np.testing.assert_allclose(cov_P, slope_P, atol=1e-7)
    np.testing.assert_allclose(accuracy_P, accuracy(alpha))


def test_aurocs_are_sorted_and_pairs_are_within_prompts():
    correct = [[True, False], [True, False], [True, True]]
    outcome = outcome_of(
        np.full((3, 2), 0.5),
        correct,
        good=[[1.0, 0.0], [9.0, 8.0], [0.0, 0.0]],
        bad=[[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]],
    )
    rows = auroc_rows([outcome, outcome])
    assert [(row["reward"], row["auroc"]) for row in rows] == [
        ("good", 1.0),
        ("logprob", 0.5),
        ("bad", 0.0),
    ]
    assert rows[0]["prompts"] == 2
    assert rows[0]["by_seed"] == [1.0, 1.0]


def test_votes_are_counted_in_auroc(make_outcome):
    rows = auroc_rows([make_outcome(P=20, G=10)])
    assert {"majority", "rpc"} <= {row["reward"] for row in rows}


def test_under_power_effective_samples_fall(make_outcome):
    rows = power_rows([make_outcome(P=20, G=10, all_valid=True)])
    sizes = [row["effective_samples"] for row in rows]
    assert sizes[0] == pytest.approx(10.0)
    assert sizes == sorted(sizes, reverse=True)
    assert [row["alpha"] for row in rows] == [1.0, 2.0, 4.0]


def test_the_band_of_an_auroc_is_of_the_number_shown():
    rng = np.random.default_rng(3)
    outcomes = []
    for _ in range(3):
        # many prompts have no wrong completion in one seed, and one in another
        correct = rng.random((60, 4)) < 0.7
        reward = correct * 0.5 + rng.random((60, 4))
        outcomes.append(outcome_of(np.full((60, 4), 0.3), correct, one=reward))
    by = {row["reward"]: row for row in auroc_rows(outcomes)}
    row = by["one"]
    draws = []
    for _ in range(4000):
        take = rng.integers(60, size=60)
        means = []
        for outcome in outcomes:
            reward, correct = outcome.reward_PG["one"][take], outcome.correct_PG[take]
            means.append(within_prompt_auroc(reward, correct).mean)
        draws.append(np.mean(means))
    assert np.mean(draws) == pytest.approx(row["auroc"], abs=0.004)
    assert row["ci95"] == pytest.approx(np.percentile(draws, [2.5, 97.5]).tolist(), abs=0.01)


def test_a_seed_in_which_no_prompt_has_a_pair_has_no_band():
    both = outcome_of([[0.5, 0.2]], [[True, False]])
    right = outcome_of([[0.5, 0.2]], [[True, True]])
    assert auroc_rows([both, right])[0]["ci95"] is None
