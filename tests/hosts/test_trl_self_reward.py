"""GRPO and RLOO with the model's own probabilities as the reward."""

import logging

import pytest
import torch
from peft import LoraConfig

from helpers.trl_tiny import PROMPTS, online, saved
from sharpen.errors import InputError
from sharpen.integrations.trl import SelfReward
from sharpen.models import load_tokenizer, resolve_model
from sharpen.scoring import Scorer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    # of TRL, about its rollouts
    pytest.mark.filterwarnings("ignore:.*rollout_func.*"),
]
PUZZLES = [f"Numbers: {n} Target: 24\n" for n in ("4 4 6 8", "1 2 3 4", "3 3 8 8", "2 5 7 9")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"))


def rewarded(trainer):
    """The mean reward of each step."""
    trainer.train()
    return [row["reward"] for row in trainer.state.log_history if "reward" in row]


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_the_self_reward_of_the_frozen_base_rises(kind, tmp_path):
    reward = SelfReward("logprob", under="base")
    trainer = online(
        kind,
        resolve_model("game24"),
        tmp_path,
        shared=True,
        reward=reward,
        callbacks=[reward],
        prompts=PUZZLES,
        max_steps=20,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        num_generations=8,
        per_device_train_batch_size=32,
        max_completion_length=44,
    )
    found = torch.tensor(rewarded(trainer))
    assert len(found) == 20
    # nats of the base, which the policy left
    assert found[-5:].mean() > found[:5].mean() + 0.5
    last = [row for row in trainer.state.log_history if "reward" in row][-1]
    assert last["self_reward/logprob/mean"] == pytest.approx(found[-1].item(), abs=1e-4)
    assert last["rewards/self_reward_logprob/mean"] == pytest.approx(found[-1].item(), abs=1e-4)
    assert last["self_reward/logprob/unscored"] == 0


def test_the_self_reward_of_the_live_policy_rises(folder, tmp_path):
    reward = SelfReward("mean_logprob")
    trainer = online(
        "GRPO",
        folder,
        tmp_path,
        shared=False,
        reward=reward,
        callbacks=[reward],
        max_steps=20,
        learning_rate=1e-2,
        num_generations=8,
        per_device_train_batch_size=16,
        lr_scheduler_type="constant",
    )
    found = torch.tensor(rewarded(trainer))
    assert found[-5:].mean() > found[:5].mean() + 1


class Watched(SelfReward):
    """Keeps what it was called with and what it answered."""

    def __call__(self, prompts, completions, completion_ids=None, **given):
        found = super().__call__(prompts, completions, completion_ids, **given)
        self.seen = completion_ids, found
        return found


TEMPLATE = (
    "{% for m in messages %}{{ 4 if extra else 3 }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}24{% endif %}"
)


@pytest.mark.parametrize("form", ["text", "messages"])
def test_prompts_are_read_as_trl_feeds_them(form, folder, tmp_path, monkeypatch):
    tokenizer = load_tokenizer("game24")
    prompts, options = PROMPTS, {}
    if form == "messages":
        tokenizer.chat_template = TEMPLATE
        prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
        options = {"chat_template_kwargs": {"extra": True}}
    heads = []
    own = Scorer.score

    def score(self, prompts, completions, **given):
        heads.extend(prompts)
        return own(self, prompts, completions, **given)

    monkeypatch.setattr(Scorer, "score", score)
    reward = SelfReward()
    trainer = online(
        "GRPO",
        folder,
        tmp_path,
        shared=False,
        reward=reward,
        callbacks=[reward],
        max_steps=1,
        prompts=prompts,
        tokenizer=tokenizer,
        **options,
    )
    trainer.train()
    (inputs,) = trainer._buffered_inputs
    fed = [
        row[mask.bool()].tolist()
        for row, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)
    ]
    assert len(heads) == 2
    assert {tuple(ids) for ids in heads} == {tuple(ids) for ids in fed}


def rewards_of_one_step(folder, out, *, under, steps=2, **options):
    """Token ids and rewards of the last step, and the trainer."""
    reward = Watched(under=under)
    trainer = online(
        "GRPO",
        folder,
        out,
        shared=False,
        reward=reward,
        callbacks=[reward],
        max_steps=steps,
        learning_rate=1e-2,
        **options,
    )
    trainer.train()
    return reward.seen, trainer


def by_hand(model, ids):
    tokenizer = load_tokenizer("game24")
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    found = {}
    for order in (prompts, prompts[::-1]):
        scores = Scorer(model).score(order, [ids[:4], ids[4:]])
        found[tuple(map(tuple, order))] = scores.reward("logprob")
    return list(found.values())


