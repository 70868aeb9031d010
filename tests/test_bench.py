"""No benchmark rots: each runs tiny, and what judges and prints them is itself right."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from bench import _verdicts
from bench._cases import CASES
from bench._clock import RecordedClock
from bench._judge import judged
from bench._problems import build
from bench._rows import Row, read
from bench._shapes import all_tasks
from bench._tables import digest, table
from bench.peers.finding import Peer, available
from test_layers import ROOT

NOT_PROGRAMS = {"conftest", "test_speed", "test_sharing"}
PROGRAMS = {path.stem for path in (ROOT / "bench").glob("[!_]*.py")} - NOT_PROGRAMS
BY_NAME = {case.name: case for case in CASES}


def run(*command):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": path, "PYTHON": sys.executable}
    environment.pop("PYTEST_XDIST_WORKER", None)  # pytest-benchmark would be off there
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_benchmark_checks_itself(name):
    done = run(sys.executable, "-m", f"bench.{name}", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_pytest_benchmark_takes_every_contender():
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "--collect-only", "-q"]
    done = run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    for task in all_tasks("cuda" if torch.cuda.is_available() else "cpu"):
        assert f"[{task}-ours]" in done.stdout


def test_gpu_checklist_parses():
    subprocess.run(["bash", "-n", "bench/gpu.sh"], cwd=ROOT, check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what it asks for")
def test_gpu_checklist_without_a_gpu_says_what_it_needs(tmp_path):
    done = run("bash", "bench/gpu.sh", str(tmp_path))
    assert done.returncode == 2
    assert "needs a CUDA device" in done.stdout


def test_recorded_clock_replays_what_it_was_given():
    clock, seen = RecordedClock(), []
    clock.replay([0.5, 0.25])
    for _ in range(2):
        begun = clock.now()
        clock.advance()
        seen.append(clock.now() - begun)
    assert seen == [0.5, 0.25]


def row(impl, kind, median_us):
    facts = {"op": "o", "shape": "s", "dtype": "d", "spread": 0.0, "rounds": 5, "tflop_per_s": 0.0}
    return Row(
        impl=impl, kind=kind, median_us=median_us, peak_extra_mib=0.0, machine={}, **facts
    )  # fmt: skip


def test_ratios_are_to_the_fastest_exact_peer_and_floor():
    rows = [
        row("ours", "ours", 2e3), row("b", "exact", 6e3), row("c", "exact", 8e3),
        row("d", "rounded", 1.5e3), row("e", "floor", 1e3), row("f", "floor", 4e3),
    ]  # fmt: skip
    text = table("title", rows, {"g": "no module", "h": "no module"})
    (ours,) = (line for line in text.splitlines() if line.startswith("  ours "))
    assert "3.00 x" in ours
    assert "2.00 x" in ours
    assert "missing, no module: g, h" in text
    assert "2.00 ms   3.00 x b, 2.00 x floor" in digest(rows)


def test_rows_of_sharing_may_stand_in_the_same_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    given = {f.name: None for f in dataclasses.fields(Row)}
    path.write_text(json.dumps(given | {"op": "a", "saved_mib": 3.0}) + "\n" + json.dumps(given))
    assert [row.op for row in read(path)] == ["a", None]


def test_a_package_that_is_not_there_is_named_with_the_reason():
    def load():
        raise ImportError("no such thing")

    found, missing = available([Peer("p", load), Peer("q", load, ("cuda",))], "cpu")
    assert found == []
    assert missing == {"p": "ImportError: no such thing", "q": "needs a GPU"}


def peer(logprob):
    return Peer("p", dict, calls={"logprob": logprob})


def gathered(z, t):
    return z.log_softmax(1).gather(1, t.clamp(0, z.shape[1] - 1)[:, None])[:, 0]


def zero_based(z, t):
    top = z.amax(1, keepdim=True).clamp(min=0.0)
    return (z - top).gather(1, t[:, None])[:, 0] - (z - top).exp().sum(1).log()


def refuse(z, t):
    raise NotImplementedError("not for you")


@pytest.mark.parametrize(
    ("case", "logprob", "verdict", "why"),
    [
        ("one row", gathered, "right", "within"),
        ("target -100", gathered, "wrong", "off by"),
        ("target out of range", gathered, "wrong", "where there is no number"),
        ("target masked", lambda z, t: gathered(z, t).clamp(min=-9.0), "wrong", "-9 for -inf"),
        ("one row", lambda z, t: gathered(z, t) * float("nan"), "NaN", "1 of 1"),
        ("logits - 1e4", zero_based, "wrong", "off by inf"),
        ("p near 1", lambda z, t: gathered(z, t) + 1e-5, "wrong", "log p ="),
        ("no rows", lambda z, t: z.new_zeros(1), "wrong", "shape (1,)"),
        ("one row", refuse, "raises", "NotImplementedError: not for you"),
        ("gradient", lambda z, t: gathered(z.detach(), t), "-", "no gradient"),
        ("gradient", lambda z, t: 2 * gathered(z, t), "wrong", "off by"),
        ("entropy", gathered, "-", "no such"),
    ],
)
def test_judge(case, logprob, verdict, why):
    got, told = judged(peer(logprob), BY_NAME[case], "token_logprob", "cpu")
    assert (got, why in told) == (verdict, True), told


@pytest.mark.parametrize("op", ["token_logprob", "linear_logprob"])
def test_a_view_past_2_to_the_31_elements_holds_few_bytes(op):
    problem = build(BY_NAME["past 2^31 elements"], op, "cpu")
    assert problem is not None
    last = problem.tensors[-1]
    assert (last.shape[0] - 1) * last.stride(0) > 2**31
    assert last.isfinite().all()


def test_tables_go_between_their_marks(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{_verdicts.BEGIN}\nold\n{_verdicts.END}\nafter\n")
    _verdicts.write_into(page, "new")
    text = f"before\n{_verdicts.BEGIN}\nnew\n{_verdicts.END}\nafter\n"
    assert page.read_text() == text
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="lacks the marks"):
        _verdicts.write_into(page, "new")
