import pytest
import torch

from sharpen import Scores, best_of_n
from sharpen.errors import InputError

NAN, INF = float("nan"), float("inf")


def test_index_of_the_best_within_each_prompt():
    scores = Scores.from_logprobs([[[-3.0], [-1.0, -1.0], [-5.0]], [[-2.0], [-1.0]], [[-9.0]]])
    assert best_of_n(scores).tolist() == [1, 1, 0]
    assert best_of_n(scores, "mean_logprob").tolist() == [1, 1, 0]
    assert best_of_n(scores).dtype == torch.int64


def test_rewards_may_disagree():
    scores = Scores.from_logprobs([[[-1.5], [-1.0, -1.0]]])
    assert best_of_n(scores, "logprob").tolist() == [0]
    assert best_of_n(scores, "mean_logprob").tolist() == [1]


def test_ties_go_to_the_first():
    scores = Scores.from_logprobs([[[-2.0], [-1.0], [-1.0]], [[-INF], [-INF]]])
    assert best_of_n(scores).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("logprobs", "valid"),
    [
        ([[0.0], [-9.0]], [False, True]),  # cut at the token limit
        ([[], [-9.0]], [True, True]),  # empty: its sum of 0 would beat everything
        ([[NAN, -0.1], [-9.0]], [True, True]),
        ([[NAN], [-INF]], [True, True]),
    ],
    ids=["invalid", "empty", "nan", "nan-beside-minus-infinity"],
)
def test_ineligible_never_wins(logprobs, valid):
    scores = Scores.from_logprobs([logprobs], valid=[valid])
    assert best_of_n(scores).tolist() == [1]


def test_minus_one_where_nothing_is_eligible():
    scores = Scores.from_logprobs(
        [[], [[-1.0]], [[]], [[NAN]], [[-1.0], [-2.0]]],
        valid=[[], [False], [True], [True], [True] * 2],
    )
    assert best_of_n(scores).tolist() == [-1, -1, -1, -1, 0]


def test_nan_log_prob_is_out_under_any_reward():
    scores = Scores.from_logprobs([[[NAN], [-2.0]]])
    assert scores.eligible.tolist() == [False, True]
    assert best_of_n(scores, torch.tensor([1.0, 0.0])).tolist() == [1]


def test_nan_reward_is_out():
    scores = Scores.from_logprobs([[[-1.0], [-2.0]]])
    assert best_of_n(scores, torch.tensor([NAN, 0.0])).tolist() == [1]


def test_no_prompts():
    assert best_of_n(Scores.from_logprobs([])).shape == (0,)


def test_a_reward_with_options_is_passed_as_a_tensor():
    scores = Scores.from_logprobs([[[-1.0], [-2.0], [-3.0]]])
    votes = scores.reward("majority", answers=["5", "24", "24"])
    assert best_of_n(scores, votes).tolist() == [1]


def test_errors():
    scores = Scores.from_logprobs([[[-1.0], [-2.0]]])
    with pytest.raises(InputError, match=r"`reward` must be one of"):
        best_of_n(scores, "longest")
    with pytest.raises(InputError, match=r"one number for each of N=2 completions, got shape"):
        best_of_n(scores, torch.zeros(3))