def assert_one_of(got, candidates):
    """The sampler's order of the two prompts is its own affair."""
    assert any(torch.allclose(torch.tensor(got), x, atol=1e-3) for x in candidates)


def test_the_reference_is_the_trainers_own(folder, tmp_path):
    (ids, got), trainer = rewards_of_one_step(folder, tmp_path, under="reference", beta=0.1)
    assert_one_of(got, by_hand(trainer.ref_model, ids))


@pytest.mark.parametrize("under", ["base", "reference"])
def test_of_a_lora_policy_base_and_reference_are_without_it(under, folder, tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    (ids, got), trainer = rewards_of_one_step(folder, tmp_path, under=under, peft_config=lora)
    assert_one_of(got, by_hand(folder, ids))
    with pytest.raises(AssertionError):
        assert_one_of(got, by_hand(trainer.model, ids))


def test_the_base_is_the_model_that_was_loaded(folder, tmp_path):
    (ids, got), trainer = rewards_of_one_step(folder, tmp_path, under="base")
    assert_one_of(got, by_hand(folder, ids))
    with pytest.raises(AssertionError):
        assert_one_of(got, by_hand(trainer.model, ids))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("under", ["policy", "reference", "base"])
def test_mixed_precision_changes_no_route(under, lora, folder, tmp_path, caplog):
    options = {"bf16": True, "beta": 0.1}
    if lora:
        target = ["q_proj", "v_proj"]
        options["peft_config"] = LoraConfig(r=4, target_modules=target, task_type="CAUSAL_LM")
    with caplog.at_level(logging.INFO, logger="sharpen"):
        (ids, got), _ = rewards_of_one_step(folder, tmp_path, under=under, steps=1, **options)
    assert caplog.text.count("takes the hidden route") == 1
    assert caplog.text.count("shares prompts by 'tree'") == 1
    assert_one_of(got, by_hand(folder, ids))


def test_without_beta_there_is_no_reference(folder, tmp_path):
    with pytest.raises(InputError, match="set its `beta` above 0"):
        rewards_of_one_step(folder, tmp_path, under="reference", beta=0.0)


def test_log_probs_of_a_rollout_are_taken_and_nothing_is_run(folder, tmp_path, monkeypatch):
    def rollout(prompts, trainer):
        tokenizer = trainer.processing_class
        ids = [[5 + i, 7, tokenizer.eos_token_id] for i in range(len(prompts))]
        kept = [[-0.25 * (i + 1), -1.0, -0.5] for i in range(len(prompts))]
        return {
            "prompt_ids": [tokenizer.encode(text) for text in prompts],
            "completion_ids": ids,
            "logprobs": kept,
            "completion_logprobs": kept,
        }

    def refuse(*args, **kwargs):
        raise AssertionError("a forward was run")

    monkeypatch.setattr(Scorer, "score", refuse)
    reward = Watched()
    trainer = online(
        "GRPO", folder, tmp_path, shared=True, reward=reward, max_steps=1, rollout_func=rollout
    )
    trainer.train()
    assert reward.seen[1] == pytest.approx([-1.5 - 0.25 * (i + 1) for i in range(8)])


def test_a_reward_that_is_no_callback_finds_its_trainer(folder, tmp_path):
    reward = Watched(under="base")
    trainer = online("GRPO", folder, tmp_path, shared=True, reward=reward, max_steps=2, beta=0.0)
    trainer.train()
    assert_one_of(reward.seen[1], by_hand(folder, reward.seen[0]))


def test_rewards_by_group_in_a_real_run(folder, tmp_path):
    reward = Watched("mean_logprob", under="base", normalize=True)
    trainer = online(
        "GRPO", folder, tmp_path, shared=True, reward=reward, callbacks=[reward], max_steps=1
    )
    trainer.train()
    ids, got = reward.seen
    assert len(got) == 8
    candidates = []
    for order in (PROMPTS, PROMPTS[::-1]):
        heads = [load_tokenizer("game24").encode(text) for text in order]
        raw = Scorer(folder).score(heads, [ids[:4], ids[4:]]).reward("mean_logprob").view(2, 4)
        centred = raw - raw.mean(dim=1, keepdim=True)
        candidates.append((centred / (raw.std(dim=1, keepdim=True) + 1e-4)).flatten())
    assert_one_of(got, candidates)
    groups = torch.tensor(got).view(2, 4)
    torch.testing.assert_close(groups.mean(dim=1), torch.zeros(2), rtol=0, atol=1e-5)
    # what is logged is the reward as it was, in nats
    (row,) = (row for row in trainer.state.log_history if "reward" in row)
    assert row["self_reward/mean_logprob/mean"] < -1
    assert row["reward"] == pytest.approx(0, abs=1e-5)
