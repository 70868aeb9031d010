"""Two processes take the steps of TRL in two processes."""

import json
import os
import subprocess
import sys

from test_layers import ROOT
from trl_tiny import saved


def test_two_processes_take_the_same_steps(tmp_path):
    folder = saved(tmp_path / "model")
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(ROOT / "tests" / "trl_two_ranks.py"), folder, str(tmp_path / "out"),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith('{"processes"'))
    found = json.loads(line)
    assert found["processes"] == 2
    assert found["moved"] > 0
    assert found["apart"] <= 0.02 * found["moved"]
    theirs, ours = found["rewards"]
    assert len(theirs) == 2
    assert ours == theirs
