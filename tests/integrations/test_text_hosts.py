"""Adapters of hosts that are not installed here: what their contracts hand over and want back.

The contract here is verl's (0.9.1, wheel read); test_ms_swift and test_nemo_rl have theirs.
"""

import asyncio
import inspect

import pytest
import torch

from sharpen.errors import InputError
from sharpen.integrations import ms_swift, nemo_rl, verl, verl_manager

PROMPT = "Numbers: 4 4 6 8 Target: 24\n"
TEXTS = ["8 + 4 = 12 left: 4 6 12\n6 - 4 = 2 left: 2 12\n12 * 2 = 24", "8 * 4 = 32 left: 4 6 32"]
OPTIONS = {"model": "game24", "device": "cpu"}


def expected(scorer, texts, *, add_eos):
    return scorer.score_text([PROMPT], [texts], add_eos=add_eos).reward("logprob").tolist()


def score_all(prompt, texts, **options):
    async def run():
        # the keywords that verl's managers call with
        calls = [
            verl.compute_score(
                data_source="game24",
                solution_str=text,
                ground_truth="24",
                extra_info={"prompt": prompt, "num_turns": None, "rollout_reward_scores": {}},
                **OPTIONS,
                **options,
            )
            for text in texts
        ]
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


def test_verl_manager_does_not_rate_words_of_tools_as_the_models_own():
    batch = {
        "prompts": torch.tensor([0, 5, 6]),
        "responses": torch.tensor([7, 8, 2, 0]),
        "attention_mask": torch.tensor([0, 1, 1, 1, 1, 1, 0]),
        "response_mask": torch.tensor([1, 1, 1, 0]),
    }
    # padding is no word of a tool
    assert verl_manager.response_ids(batch) == ([5, 6], [7, 8, 2])
    batch["response_mask"] = torch.tensor([1, 0, 1, 0])
    with pytest.raises(InputError, match="got 1 of 3 that are words of tools"):
        verl_manager.response_ids(batch)


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


def test_verl_a_response_without_a_reward_fails_alone_or_gets_the_number_for_it(caplog):
    texts = [TEXTS[0], ""]
    # verl gathers without return_exceptions, and so ends here
    with pytest.raises(InputError, match="set `unscorable_reward` to what such a response"):
        score_all(PROMPT, texts, add_eos=False)
    (good,) = score_all(PROMPT, texts[:1], add_eos=False)
    found = score_all(PROMPT, [*texts, ""], add_eos=False, unscorable_reward=-100)
    assert found[0]["score"] == pytest.approx(good["score"], abs=1e-4)
    assert [one["score"] for one in found[1:]] == [-100.0, -100.0]
    assert found[1]["self_reward"] == -100
    assert caplog.text.count("it gets `unscorable_reward`, -100") == 1
