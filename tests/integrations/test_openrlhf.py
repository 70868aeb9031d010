"""OpenRLHF's Python-file reward where a response has none."""

import pytest
import torch

from sharpen.errors import InputError, SharpenError
from sharpen.integrations import openrlhf
from sharpen.integrations.openrlhf import SelfReward, reward_func
from sharpen.models import load_model, load_tokenizer

PROMPT = "Numbers: 4 4 6 8 Target: 24\n"
TEXT = "8 + 4 = 12 left:"


def ask(function, *responses):
    return function([PROMPT + x for x in responses], [PROMPT] * len(responses), [])


def test_an_empty_response_is_refused_and_not_the_most_probable_of_all():
    with pytest.raises(SharpenError, match=r"at least one token .* set `unscorable_reward`"):
        ask(SelfReward("game24"), TEXT, "")


def test_one_beyond_the_context_gets_the_number_as_well():
    long = TEXT * 400
    with pytest.raises(SharpenError, match="context"):
        ask(SelfReward("game24"), long)
    found = ask(SelfReward("game24", unscorable_reward=-30.0), TEXT, long)
    assert found["rewards"][1] == -30
    assert found["extra_logs"]["unscorable"].tolist() == [0, 1]


def test_a_response_without_a_reward_gets_the_number_and_the_others_keep_theirs(caplog):
    function = SelfReward("game24", unscorable_reward=-30.0)
    found = ask(function, "", TEXT, "")
    assert found["scores"] is found["rewards"]
    (want,) = ask(function, TEXT)["rewards"]
    torch.testing.assert_close(found["rewards"], torch.tensor([-30.0, want, -30.0]))
    logs = found["extra_logs"]
    assert logs["n_tokens"].tolist()[::2] == [0, 0]
    assert logs["logprob"].tolist() == [0, want, 0]
    assert logs["unscorable"].tolist() == [1, 0, 1]
    # once
    assert caplog.text.count("it gets `unscorable_reward`, -30") == 1


def test_so_does_one_of_log_probs_that_are_not_finite(caplog):
    model = load_model("game24", device="cpu")
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    given = {"tokenizer": load_tokenizer("game24"), "reward": "mean_logprob"}
    with pytest.raises(SharpenError, match="the log-prob of token 0 is nan"):
        ask(SelfReward(model, **given), TEXT)
    found = ask(SelfReward(model, **given, unscorable_reward=-5.0), TEXT)
    assert found["rewards"].tolist() == [-5]
    assert "the log-prob of token 0 is nan" in caplog.text


def test_the_number_comes_from_the_environment(monkeypatch):
    openrlhf._opened.cache_clear()
    monkeypatch.setenv("SHARPEN_MODEL", "game24")
    monkeypatch.setenv("SHARPEN_UNSCORABLE_REWARD", "-12.5")
    assert ask(reward_func, "")["rewards"].tolist() == [-12.5]
    for bad in ("low", "nan", "-inf"):
        monkeypatch.setenv("SHARPEN_UNSCORABLE_REWARD", bad)
        with pytest.raises(InputError, match="UNSCORABLE_REWARD must be a finite number, got"):
            ask(reward_func, TEXT)


@pytest.mark.parametrize("given", [float("nan"), float("inf")])
def test_it_must_be_finite(given):
    with pytest.raises(InputError, match="`unscorable_reward` must be a finite number, or left"):
        SelfReward("game24", unscorable_reward=given)
