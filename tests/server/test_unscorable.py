"""Samples without a reward: refused by name, or given the reward that was chosen for them."""

import logging
from dataclasses import replace

import pytest
import torch

from helpers.server_desk import PROMPT, RIGHT, answered, desk, scorer
from sharpen.errors import InputError, SharpenError
from sharpen.models import ModelLimits
from sharpen.server.routes import read_evaluation, read_get_reward
from sharpen.server.text import Texts
from sharpen.server.unscorable import UnscorableReward
from sharpen_kernels import TokenStats

LONG = "8 " * 1100
GOOD = PROMPT + RIGHT


def openrlhf(*queries):
    return {"query": list(queries), "prompts": [PROMPT] * len(queries)}


def given(reward):
    """A desk that answers `reward`, and the causes it has been told."""
    causes = []
    return replace(desk(), unscorable=UnscorableReward(reward, causes.append)), causes


@pytest.mark.parametrize(
    ("read", "body", "told"),
    [
        (read_get_reward, openrlhf(GOOD, PROMPT), "`query[1]` must hold at least one token after"),
        (read_evaluation, {"messages": [GOOD, "8"]}, "`messages[1]` must hold at least one token"),
        (
            read_get_reward,
            openrlhf(GOOD, PROMPT + LONG),
            "query[1]: prompt and completion must fit",
        ),
        (read_evaluation, {"messages": [LONG]}, "messages[0]: prompt and completion must fit"),
    ],
)
def test_a_sample_that_cannot_be_rated_is_refused_by_name(read, body, told):
    with pytest.raises(SharpenError) as refused:
        read(body, desk())
    assert told in str(refused.value)


def test_openrlhf_gets_the_chosen_reward_beside_real_ones(caplog):
    at, causes = given(-500.0)
    body = openrlhf(PROMPT, GOOD, PROMPT + LONG, PROMPT, GOOD)
    with caplog.at_level(logging.WARNING, "sharpen"):
        found = answered(read_get_reward(body, at))
    (want,) = answered(read_get_reward(openrlhf(GOOD), desk()))["rewards"]
    want = pytest.approx([-500.0, want, -500.0, -500.0, want], abs=1e-4)
    assert found["rewards"] == want
    assert found["scores"] == found["rewards"]
    logs = found["extra_logs"]
    assert logs["unscorable"] == [1.0, 0.0, 1.0, 1.0, 0.0]
    assert logs["n_tokens"] == [0.0, 24.0, 0.0, 0.0, 24.0]
    assert logs["logprob"][1] == found["rewards"][1]
    assert causes == ["empty", "too_long", "empty"]
    # once a cause
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "-500" in told[0]
    assert "a response has no reward (`query[0]` must hold at least one" in told[0]
    assert "a response has no reward (query[2]: prompt and completion must fit" in told[1]


def test_llama_factory_gets_the_chosen_reward_beside_real_ones():
    at, causes = given(-3.5)
    found = answered(read_evaluation({"messages": ["8", GOOD, LONG]}, at))["scores"]
    (want,) = answered(read_evaluation({"messages": [GOOD]}, desk()))["scores"]
    assert found == pytest.approx([-3.5, want, -3.5], abs=1e-4)
    assert causes == ["empty", "too_long"]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_log_prob_that_is_no_number(value):
    broken = TokenStats(logprob=torch.tensor([-1.0, value]))
    body = openrlhf(PROMPT + "8 +")
    with pytest.raises(SharpenError, match=r"`query\[0\]`: the log-prob of token 1 is"):
        read_get_reward(body, desk()).answer([broken])
    at, causes = given(-7.0)
    found = read_get_reward(body, at).answer([broken])
    assert found["rewards"] == [-7.0]
    assert set(map(tuple, found["extra_logs"].values())) == {(0.0,), (1.0,)}
    assert causes == ["not_finite"]


def test_a_reward_that_overflows_is_no_number():
    at, causes = given(-7.0)
    # exp of 1000 nats a token
    tokens = TokenStats(logprob=torch.tensor([-1000.0]))
    body = openrlhf(PROMPT + "8")
    with pytest.raises(SharpenError, match=r"`query\[0\]`: neg_perplexity is -inf"):
        read_get_reward(body, replace(desk(), reward="neg_perplexity")).answer([tokens])
    found = read_get_reward(body, replace(at, reward="neg_perplexity")).answer([tokens])
    assert found["rewards"] == [-7.0]
    assert causes == ["not_finite"]


def test_a_text_too_long_to_be_tokenised_is_too_long():
    at, causes = given(-7.0)
    short = replace(at, texts=Texts(scorer().tokenizer, max_chars=100))
    body = openrlhf(GOOD, PROMPT + "8 " * 60)
    found = answered(read_get_reward(body, short))
    assert found["rewards"][1] == -7.0 < found["rewards"][0]
    assert causes == ["too_long"]
    refused = replace(desk(), texts=short.texts)
    with pytest.raises(SharpenError, match=r"`query\[1\]` must have at most 100 characters, got 1"):
        read_get_reward(body, refused)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"query": [RIGHT]}, "must begin with its prompt"),
        ({"query": [""], "prompts": [""]}, "the prompt must hold at least one token"),
        ({"query": [3]}, "`query[0]` must be text"),
    ],
)
def test_a_wrong_set_up_is_refused_all_the_same(change, told):
    at, causes = given(-1.0)
    with pytest.raises(SharpenError) as refused:
        read_get_reward(openrlhf(GOOD) | change, at)
    assert told in str(refused.value)
    other = replace(at, model=ModelLimits(vocab_size=10, max_length=1024))
    with pytest.raises(SharpenError, match=r"token ids must be in \[0, 10\)"):
        read_get_reward(openrlhf(GOOD), other)
    assert causes == []


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_the_chosen_reward_is_a_number(reward):
    with pytest.raises(InputError, match="`unscorable_reward` must be a finite number, got"):
        UnscorableReward(reward)


def test_a_text_of_the_whole_context_is_rated():
    n = 1024 - len(scorer().tokenizer.encode(PROMPT, add_special_tokens=False))
    text = PROMPT + "8 " * (n + 1)
    (job,) = read_get_reward(openrlhf(text), desk()).jobs
    assert job.n_tokens == 1025
    with pytest.raises(SharpenError, match="= 1026"):
        read_get_reward(openrlhf(text + "8 "), desk())
