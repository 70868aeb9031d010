"""Stages side by side: their order, one that fails, one that is killed, a parent that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sharpen.cli import parse
from sharpen.commands.sample import SampleConfig
from sharpen.commands.score import ScoreConfig
from sharpen.errors import InputError, RunError
from sharpen.experiments.game24 import stages as study_workers
from sharpen.experiments.game24.plan import plan, sizes_of
from sharpen.experiments.game24.stages import Stage, run_stages


def drawn(folder, name):
    config = SampleConfig(
        model="game24",
        task="game24",
        limit=1,
        n=2,
        max_new_tokens=8,
        device="cpu",
        out=str(folder / f"{name}.jsonl"),
    )
    return Stage(name, "sample", config)


def scored(folder, name, needs):
    config = ScoreConfig(
        model="game24",
        device="cpu",
        rewards=["logprob"],
        input=str(folder / f"{name}.jsonl"),
        out=str(folder / f"{name}.scored.jsonl"),
    )
    return Stage(f"{name}/scored", "score", config, needs)


def journal(folder):
    rows = map(json.loads, (folder / "stages.jsonl").read_text().splitlines())
    return {row["stage"]: row["finished"] for row in rows}


@pytest.mark.parametrize("jobs", [1, 2])
def test_one_that_fails_keeps_what_runs_beside_it_and_begins_nothing_more(tmp_path, jobs):
    stages = [
        drawn(tmp_path, "a"),
        scored(tmp_path, "missing", ()),
        scored(tmp_path, "a", ("a",)),
        drawn(tmp_path, "b"),
        drawn(tmp_path, "c"),
    ]
    with pytest.raises(InputError, match="missing"):
        run_stages(tmp_path, stages, jobs)
    left = journal(tmp_path)
    assert left["a"]
    assert not left["missing/scored"]
    assert "c" not in left
    # mended, it goes on with what is left
    (tmp_path / "missing.jsonl").write_text((tmp_path / "a.jsonl").read_text())
    before = (tmp_path / "a.jsonl").stat().st_mtime_ns
    run_stages(tmp_path, stages, jobs)
    assert all(journal(tmp_path)[stage.name] for stage in stages)
    assert (tmp_path / "a.jsonl").stat().st_mtime_ns == before


def test_a_stage_waits_for_those_it_needs(tmp_path):
    # first in the list, last to run
    run_stages(tmp_path, [scored(tmp_path, "a", ("a",)), drawn(tmp_path, "a")], 2)
    assert list(journal(tmp_path)) == ["a", "a/scored"]


def test_every_need_of_a_plan_stands_before_it():
    config = parse("study", ["game24", "--out", "out"])
    seen = set()
    for stage in plan(config, sizes_of(config)):
        assert seen.issuperset(stage.needs), stage.name
        read = [getattr(stage.config, name, None) for name in ("input", "samples", "model")]
        inside = [path for path in read if path is not None and path.startswith("out/")]
        assert len(inside) == len(stage.needs)
        for path, need in zip(sorted(inside), sorted(stage.needs), strict=True):
            assert path.removeprefix("out/").startswith(need)
        seen.add(stage.name)


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_told_in_one_line(tmp_path):
    with (
        pytest.raises(RunError, match=r"`jobs` 2 was killed.*The same command goes on"),
        study_workers.workers(2, tmp_path / "log") as pool,
    ):
        pool.submit(killed).result()


def children(pid):
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def until(what, seconds=120.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_processes_end_with_their_parent(tmp_path):
    out = tmp_path / "study"
    flags = ["--quick", "--limit", "12", "--jobs", "2", "--device", "cpu", "--out", str(out)]
    parent = subprocess.Popen(
        [sys.executable, "-m", "sharpen", "study", "game24", *flags], stderr=subprocess.DEVNULL
    )
    until(lambda: list(out.rglob("*.jsonl")))
    beside = children(parent.pid)
    assert len(beside) >= 2
    parent.kill()
    parent.wait()
    # so that none holds a lock when the same command goes on
    until(lambda: all(map(gone, beside)), 20.0)
