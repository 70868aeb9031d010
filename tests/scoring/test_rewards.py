import math

import pytest
import torch

from sharpen import Scores
from sharpen.errors import InputError
from sharpen.scoring.rewards import (
    REWARDS,
    check_reward,
    majority,
    missing_inputs,
    options_needed,
    stats_needed,
)
from sharpen_kernels import TokenStats

# two prompts; completions of 2, 0, 1 and 3 tokens
LENGTHS = [[2, 0], [1, 3]]
LOGPROB = torch.tensor([-1.0, -2.0, -0.5, -1.0, -0.5, -3.0])
ENTROPY = torch.tensor([0.5, 1.5, 2.0, 0.0, 1.0, 2.0])
CERTAINTY = torch.tensor([2.0, 4.0, 5.0, 0.0, 1.0, 2.0])
# the geometric means of the probabilities are 1/4, 1/2 and 1/8
HALVES = torch.tensor([1, 3, 1, 3, 2, 4]) * -math.log(2.0)
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
        ("min_token", {"logprob": LOGPROB}, [-2.0, 0.0, -0.5, -3.0]),
        ("neg_perplexity", {"logprob": HALVES}, [-4.0, 0.0, -2.0, -8.0]),
        ("confidence", {"topk_mean": -CERTAINTY}, [3.0, 0.0, 5.0, 1.0]),
    ],
)
def test_hand_worked_values(name, stats, want):
    reward = scores(**stats).reward(name)
    assert reward.tolist() == pytest.approx(want, rel=1e-6, abs=0)
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


@pytest.mark.parametrize("name", [name for name in REWARDS if not options_needed(name)])
def test_nan_stays_in_its_completion(name):
    broken = LOGPROB.clone()
    broken[2] = float("nan")
    columns = dict.fromkeys(stats_needed(name), broken)
    assert scores(**columns).reward(name).isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("name", [name for name in REWARDS if not options_needed(name)])
def test_an_empty_completion_gets_zero(name):
    columns = dict.fromkeys(stats_needed(name), LOGPROB)
    assert scores(**columns).reward(name)[1].item() == 0


def test_options_a_reward_cannot_do_without():
    assert {name: options_needed(name) for name in REWARDS if options_needed(name)} == {
        "majority": ("answers",),
        "rpc": ("answers", "keys"),
    }


def test_perplexity_orders_as_the_mean_log_prob():
    one = Scores.of(TokenStats(logprob=-torch.rand(60) * 5), [[3] * 20])
    order = [one.reward(name).argsort().tolist() for name in ("neg_perplexity", "mean_logprob")]
    assert order[0] == order[1]


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
    with pytest.raises(InputError, match=r"'rpc' must get the options `answers`, `keys`, got `ans"):
        one.reward("rpc", answers=ANSWERS)
    sure = scores(logprob=LOGPROB, topk_mean=LOGPROB)
    with pytest.raises(InputError, match=r"options none and may get `window`, got `width`"):
        sure.reward("confidence_tail", width=3)
    with pytest.raises(InputError, match=r"'logprob' must get the options none, got `answers`"):
        one.reward("logprob", answers=ANSWERS)
    with pytest.raises(InputError, match=r"`answers` must hold .* N=4 completions, got 6;"):
        one.reward("majority", answers=ANSWERS)


@pytest.mark.parametrize(
    ("name", "have", "missing"),
    [
        ("logprob", {"stats": ()}, ("logprob",)),
        ("confidence", {"stats": ("logprob",)}, ("topk_mean",)),
        ("majority", {"stats": ()}, ("answers",)),
        ("rpc", {"stats": (), "options": ("keys",)}, ("logprob", "answers")),
        ("rpc", {"options": ("answers", "keys")}, ()),
        # options that can be left out are not missed
        ("confidence_tail", {}, ()),
    ],
)
def test_what_a_reward_lacks_is_named(name, have, missing):
    assert missing_inputs(name, **have) == missing
    if not missing:
        return check_reward(name, "unused", **have)
    with pytest.raises(InputError) as failure:
        check_reward(name, "which nobody has", argument="rewards", **have)
    wanted = f"`rewards` {name} needs {', '.join(missing)}, which nobody has."
    assert str(failure.value) == wanted


def test_a_reward_that_does_not_exist_is_rejected_beside_those_that_do():
    with pytest.raises(InputError, match=r"`rewards` must be one of logprob, .*, got 'best'\."):
        check_reward("best", "unused", argument="rewards")


def test_every_reward_says_its_unit_its_bias_and_its_source():
    for function in REWARDS.values():
        text = function.__doc__ or ""
        assert "reward[n] =" in text
        assert "Source:" in text
        assert "nats" in text or "[0, 1]" in text
        assert "long" in text or "short" in text or "length" in text
