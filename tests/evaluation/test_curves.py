import itertools
import math
from collections import Counter

import numpy as np
import pytest

from sharpen.errors import InputError
from sharpen.evaluation import Outcome
from sharpen.evaluation.metrics import best_of_k, order_by, pass_at_k, sample_accuracy
from sharpen.scoring import Scores
from sharpen.selection import best_of_n


def choose(outcome, reward, p, subset):
    """The definition, one subset at a time: the first of the best eligible, or None."""
    able = [g for g in subset if outcome.eligible(reward)[p, g]]
    if reward == "majority":
        votes = Counter(outcome.answers[p][g] for g in able)
        votes[None] = 0
        value = {g: votes[outcome.answers[p][g]] for g in able}
    else:
        value = {g: outcome.reward_PG[reward][p, g] for g in able}
    return max(able, key=lambda g: (value[g], -g)) if able else None


def enumerated(outcome, reward, k):
    """Weights, accuracy and pooled mean log-probability over every subset of size k."""
    P, G = outcome.valid_PG.shape
    subsets = list(itertools.combinations(range(G), k))
    weight_PG, logprobs = np.zeros((P, G)), []
    for p in range(P):
        for subset in subsets:
            g = choose(outcome, reward, p, subset)
            if g is not None:
                weight_PG[p, g] += 1 / len(subsets)
                logprobs.append(outcome.reward_PG["logprob"][p, g])
    return weight_PG, (weight_PG * outcome.correct_PG).sum(axis=1), np.nanmean(logprobs)


@pytest.mark.parametrize("k", range(1, 7))
@pytest.mark.parametrize("reward", ["logprob", "mean_logprob", "majority"])
def test_every_subset_enumerated_gives_the_same(make_outcome, reward, k):
    outcome = make_outcome(P=7, G=6)
    point = best_of_k(outcome, reward, k)
    weight_PG, accuracy_P, mean_logprob = enumerated(outcome, reward, k)
    np.testing.assert_allclose(point.weight_PG, weight_PG, atol=1e-12)
    assert point.accuracy_P == pytest.approx(accuracy_P, abs=1e-12)
    assert point.mean_logprob == pytest.approx(mean_logprob, abs=1e-12)


@pytest.mark.parametrize("reward", ["logprob", "mean_logprob", "majority"])
def test_all_samples_give_exactly_the_one_choice(make_outcome, reward):
    outcome = make_outcome(P=20, G=50)
    weight_PG = best_of_k(outcome, reward, 50).weight_PG
    for p, weight_G in enumerate(weight_PG):
        chosen = choose(outcome, reward, p, range(50))
        assert np.flatnonzero(weight_G).tolist() == ([] if chosen is None else [chosen])
        assert weight_G.sum() == (0 if chosen is None else 1)
        assert chosen is None or order_by(outcome, reward)[p, 0] == chosen


def test_all_samples_give_the_choice_of_best_of_n():
    rng = np.random.default_rng(0)
    P, G = 40, 10
    # tokens of few values, so that sums tie; some completions are empty, some not valid
    logprobs = [
        [rng.choice([-1.0, -0.5, 0.0], rng.integers(0, 4)).tolist() for _ in range(G)]
        for _ in range(P)
    ]
    valid = (rng.random((P, G)) < 0.7).tolist()
    empty_PG = np.array([[not tokens for tokens in row] for row in logprobs])
    answers = np.array(["a", "b", None], dtype=object)[rng.choice(3, (P, G), p=[0.1, 0.1, 0.8])]
    answers[empty_PG] = None
    scores = Scores.from_logprobs(logprobs, valid)
    reward_N = {
        "logprob": scores.reward("logprob"),
        "mean_logprob": scores.reward("mean_logprob"),
        "majority": scores.reward("majority", answers=answers.ravel().tolist()),
    }
    outcome = Outcome(
        {name: r.double().numpy().reshape(P, G) for name, r in reward_N.items()},
        np.array(valid) & ~empty_PG,
        answers=answers.tolist(),
    )
    for name, values in reward_N.items():
        weight_PG = best_of_k(outcome, name, G).weight_PG
        got_P = np.where(weight_PG.any(axis=1), weight_PG.argmax(axis=1), -1)
        assert got_P.tolist() == best_of_n(scores, values).tolist()


