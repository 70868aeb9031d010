import itertools
import math

import numpy as np
import pytest
import torch

from sharpen.evaluation import Outcome
from sharpen.evaluation.metrics import best_of_k, order_by
from sharpen.scoring import Scores
from sharpen.selection import best_of_n


@pytest.fixture(params=[0.0, -900.0], ids=["likely", "underflows"])
def outcome(request):
    """Few distinct completions, so that many are drawn twice; some invalid, some no answer."""
    P, G = 12, 7
    rng = np.random.default_rng(0)
    response_PG = rng.integers(0, 4, (P, G))
    # "a" has 0.2 + 0.12, more than the 0.25 of "b", where both of its completions are there
    logprob_PG = request.param + np.log([0.12, 0.2, 0.25, 0.3])[response_PG]
    answers = np.array(["a", "a", "b", None], dtype=object)[response_PG]
    valid_PG = rng.random((P, G)) < 0.7
    valid_PG[0] = False
    scores = Scores.from_logprobs(logprob_PG[:, :, None].tolist(), valid_PG.tolist())
    reward_N = scores.reward(
        "rpc", answers=answers.ravel().tolist(), keys=response_PG.ravel().tolist()
    )
    rewards = {"logprob": logprob_PG, "rpc": reward_N.double().numpy().reshape(P, G)}
    return Outcome(rewards, valid_PG, valid_PG, None, answers.tolist(), response_PG)


def choose(outcome, p, subset):
    """The definition, of one subset of one prompt: the first of the largest mass, or None."""
    able = [g for g in subset if outcome.valid_PG[p, g]]
    distinct = {
        outcome.response_PG[p, g]: (outcome.answers[p][g], outcome.reward_PG["logprob"][p, g])
        for g in able
    }
    top = max((logprob for _, logprob in distinct.values()), default=0.0)

    def mass(g):
        answer = outcome.answers[p][g]
        return sum(
            math.exp(x - top) for a, x in distinct.values() if a == answer and answer is not None
        )

    return max(able, key=lambda g: (mass(g), -g)) if able else None


@pytest.mark.parametrize("k", range(1, 8))
def test_masses_of_every_subset_enumerated_give_the_same(outcome, k):
    subsets = list(itertools.combinations(range(7), k))
    want_PG = np.zeros((12, 7))
    for p, subset in itertools.product(range(12), subsets):
        g = choose(outcome, p, subset)
        if g is not None:
            want_PG[p, g] += 1 / len(subsets)
    np.testing.assert_allclose(best_of_k(outcome, "rpc", k).weight_PG, want_PG, atol=1e-12)


def test_all_samples_give_the_choice_of_best_of_n(outcome):
    weight_PG = best_of_k(outcome, "rpc", 7).weight_PG
    chosen_P = np.where(weight_PG.any(axis=1), weight_PG.argmax(axis=1), -1)
    logprobs = outcome.reward_PG["logprob"][:, :, None].tolist()
    scores = Scores.from_logprobs(logprobs, outcome.valid_PG.tolist())
    reward_N = torch.from_numpy(outcome.reward_PG["rpc"]).float().flatten()
    assert best_of_n(scores, reward_N).tolist() == chosen_P.tolist()
    assert order_by(outcome, "rpc")[1:, 0].tolist() == chosen_P[1:].tolist()
    assert chosen_P[0] == -1
