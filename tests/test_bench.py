"""No benchmark rots: each runs tiny, and what judges and prints them is itself right."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from bench._measure import (
    PROGRESS_SECONDS,
    RecordedClock,
    Row,
    digest,
    measure,
    read,
    steps,
    table,
    write_between,
)
from bench.conformance import BEGIN, CASES, END, OPS, RECORDS, judged, tables
from bench.peers.finding import Peer, available
from bench.speed import all_tasks
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
    is_missing = done.stdout.startswith("missing, ")  # the host that it is for
    assert is_missing or re.search(r"^\[1/\d+, 0 s\] \S", done.stderr, re.MULTILINE), done.stderr


def test_each_step_says_how_far_it_is_before_it_runs(capsys):
    seen = []
    for item in steps("ab", name=str.upper, depth=1):
        seen.append((item, capsys.readouterr().err))
    assert seen == [("a", "  [1/2, 0 s] A\n"), ("b", "  [2/2, 0 s] B\n")]


def test_long_rounds_say_what_runs_now(capsys, monkeypatch):
    seconds = iter(range(1000))
    monkeypatch.setattr("bench._measure.time.perf_counter", lambda: next(seconds))
    one = torch.ones(1)
    found, missing = measure({"a": lambda: one, "b": lambda: one / 0}, "cpu", 2 * PROGRESS_SECONDS)
    assert (set(found), missing) == ({"a", "b"}, {})
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["  [1/2, 0 s] first call: a", "  [2/2, 0 s] first call: b"]
    assert lines[2] == "  round 1, at least 5 in 10 s: a"
    assert any(line.startswith("  round 3, ") for line in lines[3:])


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


def test_ranks_may_wait_ahead_of_each_timed_call():
    order = []
    calls = {name: lambda name=name: order.append(name) or torch.ones(1) for name in "ab"}
    found, _ = measure(calls, "cpu", 0.0, min_rounds=2, before=lambda: order.append("wait"))
    # each twice before any is timed: its first call, and the one whose memory is counted
    assert order == ["a", "a", "b", "b", *["wait", "a", "wait", "b"] * 2]
    assert len(found["a"].seconds) == 2


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
    return Row(impl=impl, kind=kind, median_us=median_us, peak_extra_mib=0.0, machine={}, **facts)


def test_ratios_are_to_the_fastest_exact_peer_and_floor():
    rows = [
        row("ours", "ours", 2e3),
        row("b", "exact", 6e3),
        row("c", "exact", 8e3),
        row("d", "rounded", 1.5e3),
        row("e", "floor", 1e3),
        row("f", "floor", 4e3),
    ]
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


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_a_record_is_shown_in_words_and_never_run(record):
    assert record.name not in BY_NAME
    found = {case.name: ("right", "") for case in CASES}
    verdicts = {op: {} for op in OPS}
    for op in OPS:
        for name, seen in record.verdicts[op].items():
            verdicts[op][name] = found | {record.name: record.of(op, name)}
            assert record.of(op, name) == (seen, "recorded, not run")
        assert record.of(op, "some other") == ("-", "recorded, not run")
    text = tables(verdicts, OPS)
    rows = [line for line in text.splitlines() if line.startswith(f"| {record.name} (recorded")]
    assert len(rows) == len(OPS)
    assert "**crash**" in rows[-1]
    assert text.splitlines()[-1] == f"Not run: {record.name}, {record.text}"


def test_tables_go_between_their_marks(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_between(page, BEGIN, END, "new")
    assert page.read_text() == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="lacks the marks"):
        write_between(page, BEGIN, END, "new")
