import itertools
import random
from collections import Counter

import pytest
import torch

from sharpen import Scores, best_of_n
from sharpen.errors import InputError
from sharpen.selection import majority_vote, probability_vote, weighted_vote


def of_one_token(*logprobs, valid=None):
    return Scores.from_logprobs([[[x] for x in logprobs]], valid)


def weights(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_the_best_completion_stands_for_the_answer_of_the_majority():
    scores = of_one_token(-1.0, -9.0, -5.0, -7.0)
    answers = ["7", "24", "24", "24"]
    assert majority_vote(scores, answers).tolist() == [2]
    assert majority_vote(scores, answers, reward=torch.tensor([0.0, 1, 0, 0])).tolist() == [1]
    # the reward of that name takes the first completion of the same answer
    assert best_of_n(scores, scores.reward("majority", answers=answers)).tolist() == [1]


def test_of_equal_votes_the_answer_given_first_wins():
    scores = of_one_token(-9.0, -1.0, -8.0, -2.0)
    assert majority_vote(scores, ["a", "b", "a", "b"]).tolist() == [2]
    assert majority_vote(scores, ["b", "a", "a", "b"]).tolist() == [3]


def test_of_equal_rewards_the_first_completion_wins():
    assert majority_vote(of_one_token(-9.0, -1.0, -1.0), ["a", "b", "b"]).tolist() == [1]


def test_completions_without_an_answer_do_not_vote():
    scores = of_one_token(-1.0, -1.0, -9.0)
    assert majority_vote(scores, [None, None, "24"]).tolist() == [2]
    assert majority_vote(scores, [None, None, None]).tolist() == [0]


def test_invalid_completions_do_not_vote():
    scores = of_one_token(-1.0, -1.0, -9.0, valid=[[False, True, True]])
    assert majority_vote(scores, ["a", "b", "a"]).tolist() == [1]


def test_majority_is_the_enumerated_one():
    rng = random.Random(0)
    for letters in itertools.product(["a", "b", None], repeat=4):
        logprobs = [rng.uniform(-9, 0) for _ in letters]
        chosen = majority_vote(of_one_token(*logprobs), list(letters)).item()
        votes = Counter(x for x in letters if x is not None)
        if votes:
            assert letters[chosen] == votes.most_common(1)[0][0]
        same = [i for i, x in enumerate(letters) if not votes or x == letters[chosen]]
        assert chosen == max(same, key=logprobs.__getitem__)


def test_weights_are_summed_over_the_answer():
    scores, answers = of_one_token(-1.0, -2.0, -3.0), ["7", "24", "24"]
    assert weighted_vote(scores, answers, weights(3, 1, 1)).tolist() == [0]
    assert weighted_vote(scores, answers, weights(3, 2, 2)).tolist() == [1]
    assert weighted_vote(scores, answers, weights(300, 200, 200)).tolist() == [1]
    assert weighted_vote(scores, answers, weights(3, float("nan"), 4)).tolist() == [1]
    # added one by one, ten tenths are less than one
    scores = of_one_token(*[-1.0] * 11)
    assert weighted_vote(scores, ["b"] * 10 + ["a"], weights(*[0.1] * 10, 1)).tolist() == [0]
    nans = weights(float("nan"), float("nan"))
    assert weighted_vote(of_one_token(-2.0, -1.0), ["a", "b"], nans).tolist() == [1]


@pytest.mark.parametrize("bad", [weights(1, -1), weights(1, float("inf")), weights(1)])
def test_weights_that_are_none_are_refused(bad):
    with pytest.raises(InputError, match=r"`weight` must hold a finite number of at least 0"):
        weighted_vote(of_one_token(-1.0, -2.0), ["a", "b"], bad)


def test_probability_counts_a_completion_once_however_often_it_was_drawn():
    # "a" was drawn three times; 0.2 + 0.15 of "b" are more than 0.3
    scores = Scores.from_logprobs(
        [torch.tensor([0.3, 0.3, 0.3, 0.15, 0.2]).log()[:, None].tolist()]
    )
    answers, ids = ["a", "a", "a", "b", "b"], [(1,), (1,), (1,), (2,), (3,)]
    assert majority_vote(scores, answers).tolist() == [0]
    assert probability_vote(scores, answers, ids).tolist() == [4]
    assert probability_vote(scores, answers, [1, 1, 1, 2, 2]).tolist() == [0]
    with pytest.raises(InputError, match=r"`keys` must hold one key for each of N=5"):
        probability_vote(scores, answers, ids[:2])


@pytest.mark.parametrize("scale", [1.0, 5000.0])
def test_probability_vote_and_the_reward_rpc_find_the_same_answer(scale):
    rng = random.Random(0)
    logprobs = [[[-scale * rng.random()] for _ in range(6)] for _ in range(40)]
    keys = [rng.randrange(4) for _ in range(240)]
    # equal completions are equally probable and answer alike
    for n, key in enumerate(keys):
        p, start = n // 6, n - n % 6
        logprobs[p][n % 6] = logprobs[p][keys[start:].index(key)]
    answers = ["aab"[key] if key < 3 else None for key in keys]
    scores = Scores.from_logprobs(logprobs)
    voted = probability_vote(scores, answers, keys)
    rewarded = best_of_n(scores, scores.reward("rpc", answers=answers, keys=keys))
    for p in range(40):
        assert answers[6 * p + voted[p]] == answers[6 * p + rewarded[p]]
