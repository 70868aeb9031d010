"""Adapters of hosts that are not installed here: what their contracts hand over and want back.

The contracts are those of verl 0.9.1 and ms-swift 4.6.0 (wheels read) and of NeMo-RL's
environments/interfaces.py (read): each test says which.
"""

import asyncio
import inspect
import sys
import types

import pytest
import torch

from sharpen.errors import InputError
from sharpen.integrations import ms_swift, nemo_rl, verl, verl_manager
from sharpen.integrations.rating import Rating, rate_by
from sharpen.scoring import Scorer

PROMPT = "Numbers: 4 4 6 8 Target: 24\n"
TEXTS = ["8 + 4 = 12 left: 4 6 12\n6 - 4 = 2 left: 2 12\n12 * 2 = 24", "8 * 4 = 32 left: 4 6 32"]
OPTIONS = {"model": "game24", "device": "cpu"}


@pytest.fixture(scope="module")
def scorer():
    return Scorer("game24", device="cpu")


def expected(scorer, texts, *, add_eos):
    return scorer.score_text([PROMPT], [texts], add_eos=add_eos).reward("logprob").tolist()


def score_all(prompt, texts, **options):
    async def run():
        # the keywords that verl's managers call with
        calls = [
            verl.compute_score(
                data_source="game24", solution_str=text, ground_truth="24",
                extra_info={"prompt": prompt, "num_turns": None, "rollout_reward_scores": {}},
                **OPTIONS, **options,
            )
            for text in texts
        ]  # fmt: skip
        return await asyncio.gather(*calls)

    return asyncio.run(run())


@pytest.mark.parametrize("add_eos", [True, False])
def test_verl_function_rates_a_prompt_and_a_text(scorer, add_eos):
    found = score_all(PROMPT, TEXTS, **({} if add_eos else {"add_eos": False}))
    assert [set(one) for one in found] == [{"score", "self_reward"}] * 2
    wanted = expected(scorer, TEXTS, add_eos=add_eos)
    assert [one["score"] for one in found] == pytest.approx(wanted, abs=1e-4)


def test_verl_function_is_a_coroutine_with_verls_arguments():
    # verl awaits what inspect calls a coroutine function, and runs others in threads
    assert inspect.iscoroutinefunction(verl.compute_score)
    names = list(inspect.signature(verl.compute_score).parameters)
    assert names[:4] == ["data_source", "solution_str", "ground_truth", "extra_info"]
    # added where a reward model is served
    assert {"reward_router_address", "reward_model_tokenizer"} <= set(names)


def test_verl_function_needs_the_prompt():
    async def run():
        return await verl.compute_score("d", "text", "24", {"question": "?"}, **OPTIONS)

    with pytest.raises(InputError, match="`extra_info` must hold the prompt under 'prompt'"):
        asyncio.run(run())


def test_verl_padding_is_left_out():
    batch = {
        "prompts": torch.tensor([0, 0, 5, 6]),
        "responses": torch.tensor([7, 2, 0]),
        "attention_mask": torch.tensor([0, 0, 1, 1, 1, 1, 0]),
    }
    assert verl_manager.response_ids(batch) == ([5, 6], [7, 2])
    # padding is what the mask says, not what the id is
    batch["attention_mask"] = torch.tensor([0, 1, 1, 1, 1, 1, 1])
    assert verl_manager.response_ids(batch) == ([0, 5, 6], [7, 2, 0])


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: verl_manager.SelfRewardManager, "`pip install verl`"),
        (lambda: ms_swift.self_reward(**OPTIONS), "`pip install ms-swift`"),
        (lambda: nemo_rl.SelfRewardEnvironment, "NeMo-RL is not installed here"),
    ],
)
def test_a_missing_host_is_told_with_its_command(ask, message):
    with pytest.raises(InputError) as told:
        ask()
    assert message in str(told.value)


@pytest.mark.parametrize("module", [verl_manager, nemo_rl])
def test_other_names_are_not_there(module):
    assert not hasattr(module, "NoSuchClass")


CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture
def swift(monkeypatch):
    """`swift.rewards.orm.ORM` as the wheel has it: made with args, called with keywords."""

    class ORM:
        def __init__(self, args=None, **kwargs):
            self.args = args

        def __call__(self, **kwargs):
            raise NotImplementedError

    orm = types.ModuleType("swift.rewards.orm")
    orm.ORM = ORM
    for name in ("swift", "swift.rewards"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "swift.rewards.orm", orm)
    return ORM


def chatting(scorer, monkeypatch):
    monkeypatch.setattr(scorer.tokenizer, "chat_template", CHAT)
    return scorer.tokenizer


