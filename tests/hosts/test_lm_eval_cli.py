"""`sharpen lm-eval` in a process of its own: lm-eval's arguments, files and exit codes."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("lm_eval")

from helpers.lm_eval_runs import assert_same, evaluated, model_of, prepared

TASKS = ["shared", "rolling", "last"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("lm_eval"))


def ran(command, *arguments):
    return subprocess.run(
        [sys.executable, "-m", *command, *map(str, arguments)], capture_output=True, text=True
    )


def written(folder):
    """Results and samples as the harness wrote them: answers become text on the way."""
    (results,) = folder.rglob("results_*.json")
    samples = {}
    for task in TASKS:
        (path,) = folder.rglob(f"samples_{task}_*.jsonl")
        samples[task] = [json.loads(line) for line in path.read_text().splitlines()]
        for row in samples[task]:
            row["resps"] = [[_answer(x) for x in answers] for answers in row["resps"]]
    return {"results": json.loads(results.read_text())["results"], "samples": samples}


def _answer(x):
    return (float(x[0]), x[1] == "True") if isinstance(x, list) else float(x)


def test_the_command_writes_the_results_of_hf(paths, tmp_path):
    done = ran(
        ["sharpen", "lm-eval"],
        "--model",
        "sharpen",
        "--model_args",
        f"pretrained={paths[0]}",
        "--device",
        "cpu",
        "--batch_size",
        4,
        "--include_path",
        paths[1],
        "--tasks",
        ",".join(TASKS),
        "--log_samples",
        "--output_path",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "sharpen (" in done.stdout
    wanted = evaluated(model_of("hf", paths[0]), paths[1], TASKS)
    for task in TASKS:
        assert_same(written(tmp_path), wanted, task)


@pytest.mark.parametrize("arguments", [["--no-such-flag", "x"], ["run", "--tasks"]], ids=" ".join)
def test_exit_codes_and_words_are_those_of_lm_eval(arguments):
    ours, theirs = ran(["sharpen", "lm-eval"], *arguments), ran(["lm_eval"], *arguments)
    assert ours.returncode == theirs.returncode != 0
    assert ours.stderr.splitlines()[-1] == theirs.stderr.splitlines()[-1]


def test_help_is_ours_and_then_theirs():
    done = ran(["sharpen", "lm-eval"], "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("sharpen lm-eval ARGUMENTS")
    assert "usage: lm-eval" in done.stdout


def test_a_refusal_is_one_line(paths):
    done = ran(
        ["sharpen", "lm-eval"],
        "--model",
        "sharpen",
        "--device",
        "cpu",
        "--tasks",
        "two",
        "--model_args",
        f"pretrained={paths[0]},softmax_dtype=bfloat16",
        "--include_path",
        paths[1],
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "sharpen: `softmax_dtype` must be float32, got torch.bfloat16: log-probs are always summed "
        "up in fp32; leave it out."
    )
