""""""

import numpy as np
import pytest
import torch

from sharpen.experiments.game24.selectors import BEST_BY, selectors
from sharpen.scoring import Scores
from sharpen.selection import adaptive_best_of_n, borda_vote, confidence_vote
from sharpen.training.groups import chosen_weights


def flat(outcome):
    P, G = outcome.valid_PG.shape
    logprob = outcome.reward_PG["logprob"][..., None].tolist()
    scores = Scores.from_logprobs(logprob, outcome.valid_PG.tolist())
    answers = [answer for group in outcome.answers for answer in group]
    return scores, answers, lambda name: torch.from_numpy(outcome.reward_PG[name].reshape(P * G))


def test_at_k_equal_to_g_selectors_are_those_of_the_library(make_outcome):
    outcome = make_outcome(P=30, G=6)
    scores, answers, reward = flat(outcome)
    wanted = {
        "Borda, self_certainty": borda_vote(
            scores, answers, reward=reward("self_certainty"), p=0.3
        ),
        "DeepConf vote, tail, keep 0.1": confidence_vote(
            scores, answers, reward=reward("confidence_tail"), keep=0.1
        ),
        "DeepConf vote, bottom, keep 0.9": confidence_vote(
            scores, answers, reward=reward("confidence_bottom"), keep=0.9
        ),
    }
    for name, chosen_P in wanted.items():
        got_PG = selectors()[name](outcome, 6, 0).weight_PG
        want_PG = chosen_weights(scores.groups, chosen_P).numpy().reshape(30, 6)
        # the order decides ties between answers, and nothing else here
        grades = [(w_PG * outcome.correct_PG).sum(axis=1) for w_PG in (got_PG, want_PG)]
        assert np.mean(np.abs(grades[0] - grades[1])) < 0.1, name


def test_borda_takes_a_larger_exponent_where_samples_are_many(make_outcome, monkeypatch):
    seen = []
    from sharpen.experiments.game24 import selectors as module

    def spy(scores, answers, *, reward, p):
        seen.append(p)
        return borda_vote(scores, answers, reward=reward, p=p)

    monkeypatch.setattr(module, "borda_vote", spy)
    outcome = make_outcome(P=3, G=20)
    for k in (16, 17):
        module.selectors()["Borda, logprob"](outcome, k, 0)
    assert set(seen[:4]) == {0.3}
    assert set(seen[4:]) == {1.2}


@pytest.mark.parametrize("reward", BEST_BY)
def test_best_of_all_is_the_highest_valid_reward(make_outcome, reward):
    outcome = make_outcome(P=20, G=7)
    weight_PG = selectors()[f"best-of-N, {reward}"](outcome, 7, 0).weight_PG
    masked_PG = np.where(outcome.valid_PG, outcome.reward_PG[reward], -np.inf)
    for p in np.flatnonzero(outcome.valid_PG.any(axis=1)):
        assert weight_PG[p, masked_PG[p].argmax()] == 1.0


def test_the_filter_chooses_the_most_probable_of_the_confident_half(make_outcome):
    outcome = make_outcome(P=40, G=6)
    found = selectors()["DeepConf filter, tail, keep 0.5, then logprob"](outcome, 6, 0)
    for p in range(40):
        valid = np.flatnonzero(outcome.valid_PG[p])
        n_kept = -(-len(valid) // 2)
        by_tail = valid[np.argsort(-outcome.reward_PG["confidence_tail"][p, valid])][:n_kept]
        best = outcome.reward_PG["logprob"][p, by_tail].max(initial=-np.inf)
        chosen = np.flatnonzero(found.weight_PG[p])
        assert set(chosen) <= set(by_tail)
        assert (outcome.reward_PG["logprob"][p, chosen] == best).all()


def test_soft_best_of_n_weighs_by_the_power_less_one(make_outcome):
    outcome = make_outcome(P=10, G=6, all_valid=True)
    p_PG = np.exp(outcome.reward_PG["logprob"])
    for power in (2.0, 4.0):
        found = selectors()[f"soft best-of-N, power {power:g}"](outcome, 6, 0)
        want_PG = p_PG ** (power - 1)
        want_PG /= want_PG.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(found.weight_PG, want_PG, rtol=1e-5)
        effective = (1 / (want_PG**2).sum(axis=1)).mean()
        assert found.facts["effective_samples"] == pytest.approx(effective, rel=1e-5)


def test_pessimism_measures_one_half_and_chooses_from_the_other(make_outcome):
    outcome = make_outcome(P=6, G=8, all_valid=True)
    found = selectors()["InferenceTimePessimism, beta 1"](outcome, 2, 0)
    # one sample to choose from: never tried, always returned
    assert found.facts == {"accepted": 0.0}
    np.testing.assert_allclose(found.weight_PG.sum(axis=1), 1.0)


def test_adaptive_counts_what_the_rule_used(make_outcome):
    outcome = make_outcome(P=30, G=30, all_valid=True)
    scores, _, _ = flat(outcome)
    found = selectors()["adaptive best-of-N, delta 0.1"](outcome, 30, 0)
    assert 1 <= found.facts["n_used"] < 30
    library = adaptive_best_of_n(scores, delta=0.1)
    assert found.facts["n_used"] == pytest.approx(float(library.n_used.double().mean()), rel=0.2)
    assert found.facts["certified"] == pytest.approx(library.certified_fraction, abs=0.2)
