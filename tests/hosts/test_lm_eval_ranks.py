"""Two processes that share the documents give what one gives."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from helpers.lm_eval_runs import evaluated, model_of, numbers, prepared

# an odd number of documents, and windows that the ranks have unequal numbers of
TASKS = ["nothing", "rolling"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_two_ranks_give_what_one_gives(tmp_path):
    model, folder = prepared(tmp_path)
    wanted = evaluated(model_of("sharpen", model), folder, TASKS)
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
    }
    script = Path(__file__).parents[1] / "workers" / "lm_eval_rank.py"
    command = [sys.executable, str(script), str(model), str(folder), str(tmp_path / "out.json")]
    ranks = [
        subprocess.Popen(
            [*command, *TASKS],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=150)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    found = json.loads((tmp_path / "out.json").read_text())
    for task in TASKS:
        for name, value in wanted["results"][task].items():
            if name.endswith(",none") and "stderr" not in name:
                assert found["results"][task][name] == pytest.approx(value, rel=1e-5)
        # the first rank keeps the samples of both
        assert len(found["answers"][task]) == len(numbers(wanted, task))
