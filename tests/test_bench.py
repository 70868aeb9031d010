"""No benchmark rots: each runs tiny, and the GPU checklist parses and refuses cleanly."""

import os
import subprocess
import sys

import pytest
import torch

from test_layers import ROOT

BENCHES = sorted(p.stem for p in (ROOT / "bench").glob("[!_]*.py"))


@pytest.mark.parametrize("name", BENCHES)
def test_benchmark_checks_itself(name):
    command = [sys.executable, "-m", f"bench.{name}", "--check"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_gpu_checklist_parses():
    subprocess.run(["bash", "-n", "bench/gpu.sh"], cwd=ROOT, check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what it asks for")
def test_gpu_checklist_without_a_gpu_says_what_it_needs(tmp_path):
    done = subprocess.run(
        ["bash", "bench/gpu.sh", str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 2
    assert "needs a CUDA device" in done.stdout
