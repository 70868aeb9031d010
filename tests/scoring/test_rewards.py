import pytest
import torch

from sharpen import Scores
from sharpen.errors import InputError
from sharpen.scoring.rewards import REWARDS, majority, stats_needed
from sharpen_kernels import TokenStats

# two prompts; completions of 2, 0, 1 and 3 tokens
LENGTHS = [[2, 0], [1, 3]]
LOGPROB = torch.tensor([-1.0, -2.0, -0.5, -1.0, -0.5, -3.0])
ENTROPY = torch.tensor([0.5, 1.5, 2.0, 0.0, 1.0, 2.0])
CERTAINTY = torch.tensor([2.0, 4.0, 5.0, 0.0, 1.0, 2.0])
ANSWERS = ["24", "24", None, "7", "24", None]


def scores(**stats):
    return Scores.of(TokenStats(**stats), LENGTHS)


@pytest.mark.parametrize(
    ("name", "stats", "want"),
    [
        ("logprob", {"logprob": LOGPROB}, [-3.0, 0.0, -0.5, -4.5]),
        ("mean_logprob", {"logprob": LOGPROB}, [-1.5, 0.0, -0.5, -1.5]),
        ("self_certainty", {"self_certainty": CERTAINTY}, [3.0, 0.0, 5.0, 1.0]),
        ("neg_entropy", {"entropy": ENTROPY}, [-1.0, 0.0, -2.0, -1.0]),
    ],
)
def test_hand_worked_values(name, stats, want):
    reward = scores(**stats).reward(name)
    assert reward.tolist() == want
    assert reward.dtype == torch.float32
    assert stats_needed(name) == tuple(stats)


def test_majority_is_the_share_of_valid_completions_of_the_same_prompt():
    groups, valid = torch.tensor([0, 4, 6]), torch.tensor([True, True, True, True, True, False])
    share = majority(groups, valid, answers=ANSWERS)
    # "24" of the second prompt has one of one valid vote; the first prompt does not see it
    assert share.tolist() == [0.5, 0.5, 0.0, 0.25, 1.0, 0.0]


def test_invalid_completions_do_not_vote():
    groups, valid = torch.tensor([0, 3]), torch.tensor([True, False, True])
    assert majority(groups, valid, answers=["a", "a", "b"]).tolist() == [0.5, 0.5, 0.5]
    assert majority(groups, ~valid, answers=["a", "b", "a"]).tolist() == [0.0, 1.0, 0.0]


def test_majority_with_no_valid_completion_is_zero():
    assert majority(torch.tensor([0, 1]), torch.tensor([False]), answers=["a"]).tolist() == [0.0]


def test_majority_needs_no_token_statistic():
    assert stats_needed("majority") == ()
    got = scores().reward("majority", answers=["x", "x", "y", "x"])
    assert got.tolist() == [1.0, 1.0, 0.5, 0.5]


def test_nan_stays_in_its_completion():
    logprob = LOGPROB.clone()
    logprob[2] = float("nan")
    assert scores(logprob=logprob).reward("logprob").isnan().tolist() == [False, False, True, False]


def test_sum_does_not_drift_over_a_long_completion():
    n = 2**20
    logprob = torch.full((n,), -0.1)
    long = Scores.of(TokenStats(logprob=logprob), [[n]])
    assert long.reward("logprob").item() == logprob.double().sum().float().item()


def test_errors_name_what_is_wanted():
    one = scores(logprob=LOGPROB)
    with pytest.raises(InputError, match=r"`reward` must be one of logprob, .*, got 'best'\."):
        one.reward("best")
    with pytest.raises(InputError, match=r"needs the token statistic entropy.*stats=\('entropy',"):
        one.reward("neg_entropy")
    with pytest.raises(InputError, match=r"'majority' must get the options `answers`, got none"):
        one.reward("majority")
    with pytest.raises(InputError, match=r"'logprob' must get the options none, got `answers`"):
        one.reward("logprob", answers=ANSWERS)
    with pytest.raises(InputError, match=r"`answers` must hold .* N=4 completions, got 6;"):
        one.reward("majority", answers=ANSWERS)


def test_every_reward_says_its_unit_its_bias_and_its_source():
    for function in REWARDS.values():
        text = function.__doc__ or ""
        assert "reward[n] =" in text
        assert "Source:" in text
        assert "nats" in text or "[0, 1]" in text
        assert "long" in text or "short" in text or "length" in text
