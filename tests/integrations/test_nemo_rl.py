"""NeMo-RL's environment, by its contract (environments/interfaces.py, read); the page is run."""

import gc
import importlib
import types
import weakref

import pytest
import yaml

from helpers.other_pythons import code_block
from sharpen.errors import InputError
from sharpen.integrations import nemo_rl, reward_model

PROMPT = "Numbers: 4 4 6 8 Target: 24\n"
TEXTS = ["8 + 4 = 12 left: 4 6 12\n6 - 4 = 2 left: 2 12\n12 * 2 = 24", "8 * 4 = 32 left: 4 6 32"]
OPTIONS = {"model": "game24", "device": "cpu"}


def expected(scorer, texts, reward="logprob"):
    return scorer.score_text([PROMPT], [texts], add_eos=True).reward(reward).tolist()


def logs(texts):
    return [
        [{"role": "user", "content": "<s>" + PROMPT}, {"role": "assistant", "content": text}]
        for text in texts
    ]


def test_nemo_rl_environment_ends_each_episode_with_its_reward(nemo, scorer):
    environment = nemo_rl.SelfRewardEnvironment(OPTIONS)
    text = "<s>" + PROMPT
    told = environment.step(logs(TEXTS), [{"a": 1}, {"a": 2}])
    tokenizer = scorer.tokenizer
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == tokenizer(PROMPT)["input_ids"]
    assert told.rewards.tolist() == pytest.approx(expected(scorer, TEXTS), abs=1e-4)
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


def test_nemo_rl_environment_lets_its_model_go_at_shutdown(nemo, monkeypatch):
    made, own = [], reward_model.scorer_of

    def watched(rating):
        scorer = own(rating)
        made.append(weakref.ref(scorer.model))
        return scorer

    monkeypatch.setattr(reward_model, "scorer_of", watched)
    environment = nemo_rl.SelfRewardEnvironment(OPTIONS)
    environment.step(logs(TEXTS), [{}, {}])
    # nemo_rl/evals/eval.py calls it, whatever the environment
    environment.shutdown()
    gc.collect()
    assert [model() for model in made] == [None]
    environment.shutdown()
    with pytest.raises(InputError, match="was shut down"):
        environment.step(logs(TEXTS), [{}, {}])


class NoEnd:
    """A tokenizer without an end of sequence: an empty response is empty."""

    eos_token_id = None

    def __init__(self, tokenizer):
        self.own = tokenizer

    def __getattr__(self, name):
        return getattr(self.own, name)


def test_nemo_rl_response_without_a_reward_needs_a_number_for_it(scorer, caplog):
    rate = reward_model.rate_by(reward_model.Rating(**OPTIONS), scorer)
    batch = logs(["8", "", "4"])
    tokenizer = NoEnd(scorer.tokenizer)
    with pytest.raises(InputError, match="set `unscorable_reward` to what such a response"):
        nemo_rl.rate_logs(tokenizer, rate, batch)
    found = nemo_rl.rate_logs(tokenizer, rate, batch, unscorable_reward=-9.0)
    want = nemo_rl.rate_logs(tokenizer, rate, [batch[0], batch[2]])
    assert found == pytest.approx([want[0], -9, want[1]], abs=1e-4)
    assert caplog.text.count("it gets `unscorable_reward`, -9") == 1


def test_nemo_rl_examples_of_the_page(nemo, scorer):
    exec(code_block("nemo-rl.md"), {})
    name = nemo.environments["self_reward"]["actor_class_fqn"]
    assert nemo.executables == {name: "python"}
    # environments/utils.py: the class by its dotted path, made with the section of its name
    module, _, attribute = name.rpartition(".")
    made = getattr(importlib.import_module(module), attribute)
    options = yaml.safe_load(code_block("nemo-rl.md", language="yaml"))["env"]["self_reward"]
    environment = made(options | OPTIONS)
    told = environment.step(logs(TEXTS), [{}, {}])
    want = expected(scorer, TEXTS, options["reward"])
    assert told.rewards.tolist() == pytest.approx(want, abs=1e-4)
    environment.shutdown()
