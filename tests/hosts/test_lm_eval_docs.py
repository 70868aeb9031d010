"""docs/hosts/lm-eval.md does what it says."""

import json
import sys

import pytest

pytest.importorskip("lm_eval")

from helpers.documented import blocks, ran
from test_bench import run

PAGE = "docs/hosts/lm-eval.md"


def test_the_page_runs(tmp_path):
    (shell,), (python,) = blocks(PAGE, "bash"), blocks(PAGE, "python")
    done = ran(shell, "bash", tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("results/*/results_*.json")
    found = json.loads(path.read_text())["results"]["steps"]["acc,none"]
    # the model that ships knows arithmetic
    assert found == 1.0
    again = ran(python, "python", tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == "1.0"


def test_the_benchmark_checks_itself():
    done = run(sys.executable, "-m", "bench.lm_eval_tasks", "--check")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ours: ") == 2