def test_ms_swift_class_is_made_and_called_as_ms_swift_does(swift, scorer):
    made = ms_swift.self_reward(**OPTIONS)
    assert issubclass(made, swift)
    assert made(args="their arguments").args == "their arguments"
    # compute_rewards_per_func: func(completions, trainer_state=..., **columns of the rows)
    bound = inspect.signature(made.__call__).bind(
        made(), TEXTS, trainer_state=None, messages=[], response_token_ids=[], prompt_id=[],
        request_id=[], finish_reason=[], is_truncated=[], rollout_infos=[], solution=[],
    )  # fmt: skip
    assert bound.arguments["completions"] == TEXTS


def test_ms_swift_rows_are_rated_in_place(scorer, monkeypatch):
    tokenizer = chatting(scorer, monkeypatch)
    rate = rate_by(Rating(**OPTIONS), scorer)
    other = "Numbers: 1 2 3 4 Target: 24\n"
    order = [(PROMPT, TEXTS[0]), (other, TEXTS[1]), (PROMPT, TEXTS[1])]
    messages = [
        [{"role": "user", "content": p}, {"role": "assistant", "content": t}] for p, t in order
    ]
    texts = [text for _, text in order]
    found = ms_swift.rate_rows(tokenizer, rate, texts, messages)
    wanted = [
        scorer.score(
            [tokenizer(p, add_special_tokens=False)["input_ids"]],
            [[tokenizer(t, add_special_tokens=False)["input_ids"]]],
        ).reward("logprob").item()
        for p, t in order
    ]  # fmt: skip
    assert found == pytest.approx(wanted, abs=1e-4)
    # ids of the rollout are taken as they are: the last turn's, or those of a single turn
    ids = [5, 9, 2]
    kept = ms_swift.rate_rows(tokenizer, rate, texts, messages, [[ids], ids, []])
    assert kept[2] == pytest.approx(wanted[2], abs=1e-4)
    prompt = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    own = scorer.score([prompt], [[ids]]).reward("logprob").item()
    assert kept[0] == pytest.approx(own, abs=1e-4)
    with pytest.raises(InputError, match="one conversation a completion, 3, got 2"):
        ms_swift.rate_rows(tokenizer, rate, texts, messages[:2])


@pytest.fixture
def nemo(monkeypatch):
    """The two names of nemo_rl.environments.interfaces, and a `ray` that leaves classes alone."""
    from typing import Any, NamedTuple

    class EnvironmentReturn(NamedTuple):
        observations: list
        metadata: list
        next_stop_strings: list
        rewards: Any
        terminateds: Any
        answers: Any = None

    interfaces = types.ModuleType("nemo_rl.environments.interfaces")
    interfaces.EnvironmentInterface = type("EnvironmentInterface", (), {})
    interfaces.EnvironmentReturn = EnvironmentReturn
    ray = types.ModuleType("ray")
    ray.remote = lambda cls: cls
    for name in ("nemo_rl", "nemo_rl.environments"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "nemo_rl.environments.interfaces", interfaces)
    monkeypatch.setitem(sys.modules, "ray", ray)
    yield
    nemo_rl._environment.cache_clear()


def test_nemo_rl_environment_ends_each_episode_with_its_reward(nemo, scorer):
    environment = nemo_rl.SelfRewardEnvironment(OPTIONS)
    text = "<s>" + PROMPT
    logs = [[{"role": "user", "content": text}, {"role": "assistant", "content": t}] for t in TEXTS]
    told = environment.step(logs, [{"a": 1}, {"a": 2}])
    tokenizer = scorer.tokenizer
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == tokenizer(PROMPT)["input_ids"]
    assert told.rewards.tolist() == pytest.approx(expected(scorer, TEXTS, add_eos=True), abs=1e-4)
    assert told.terminateds.tolist() == [1, 1]
    assert told.metadata == [{"a": 1}, {"a": 2}]
    assert [len(x) for x in (told.observations, told.next_stop_strings)] == [2, 2]
    batch = {"rewards": told.rewards}
    same, metrics = environment.global_post_process_and_metrics(batch)
    assert same is batch
    assert metrics["self_reward/mean"] == pytest.approx(told.rewards.mean().item())


def rate_nothing(prompts, completions):
    raise AssertionError("nothing to rate")


@pytest.mark.parametrize(
    "roles", [["user"], ["assistant"], ["user", "assistant", "user", "assistant"], []]
)
def test_nemo_rl_conversations_of_many_turns_are_refused(roles):
    log = [{"role": role, "content": "1"} for role in roles]
    with pytest.raises(InputError, match=r"message_log_batch\[0\] must be a prompt and one"):
        nemo_rl.rate_logs(types.SimpleNamespace(eos_token_id=None), rate_nothing, [log])
