"""Training commands under a launcher: the first process runs them, all of them fit."""

import json
import re
import shutil
from contextlib import redirect_stdout

import pytest
import torch

import helpers.launched as launched
from sharpen.cli import main, parse
from sharpen.commands import train
from sharpen.models import load_model
from workers.training_two_ranks import weights

DATA = ["--model", "game24", "--device", "cpu", "--task", "game24", "--limit", "12"]
DRAW = ["-n", "4", "--max-new-tokens", "48", "--trainer", "logging_steps=1"]
NUMBER = r"-?\d+\.\d+(?:e-?\d+)?"
RUNS = {
    "sft": ["sft", *DATA, *DRAW],
    "sft-lora": ["sft", *DATA, *DRAW, "--lora-rank", "4", "--lr", "1e-3"],
    "rlhf": ["rlhf", *DATA, *DRAW, "--pairs", "all"],
    "xpo": ["xpo", *DATA, *DRAW, "--validation", "4", "--rounds", "2"],
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process leaves that takes the batches of two in turn."""
    turns = ["--batch", "2", "--trainer", "gradient_accumulation_steps=2"]
    folder = tmp_path_factory.mktemp("alone")
    for name, argv in RUNS.items():
        with (folder / f"{name}.said").open("w") as said, redirect_stdout(said):
            assert main([*argv, *turns, "--out", str(folder / name)]) == 0
    return folder


def way(folder):
    """From the base model to the one in `folder`."""
    return weights(load_model(folder / "model")) - weights(load_model("game24"))


@pytest.mark.parametrize(
    ("name", "shards"), [("sft", False), ("xpo", False), ("sft-lora", True), ("rlhf", True)]
)
def test_two_processes_leave_what_one_leaves(alone, tmp_path, name, shards):
    argv = [*RUNS[name], "--batch", "2", "--out", "out"]
    if shards:
        done = launched.two(["sharded_cli.py", *argv, "--trainer", "fsdp=true"], tmp_path)
    else:
        done = launched.two(["-m", "sharpen", *argv], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    want, got = way(alone / name), way(tmp_path / "out")
    assert want.norm() > 1e-3
    assert (got - want).norm() < 1e-3 * want.norm()
    for file in ("samples.jsonl", "scores.jsonl"):
        assert (tmp_path / "out" / file).read_bytes() == (alone / name / file).read_bytes()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["processes"] == 2
    # said once
    said = (alone / f"{name}.said").read_text().replace(str(alone / name), "out")
    assert re.sub(NUMBER, "#", done.stdout) == re.sub(NUMBER, "#", said)
    numbers = [[float(x) for x in re.findall(NUMBER, text)] for text in (done.stdout, said)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-3)


def test_a_finished_run_is_left_alone(alone, tmp_path):
    argv = [*RUNS["sft"], "--batch", "2", "--trainer", "gradient_accumulation_steps=2"]
    shutil.copytree(alone / "sft", tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "run.json").read_text())
    (tmp_path / "out" / "run.json").write_text(json.dumps(settings | {"processes": 2}))
    done = launched.two(["-m", "sharpen", *argv, "--out", "out"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == (alone / "sft.said").read_text().replace(str(alone / "sft"), "out")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-new-tokens", "2"], "sharpen: no sample can be fitted: none of 24 was ended"),
        (["--max-new-tokens", "48", "--lr", "1e30"], "sharpen: training diverged: "),
    ],
)
def test_what_ends_the_first_process_ends_the_others_and_is_said_once(tmp_path, argv, message):
    begun = ["sft", *DATA, "--limit", "6", "-n", "4", "--batch", "1", "--out", "out", *argv]
    done = launched.two(["-m", "sharpen", *begun], tmp_path)
    assert done.returncode != 0
    assert done.stderr.count(message) == 1
    assert not (tmp_path / "out" / "model").exists()


def test_the_others_load_the_base_as_the_first_one_has_it(monkeypatch):
    """A checkpoint of half precision is fp32 on a CPU unless it is said."""
    loaded = []

    class Other:
        is_first = False

        def follow(self, load_base, *, trust_remote_code):
            loaded.append(load_base(torch.bfloat16))

    monkeypatch.setattr(train, "WorkerGroup", Other)
    config = parse("sft", ["--model", "game24", "--task", "game24", "--out", "out"])
    train.run_on_rank_zero(config, lambda crew: pytest.fail("not the first"))
    (model,) = loaded
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cpu", torch.bfloat16)}
