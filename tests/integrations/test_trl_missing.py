"""Where TRL is not installed, or is too old: what needs it says how to get it; the rest works."""

import importlib
import sys
import types

import pytest

from sharpen.errors import InputError
from sharpen.integrations import trl as ours
from sharpen.integrations.trl import fused_head


@pytest.fixture
def no_trl(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setitem(sys.modules, "trl.trainer", None)
    monkeypatch.delitem(sys.modules, "sharpen.integrations.trl.trainers", raising=False)


@pytest.mark.parametrize("name", ["SharedPrefixGRPOTrainer", "SharedPrefixDPOTrainer"])
def test_trainers_name_the_command(name, no_trl):
    trainer_class = getattr(ours, name)
    with pytest.raises(InputError, match=r'pip install "sharpen\[trl\]"'):
        trainer_class(model="gpt2")


def test_the_head_names_the_command(no_trl):
    with pytest.raises(InputError, match="TRL must be installed"):
        ours.add_fused_lm_head(None)


def test_the_rest_needs_no_trl(no_trl):
    assert ours.SelfReward("mean_logprob").__name__ == "self_reward_mean_logprob"


def test_an_old_trl_is_named(monkeypatch):
    old = types.ModuleType("trl")
    old.__version__ = "1.13.0"
    monkeypatch.setitem(sys.modules, "trl", old)
    monkeypatch.setitem(sys.modules, "trl.trainer", types.ModuleType("trl.trainer"))
    with pytest.raises(InputError, match=r"1\.15 or later, got 1\.13\.0"):
        importlib.import_module("sharpen.integrations.trl.fused_head").host()


def test_a_python_too_old_for_trl_is_named(monkeypatch):
    # where pip refuses `sharpen[trl]`, and no command brings it
    monkeypatch.setattr(fused_head.sys, "version_info", (3, 10, 14))
    with pytest.raises(InputError, match=r"needs Python 3\.11 or later, got Python 3\.10; make"):
        fused_head.host()


def test_other_names_are_not_there():
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        ours.Nothing  # noqa: B018 (the look-up is what is tested)
