"""Hosts that are not installed here: stand-ins with the names of their contracts, as read."""

import sys
import types
from typing import Any, NamedTuple

import pytest

from sharpen.integrations import nemo_rl
from sharpen.scoring import Scorer
from sharpen.server import unscorable


def put(monkeypatch, name, **members):
    """A module of that name, and packages above it, where none stand yet."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        package = ".".join(parts[:i])
        if package not in sys.modules:
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    module = types.ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    """What is logged once a process is logged once a test."""
    monkeypatch.setattr(unscorable, "_LOGGED", set())


@pytest.fixture(scope="session")
def scorer():
    return Scorer("game24", device="cpu")


@pytest.fixture
def swift(monkeypatch):
    """`swift.rewards` as the wheel of ms-swift 4.6.0 has it: made with args, called by keywords."""

    class ORM:
        def __init__(self, args=None, **kwargs):
            self.args = args

        def __call__(self, **kwargs):
            raise NotImplementedError

    put(monkeypatch, "swift.rewards.orm", ORM=ORM)
    orms = {}
    put(monkeypatch, "swift.rewards", orms=orms, ORM=ORM)
    return types.SimpleNamespace(ORM=ORM, orms=orms)


@pytest.fixture
def nemo(monkeypatch):
    """The names of nemo_rl that an environment meets, and a `ray` that leaves classes alone."""

    class EnvironmentReturn(NamedTuple):
        observations: list
        metadata: list
        next_stop_strings: list
        rewards: Any
        terminateds: Any
        answers: Any = None

    environments, executables = {}, {}

    def register_env(env_name, actor_class_fqn):
        environments[env_name] = {"actor_class_fqn": actor_class_fqn}

    put(
        monkeypatch,
        "nemo_rl.environments.interfaces",
        EnvironmentInterface=type("EnvironmentInterface", (), {}),
        EnvironmentReturn=EnvironmentReturn,
    )
    put(monkeypatch, "nemo_rl.environments.utils", register_env=register_env)
    put(
        monkeypatch,
        "nemo_rl.distributed.ray_actor_environment_registry",
        ACTOR_ENVIRONMENT_REGISTRY=executables,
    )
    cluster = types.SimpleNamespace(SYSTEM="python")
    put(monkeypatch, "nemo_rl.distributed.virtual_cluster", PY_EXECUTABLES=cluster)
    put(monkeypatch, "ray", remote=lambda cls: cls)
    nemo_rl._environment.cache_clear()
    yield types.SimpleNamespace(environments=environments, executables=executables)
    nemo_rl._environment.cache_clear()
