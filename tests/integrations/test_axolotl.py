"""axolotl's recipe: the dotted path of the page's YAML, resolved and called as axolotl does."""

import importlib
import inspect

import pytest
import yaml

from helpers.other_pythons import code_block
from sharpen.integrations.trl.rewards import EnvironmentReward
from sharpen.models import load_tokenizer

PROMPT = "Numbers: 4 4 6 8 Target: 24\n"
TEXTS = ["8 + 4", "4 * 6"]


@pytest.fixture
def reward():
    """As its GRPO strategy finds it: module and name, then a look at the signature."""
    config = yaml.safe_load(code_block("axolotl.md", language="yaml"))
    assert config["rl"] == "grpo"
    (path,) = config["trl"]["reward_funcs"]
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert len(inspect.signature(found).parameters) >= 2
    return found


def test_the_path_of_the_page_is_a_reward_function(reward, scorer, monkeypatch):
    monkeypatch.setenv("SHARPEN_REWARD", "mean_logprob")
    monkeypatch.setenv("SHARPEN_REWARD_UNDER", "game24")
    monkeypatch.setattr(reward, "_made", None)
    tokenizer = load_tokenizer("game24")
    reward.reward.tokenizer = tokenizer
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    got = reward(prompts=[PROMPT] * 2, completions=TEXTS, completion_ids=ids, trainer_state=None)
    want = scorer.score([tokenizer.encode(PROMPT)], [ids]).reward("mean_logprob").tolist()
    assert got == pytest.approx(want, abs=1e-5)
    assert isinstance(reward, EnvironmentReward)
    assert reward.__name__ == "self_reward"
