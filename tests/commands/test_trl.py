"""`sharpen rlhf --loss dpo` beside TRL's DPOTrainer, on the pairs that it leaves for that."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sharpen.cli import main

ROOT = Path(__file__).parents[2]
# where `make peers` puts it
PEERS = ROOT / ".venv" / "peers"
HAS_TRL = importlib.util.find_spec("trl") is not None or (PEERS / "trl").is_dir()
STEPS, LR, BETA, BATCH = 4, 1e-4, 0.5, 2


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRL, reason="needs trl; `make peers` or `pip install trl`")
def test_trl_reads_the_same_tokens_and_takes_the_same_steps(tmp_path):
    out = tmp_path / "rlhf"
    argv = [
        "rlhf",
        "--model",
        "game24",
        "--task",
        "game24",
        "--limit",
        "8",
        "--device",
        "cpu",
        "--max-new-tokens",
        "40",
        "-n",
        "6",
        "--loss",
        "dpo",
        "--pairs",
        "best_worst",
        "--beta",
        str(BETA),
        "--lr",
        str(LR),
        "--batch",
        str(BATCH),
        "--trainer",
        f"max_steps={STEPS}",
        "logging_steps=1",
        "--out",
        str(out),
    ]
    assert main(argv) == 0
    pairs = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    losses = [json.loads(line)["loss"] for line in (out / "losses.jsonl").read_text().splitlines()]
    asked = [out / "pairs.jsonl", tmp_path / "trl", STEPS, LR, BETA, BATCH]
    paths = [str(ROOT), str(ROOT / "kernels"), str(PEERS)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "workers" / "trl_dpo.py"), *map(str, asked)],
        text=True,
        capture_output=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    assert len(pairs) == 8
    assert found["ids"] == [[row[name] for name in names] for row in pairs]
    # one seed, one order: every step is the same step
    assert len(losses) == STEPS
    assert max(losses) - min(losses) > 0.01
    assert found["losses"] == pytest.approx(losses, abs=1e-4)
