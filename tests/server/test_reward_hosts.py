import pytest

from helpers.server_desk import PROMPT, RIGHT, WRONG, answered, desk, scorer
from sharpen.errors import InputError, SharpenError
from sharpen.integrations.openrlhf import SelfReward, reward_func
from sharpen.server.errors import HTTPError
from sharpen.server.routes import read_evaluation, read_get_reward
from sharpen.server.state import query_rewards
from sharpen.server.text import Texts

QUERIES = {"query": [PROMPT + RIGHT, PROMPT + WRONG], "prompts": [PROMPT] * 2, "labels": [1, None]}


def reward(prompt, completion, name="logprob"):
    tokenizer = scorer().tokenizer
    ids = (tokenizer.encode(x, add_special_tokens=False) for x in (prompt, completion))
    prompt_ids, completion_ids = ids
    return scorer().score([prompt_ids], [[completion_ids]]).reward(name).item()


def test_openrlhf_gets_the_reward_of_what_follows_each_prompt():
    found = answered(read_get_reward(QUERIES, desk()))
    want = [reward(PROMPT, RIGHT), reward(PROMPT, WRONG)]
    assert found["rewards"] == pytest.approx(want, abs=1e-4)
    assert found["scores"] == found["rewards"] == found["extra_logs"]["logprob"]
    assert found["extra_logs"]["n_tokens"] == [24.0, 24.0]


def test_a_prompt_may_be_spelt_as_the_tokenizer_decodes_it():
    loose = PROMPT.replace("Numbers: ", "Numbers:  ")
    found = answered(read_get_reward({"query": [PROMPT + RIGHT], "prompts": [loose]}, desk()))[
        "rewards"
    ]
    assert found == pytest.approx([reward(PROMPT, RIGHT)], abs=1e-4)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"query": [RIGHT, PROMPT]}, "`query[0]` must begin with its prompt"),
        ({"prompts": [PROMPT]}, "`prompts` must be a list of 2, one a query, got '1 of them'"),
        ({"query": "x"}, "`query` must be a list of texts"),
        ({"query": ["\ud800", ""]}, "`query[0]` must be valid Unicode"),
        ({"prompts": [PROMPT, 3]}, "`prompts[1]` must be text, got 3"),
        ({"query": [""], "prompts": [""]}, "query[0]: the prompt must hold at least one token"),
    ],
)
def test_what_openrlhf_may_send_wrong_is_told_by_name(change, told):
    with pytest.raises(SharpenError) as refused:
        read_get_reward(QUERIES | change, desk())
    assert told in str(refused.value)


def test_a_conversation_without_a_template_is_scored_from_its_second_token():
    found = answered(read_evaluation({"model": "model", "messages": [PROMPT + RIGHT]}, desk()))
    ids = scorer().tokenizer.encode(PROMPT + RIGHT, add_special_tokens=False)
    want = scorer().score([ids[:1]], [[ids[1:]]]).reward("logprob").item()
    assert found["scores"] == pytest.approx([want], abs=1e-4)


def test_a_conversation_is_scored_from_its_last_answer_on(monkeypatch):
    tokenizer = scorer().tokenizer
    template = (
        "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'left: ' }}{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    at = desk()
    assert Texts(tokenizer).before_answer == "left: "
    whole = "Numbers: 4 4 left: 8 8 left: 12 - 4"
    found = answered(read_evaluation({"messages": [whole]}, at))["scores"]
    want = reward("Numbers: 4 4 left: 8 8 left: ", "12 - 4")
    assert found == pytest.approx([want], abs=1e-5)


def test_the_file_for_openrlhf_rates_what_its_threads_ask(monkeypatch):
    with pytest.raises(InputError, match="SHARPEN_MODEL must name the model"):
        reward_func(QUERIES["query"], QUERIES["prompts"], [])
    with pytest.raises(InputError, match="`reward` must be one of logprob"):
        SelfReward("game24", reward="majority")
    monkeypatch.setenv("SHARPEN_MODEL", "game24")
    monkeypatch.setenv("SHARPEN_REWARD", "mean_logprob")
    found = reward_func(QUERIES["query"], QUERIES["prompts"], [None, None], more=1)
    want = [reward(PROMPT, RIGHT, "mean_logprob"), reward(PROMPT, WRONG, "mean_logprob")]
    assert found["rewards"].tolist() == pytest.approx(want, abs=1e-5)
    assert found["scores"] is found["rewards"]
    assert found["extra_logs"]["n_tokens"].tolist() == [24.0, 24.0]
    with pytest.raises(SharpenError, match="must begin with its prompt"):
        reward_func([RIGHT], [PROMPT], [None])


@pytest.mark.parametrize(
    ("queries", "prompts", "told"),
    [
        ([PROMPT + RIGHT, None], [PROMPT, PROMPT], "`query[1]` must be text, got None"),
        ([PROMPT + RIGHT], [[1, 5]], "`prompts[0]` must be text, got list"),
        ([b"8"], [PROMPT], "`query[0]` must be text, got bytes"),
    ],
)
def test_what_a_trainer_hands_over_is_checked_without_a_request(queries, prompts, told):
    with pytest.raises(HTTPError) as refused:
        query_rewards(queries, prompts, desk())
    assert told in str(refused.value)
