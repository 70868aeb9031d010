"""Two processes on this machine, as torchrun starts them."""

import os
import subprocess
import sys
from pathlib import Path

from test_layers import ROOT


def two(program: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Both of `program`, a script of `tests/workers/` or "-m" and a module, and its arguments."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
    program = [str(ROOT / "tests" / "workers" / x) if x.endswith(".py") else x for x in program]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, "--nproc_per_node", "2", *program],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )
