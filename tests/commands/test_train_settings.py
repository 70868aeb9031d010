"""What a training command's outputs depend on: each option changes its settings, or is free."""

import json
from dataclasses import fields, replace

import pytest
import torch

from sharpen.cli import main
from sharpen.commands import rlhf, sft, train, xpo
from sharpen.commands.rlhf import RlhfConfig
from sharpen.commands.sft import SftConfig
from sharpen.commands.xpo import XpoConfig

CPU = torch.device("cpu")
# where and how it runs, not what comes out
FREE = {"out", "trust_remote_code", "allow_pickle"}
OTHER = {
    "model": "other",
    "device": "cuda",
    "dtype": "bfloat16",
    "max_tokens": 7,
    "task": "other",
    "split": "test",
    "shots": 1,
    "limit": 3,
    "n": 7,
    "temperature": 0.5,
    "top_p": 0.5,
    "max_new_tokens": 7,
    "seed": 7,
    "lr": 0.5,
    "epochs": 0.5,
    "batch": 7,
    "lora_rank": 7,
    "save_every": 7,
    "trainer": ["bf16=true"],
    "reward": "mean_logprob",
    "weights": "soft",
    "soft_temperature": 0.5,
    "per": "sequence",
    "beta": 0.5,
    "pairs": "all",
    "standardise": "all",
    "loss": "dpo",
    "alpha": "0.5",
    "rounds": 7,
    "exploration": 0.5,
    "validation": 7,
    "scores": "sampler",
}


def of(config, n_processes=1):
    device = torch.device(config.device or "cpu")
    if isinstance(config, XpoConfig):
        return xpo.settings(config, device, n_processes)
    command, own = ("sft", sft.own) if isinstance(config, SftConfig) else ("rlhf", rlhf.own)
    return train.settings(command, config, own(config), device, n_processes)


CONFIGS = {
    "sft": SftConfig(model="game24", task="game24", out="x"),
    "rlhf": RlhfConfig(model="game24", task="game24", out="x"),
    "xpo": XpoConfig(model="game24", task="game24", out="x"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_each_option_is_in_the_settings(name, tmp_path):
    config, changed = CONFIGS[name], {}
    given = dict(OTHER)
    for file in ("prompts", "samples"):
        given[file] = str(tmp_path / file)
        (tmp_path / file).write_text("{}\n")
    for field in fields(config):
        if field.name not in FREE:
            other = replace(config, **{field.name: given[field.name]})
            changed[field.name] = of(other) != of(config)
    assert of(config, 2) == of(config) | {"processes": 2}
    assert [option for option, differs in changed.items() if not differs] == []
    assert {"n", "lr", "reward", "seed", "limit"} <= changed.keys()


@pytest.mark.parametrize(
    ("name", "file"), [("sft", "samples"), ("rlhf", "samples"), ("xpo", "prompts")]
)
def test_other_content_under_the_same_name_is_another_run(name, file, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("{}\n")
    config = replace(CONFIGS[name], **{file: str(path)})
    before = of(config)
    path.write_text("{} \n")
    assert of(config) != before


def test_three_commands_are_three_runs():
    assert len({of(config)["command"] for config in CONFIGS.values()}) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--beta", "2"], "beta was 1.0, is 2.0"),
        (["--pairs", "all"], "pairs was 'random', is 'all'"),
        (["--trainer", "weight_decay=0.1"], "trainer was []"),
        (["--task", "game24", "--split", "test"], "split was 'sharpen', is 'test'"),
    ],
    ids=" ".join,
)
def test_other_flags_on_a_rerun_are_refused(flags, message, tmp_path, capsys):
    """Before anything is drawn: the folder holds a run of the other settings, no output yet."""
    argv = [
        "rlhf",
        "--model",
        "game24",
        "--task",
        "game24",
        "--limit",
        "2",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    config = replace(CONFIGS["rlhf"], limit=2, device="cpu", out=str(tmp_path))
    (tmp_path / "run.json").write_text(json.dumps(of(config)))
    assert main([*argv, *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("sharpen: ")
    assert "was made with other settings: " in error
    assert message in error
    assert error.endswith("Use those settings or another output.")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".run.json.lock", "run.json"]
