"""SIGKILL anywhere in `sft`, `rlhf` and `xpo`: the same command then ends with the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sharpen.cli import main

ROOT = Path(__file__).parents[2]
COMMON = [
    "--model",
    "game24",
    "--task",
    "game24",
    "--limit",
    "4",
    "--max-new-tokens",
    "40",
    "-n",
    "4",
    "--max-tokens",
    "2000",
    "--device",
    "cpu",
    "--batch",
    "1",
    "--save-every",
    "1",
    "--trainer",
    "logging_steps=1",
]
JOURNAL, SEAL = "sharpen.runs:Journal.append", "sharpen.training.fit:CompleteMarker.on_save"
OPTIMIZER = "transformers.trainer:Trainer._save_optimizer_and_scheduler"
MODEL, ROUNDS = "sharpen.training.fit:flush", "sharpen.commands.xpo:Rounds"
ARGV = {
    "sft": ["sft", *COMMON, "--lr", "1e-4"],
    "rlhf": [
        "rlhf",
        *COMMON,
        "--lr",
        "1e-5",
        "--loss",
        "dpo",
        "--pairs",
        "all",
        "--lora-rank",
        "2",
    ],
    "xpo": ["xpo", *COMMON, "-n", "1", "--lr", "1e-5", "--rounds", "2", "--validation", "2"],
}
# in this order, each a run that goes on from where the one before was killed
KILLS = {
    "sft": [
        (JOURNAL, 1),  # samples drawn, none written
        (OPTIMIZER, 2),  # a checkpoint half there
        # three checkpoints are flushed before it
        (MODEL, 4),  # trained, and the model not yet in its place
    ],
    "rlhf": [(SEAL, 3)],  # a whole checkpoint without its mark
    "xpo": [
        (SEAL, 2),  # within round 1
        (f"{ROUNDS}.draw", 5),  # between the rounds
        (SEAL, 2),  # within round 2
    ],
}


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """Run directories of the killed commands."""
    folder = tmp_path_factory.mktemp("cut")
    jobs = [
        ([*ARGV[name], "--out", str(folder / name)], place, n)
        for name, kills in KILLS.items()
        for place, n in kills
    ]
    paths = os.pathsep.join(str(ROOT / x) for x in ("", "kernels"))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "workers" / "killed_runs.py")],
        input=json.dumps(jobs),
        text=True,
        capture_output=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def kept(out):
    """What a run leaves, but for times, locks and checkpoints."""
    skipped = {"timings.jsonl", "summary.json", "run.json", ".run.json.lock", "training_args.bin"}
    paths = [p for p in out.rglob("*") if p.is_file() and p.name not in skipped]
    return {str(p.relative_to(out)): p.read_bytes() for p in paths if "checkpoints" not in p.parts}


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_ends_with_the_same_files(cut, tmp_path, name, capsys):
    whole, out = tmp_path / "whole", cut / name
    assert not (out / "summary.json").exists()
    for journal in out.rglob("s*.jsonl"):
        tear(journal)
    for folder in (whole, out):
        assert main([*ARGV[name], "--out", str(folder)]) == 0
    want, got = kept(whole), kept(out)
    assert {"model/model.safetensors", "samples.jsonl", "scores.jsonl"} <= want.keys()
    assert got.keys() == want.keys()
    assert [path for path in want if got[path] != want[path]] == []
    one, other = (json.loads((x / "summary.json").read_text()) for x in (whole, out))
    for summary in (one, other):
        summary.pop("seconds")
    assert one == other


def tear(journal):
    """What a machine that lost its power in the middle of a line leaves."""
    text = journal.read_bytes()
    assert text.endswith(b"\n")
    journal.write_bytes(text[:-20])
