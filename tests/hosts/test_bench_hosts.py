"""Benchmarks of hosts check themselves where the hosts are: every contender agrees."""

import os
import subprocess
import sys

import pytest

from test_layers import ROOT

# what each must have measured, beside ours
CONTENDERS = {
    "server": ["offline", "ours, micro-batcher", "ours, server, a prompt"],
    "trl_grpo": ["ours", "TRL"],
}


@pytest.mark.parametrize("name", CONTENDERS)
def test_benchmark_checks_itself_beside_its_host(name):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-m", f"bench.{name}", "--check"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.strip() for line in done.stdout.splitlines() if line.startswith("  ")]
    for contender in CONTENDERS[name]:
        assert any(row.startswith(contender + "  ") for row in rows), (contender, done.stdout)