def test_sampled_votes_agree_with_all_votes(make_outcome):
    outcome = make_outcome(P=7, G=11)
    assert math.comb(11, 5) > 400
    got = best_of_k(outcome, "majority", 5, n_subsets=400).accuracy_P
    want = enumerated(outcome, "majority", 5)[1]
    error_P = np.sqrt(want * (1 - want) / 400)
    assert (np.abs(got - want) <= 4 * error_P + 1e-12).all()
    assert (got != want).any()


def test_sampled_votes_are_seeded_and_do_not_depend_on_later_prompts(make_outcome):
    outcome = make_outcome(P=7, G=11)
    first = Outcome(
        {"logprob": outcome.reward_PG["logprob"][:3]},
        outcome.valid_PG[:3],
        answers=outcome.answers[:3],
    )
    weight_PG = best_of_k(outcome, "majority", 5, seed=1).weight_PG
    assert np.array_equal(best_of_k(outcome, "majority", 5, seed=1).weight_PG, weight_PG)
    assert np.array_equal(best_of_k(first, "majority", 5, seed=1).weight_PG, weight_PG[:3])
    assert not np.array_equal(best_of_k(outcome, "majority", 5, seed=2).weight_PG, weight_PG)


def test_sampled_votes_are_drawn_anew_for_every_prompt():
    shape = (2, 12)
    twins = Outcome(
        {"logprob": np.zeros(shape)}, np.ones(shape, dtype=bool), answers=["ab" * 6] * 2
    )
    first_G, second_G = best_of_k(twins, "majority", 5).weight_PG
    assert not np.array_equal(first_G, second_G)


def test_eligible_at_minus_infinity_beats_ineligible():
    logprob_PG = np.array([[-1.0, -np.inf, np.nan]])
    outcome = Outcome({"logprob": logprob_PG}, np.array([[False, True, True]]))
    assert best_of_k(outcome, "logprob", 3).weight_PG.tolist() == [[0, 1, 0]]
    assert best_of_k(outcome, "logprob", 3).mean_logprob == -np.inf


def test_nothing_eligible_counts_as_wrong_and_has_no_logprob():
    nothing_PG = np.zeros((2, 4), dtype=bool)
    outcome = Outcome(
        {"logprob": np.zeros((2, 4))}, nothing_PG, ~nothing_PG, answers=[["a"] * 4] * 2
    )
    for reward in outcome.rewards:
        point = best_of_k(outcome, reward, 2)
        assert point.accuracy_P is not None
        assert point.accuracy_P.tolist() == [0, 0]
        assert math.isnan(point.mean_logprob)


def test_without_a_checker_there_is_no_accuracy(make_outcome):
    assert best_of_k(make_outcome(checker=False), "logprob", 3).accuracy_P is None


@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(make_outcome, k):
    correct_PG = make_outcome(P=7, G=6).correct_PG
    subsets = list(itertools.combinations(range(6), k))
    want_P = [np.mean([row[list(s)].any() for s in subsets]) for row in correct_PG]
    np.testing.assert_allclose(pass_at_k(correct_PG, k), want_P, atol=1e-12)


def test_pass_at_k_is_stable_where_binomials_overflow():
    correct_PG = np.zeros((1, 5000), dtype=bool)
    correct_PG[0, :3] = True
    exact = 1 - math.comb(4997, 2500) / math.comb(5000, 2500)
    assert pass_at_k(correct_PG, 2500)[0] == pytest.approx(exact, rel=1e-12)


def test_one_sample_is_pass_at_1_and_best_of_1_of_valid_samples(make_outcome):
    outcome = make_outcome()
    accuracy_P = sample_accuracy(outcome.correct_PG)
    np.testing.assert_allclose(accuracy_P, pass_at_k(outcome.correct_PG, 1), atol=1e-12)
    every = Outcome({"logprob": np.zeros((7, 6))}, np.ones((7, 6), dtype=bool), outcome.correct_PG)
    assert best_of_k(every, "logprob", 1).accuracy_P == pytest.approx(accuracy_P, abs=1e-12)


@pytest.mark.parametrize("k", [0, 7])
def test_subset_size_outside_the_samples_is_refused(make_outcome, k):
    outcome = make_outcome(G=6)
    with pytest.raises(InputError, match=rf"`k` must be in 1\.\.6.*got {k}"):
        best_of_k(outcome, "logprob", k)
    with pytest.raises(InputError, match=rf"`k` must be in 1\.\.6.*got {k}"):
        pass_at_k(outcome.correct_PG, k)
