"""Two processes take the steps of TRL in two processes."""

import json

import helpers.launched as launched
from helpers.trl_tiny import saved


def test_two_processes_take_the_same_steps(tmp_path):
    folder = saved(tmp_path / "model")
    done = launched.two(["trl_two_ranks.py", folder, str(tmp_path / "out")], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith('{"processes"'))
    found = json.loads(line)
    assert found["processes"] == 2
    assert found["moved"] > 0
    assert found["apart"] <= 0.02 * found["moved"]
    theirs, ours = found["rewards"]
    assert len(theirs) == 2
    assert ours == theirs
