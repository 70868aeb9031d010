"""Self-rewards as a trainer calls them, without a trainer."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from sharpen.errors import InputError
from sharpen.integrations.trl import SelfReward, self_reward
from sharpen.integrations.trl.batches import group_deviation, group_sizes, normalised, prompt_tokens
from sharpen.integrations.trl.rewards import EnvironmentReward, reward_from
from sharpen.models import load_model, load_tokenizer
from sharpen.scoring import Scorer

PROMPTS = ["Numbers: 4 4 6 8 Target: 24\n"] * 3 + ["Numbers: 1 2 3 4 Target: 24\n"] * 2
TEXTS = ["8 + 4", "4 * 6", "8 * 4 =", "1 + 2", "4 - 1"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}24{% endif %}"


@pytest.fixture(scope="module")
def model():
    return load_model("game24", device="cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("game24")


@pytest.fixture(scope="module")
def ids(tokenizer):
    return [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]


def wanted(model, tokenizer, ids, name, **options):
    """By a scorer, groups made by hand."""
    prompts = [tokenizer.encode(PROMPTS[i]) for i in (0, 3)]
    needs = {"self_certainty": ("self_certainty",), "mean_logprob": ("logprob",)}
    scores = Scorer(model).score(prompts, [ids[:3], ids[3:]], stats=needs.get(name, ("logprob",)))
    return scores.reward(name, **options)


def test_one_object_is_both_function_and_callback(model):
    reward = SelfReward()
    assert isinstance(reward, TrainerCallback)
    assert reward.__name__ == "self_reward_logprob"
    for one in (reward, self_reward):
        # axolotl counts them
        assert list(inspect.signature(one).parameters)[:3] == [
            "prompts",
            "completions",
            "completion_ids",
        ]


@pytest.mark.parametrize("name", ["logprob", "mean_logprob", "self_certainty"])
def test_rewards_are_the_scorers(model, tokenizer, ids, name):
    reward = SelfReward(name, under=model, tokenizer=tokenizer)
    got = reward(prompts=PROMPTS, completions=TEXTS, completion_ids=ids, trainer_state=None)
    torch.testing.assert_close(torch.tensor(got), wanted(model, tokenizer, ids, name))


def test_under_a_path_no_trainer_is_needed(model, tokenizer, ids):
    got = SelfReward(under="game24", tokenizer=tokenizer)(PROMPTS, TEXTS, ids)
    torch.testing.assert_close(torch.tensor(got), wanted(model, tokenizer, ids, "logprob"))


def test_a_prompt_is_read_once(model, tokenizer, ids):
    reward = SelfReward(under=model, tokenizer=tokenizer)
    reward(PROMPTS, TEXTS, ids)
    read = []
    handle = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    reward(PROMPTS, TEXTS, ids)
    handle.remove()
    # shared openings of completions and of both prompts make it fewer still
    assert sum(read) <= 2 * len(tokenizer.encode(PROMPTS[0])) + sum(map(len, ids))


@pytest.mark.parametrize("make", [list, np.array, torch.tensor], ids=lambda f: f.__name__)
def test_ids_that_come_along_are_taken_instead_of_text(make, model, tokenizer, ids):
    # of one length each, a whole tensor
    prompt_ids = make([tokenizer.encode(text) for text in PROMPTS])
    for name in ("prompt_ids", "prompt_token_ids"):
        reward = SelfReward(under=model)
        got = reward(["never", "read"] + [""] * 3, TEXTS, ids, **{name: prompt_ids})
        torch.testing.assert_close(torch.tensor(got), wanted(model, tokenizer, ids, "logprob"))


def test_normalised_within_each_group(model, tokenizer, ids):
    got = SelfReward(under=model, tokenizer=tokenizer, normalize=True)(PROMPTS, TEXTS, ids)
    raw = wanted(model, tokenizer, ids, "logprob")
    parts = [(x - x.mean()) / (x.std() + 1e-4) for x in (raw[:3], raw[3:])]
    torch.testing.assert_close(torch.tensor(got), torch.cat(parts))


def test_groups_and_their_statistics():
    assert group_sizes([[1], [1], [2], [1]]) == [2, 1, 1]
    assert group_sizes([]) == []
    groups, nan = torch.tensor([0, 3, 4, 6]), float("nan")
    reward = torch.tensor([1.0, nan, 3.0, 7.0, nan, -torch.inf])
    assert group_deviation(reward, groups) == pytest.approx(2**0.5)
    got = normalised(reward, groups).tolist()
    assert got[:1] + got[2:4] == pytest.approx([-0.70701, 0.70701, 0.0], abs=1e-4)
    assert torch.tensor(got)[[1, 4]].isnan().all()


def test_votes(model, tokenizer, ids):
    reward = SelfReward("majority", under=model, tokenizer=tokenizer, answer=lambda t: t[0])
    assert reward(PROMPTS, TEXTS, ids) == pytest.approx([2 / 3, 1 / 3, 2 / 3, 0.5, 0.5])


def test_votes_on_messages_and_on_probability(model, tokenizer, ids):
    texts = [[{"role": "assistant", "content": text}] for text in TEXTS]
    reward = SelfReward("rpc", under=model, tokenizer=tokenizer, answer=lambda t: t[0])
    raw = wanted(model, tokenizer, ids, "logprob")
    got = torch.tensor(reward(PROMPTS, texts, ids))
    torch.testing.assert_close(got[0], raw[[0, 2]].logsumexp(0))
    torch.testing.assert_close(got[3:], raw[3:])


def test_what_cannot_be_scored_is_left_out(model, tokenizer, ids):
    reward = SelfReward(under=model, tokenizer=tokenizer)
    logged = {}
    got = reward(PROMPTS, TEXTS, [ids[0], [], *ids[2:]], log_metric=logged.__setitem__)
    assert [x is None for x in got] == [False, True, False, False, False]
    assert logged["self_reward/logprob/unscored"] == pytest.approx(0.2)
    kept = torch.tensor([x for x in got if x is not None])
    assert logged["self_reward/logprob/mean"] == pytest.approx(kept.mean().item())
    groups = kept[:2].std() + kept[2:].std()
    assert logged["self_reward/logprob/group_std"] == pytest.approx(groups.item() / 2)


def test_sampler_logprobs_need_no_model():
    given = [[-1.0, -2.0], [-0.5], [None, -1.0]]
    for name in ("completion_logprobs", "sampler_logprobs"):
        reward = SelfReward("mean_logprob")
        got = reward(["a", "a", "b"], ["x"] * 3, [[1, 2], [3], [4, 5]], **{name: given})
        assert got == [-1.5, -0.5, None]


def test_sampler_logprobs_are_those_of_the_policy_alone(model, tokenizer, ids):
    given = [[-1.0] * len(row) for row in ids]
    frozen = SelfReward(under=model, tokenizer=tokenizer)
    got = frozen(PROMPTS, TEXTS, ids, completion_logprobs=given)
    torch.testing.assert_close(torch.tensor(got), wanted(model, tokenizer, ids, "logprob"))
    # and say nothing of a whole distribution
    with pytest.raises(InputError, match="needs the trainer's model"):
        SelfReward("self_certainty", tokenizer=tokenizer)(
            PROMPTS, TEXTS, ids, completion_logprobs=given
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[-1.0]], "one list for each of 2 completions, got 1"),
        ([[-1.0], [-1.0, -1.0]], r"`completion_logprobs`\[1\] must hold one number"),
        ([[[-1.0]], [-1.0]], "got lists"),
        ([None, [-1.0]], "got 0"),
    ],
)
def test_sampler_logprobs_are_checked(given, message):
    with pytest.raises(InputError, match=message):
        SelfReward()(["a", "b"], ["x"] * 2, [[1], [2]], completion_logprobs=given)


def test_messages_go_through_the_template(tokenizer):
    tokenizer.chat_template = TEMPLATE
    messages = [[{"role": "user", "content": "4 8"}], [{"role": "user", "content": "3"}]]
    got = prompt_tokens(messages, tokenizer, {})
    assert got == [tokenizer.encode(text, add_special_tokens=False) for text in ("4 8 24", "3 24")]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a", [{"role": "user", "content": "b"}]], "must all be text or all lists"),
        ([[{"role": "user", "content": [{"type": "image"}]}]], "got a message with an image"),
    ],
)
def test_prompts_are_checked(tokenizer, prompts, message):
    with pytest.raises(InputError, match=message):
        prompt_tokens(prompts, tokenizer, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reward": "nice"}, "`reward` must be one of"),
        ({"reward": "majority"}, "needs `answer=`"),
    ],
)
def test_construction_is_checked(arguments, message):
    with pytest.raises(InputError, match=message):
        SelfReward(**arguments)


def test_calls_are_checked(model, ids):
    with pytest.raises(InputError, match="`completion_ids` must come"):
        SelfReward(under=model)(PROMPTS, TEXTS)
    with pytest.raises(InputError, match="one list for each of 5 prompts, got 2"):
        SelfReward(under=model)(PROMPTS, TEXTS, ids[:2])
    with pytest.raises(InputError, match="`prompt_ids` must hold one list for each of 5"):
        SelfReward(under=model)(PROMPTS, TEXTS, ids, prompt_ids=torch.tensor([[5]]))
    with pytest.raises(InputError, match="prompts need a tokenizer"):
        SelfReward(under=model)(PROMPTS, TEXTS, ids)


def test_groups_cut_between_processes_are_refused(model, tokenizer, ids):
    reward = SelfReward(under=model, tokenizer=tokenizer, normalize=True)
    reward.on_train_begin(SimpleNamespace(num_generations=4, world_size=2), None, None)
    with pytest.raises(InputError, match="all 4 completions of a prompt in one process, got 2"):
        reward(PROMPTS, TEXTS, ids)


def test_set_up_by_the_environment(ids, monkeypatch):
    monkeypatch.setenv("SHARPEN_REWARD", "majority")
    monkeypatch.setenv("SHARPEN_REWARD_UNDER", "game24")
    monkeypatch.setenv("SHARPEN_REWARD_ANSWER", "string.capwords")
    reward = EnvironmentReward()
    reward.reward.tokenizer = load_tokenizer("game24")
    assert reward(PROMPTS, TEXTS, ids) == pytest.approx([1 / 3] * 3 + [1 / 2] * 2)
    assert reward.__name__ == "self_reward"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SHARPEN_REWARD_UNDR": "base"}, "got SHARPEN_REWARD_UNDR"),
        ({"SHARPEN_REWARD_NORMALIZE": "yes"}, "must be 0 or 1"),
        ({"SHARPEN_REWARD_MAX_TOKENS": "-1"}, "a number above 0"),
        ({"SHARPEN_REWARD": "majority", "SHARPEN_REWARD_ANSWER": "no.such"}, "dotted path"),
        ({"SHARPEN_REWARD": "majority"}, "needs `answer=`"),
    ],
)
def test_the_environment_is_checked(variables, message):
    with pytest.raises(InputError, match=message):
        reward_from(variables)
