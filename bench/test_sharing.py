"""What sharing a prompt saves, for pytest-benchmark.

    pytest bench --benchmark-only [-k "sharing and sampling"]

A task is measured in a process of its own, as `python -m bench.sharing` measures it: in that of the
tests every function of ours would check its argument types. Each test replays one contender.
"""

import dataclasses
import functools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

from bench._measure import RecordedClock, say, write
from bench.sharing import NAMES, TASKS, measured

CLOCK = RecordedClock()


@functools.cache
def found_of(task, config):
    """Rows and rounds of one task by contender, printed as soon as they are known."""
    spawn = multiprocessing.get_context("spawn")
    # so that progress is seen while it runs
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        say(f"\n{task}")
        with ProcessPoolExecutor(1, spawn) as pool:
            rows, seconds, text = pool.submit(measured, task, config.getoption("seconds")).result()
        print(text, flush=True)
    if config.getoption("out"):
        write(rows, config.getoption("out"))
    return {row.impl: row for row in rows}, seconds


def contenders():
    """A test for each contender of each task."""
    for task in TASKS:
        marks = pytest.mark.benchmark(group=str(task), timer=CLOCK.now)
        for name in NAMES[task.what]:
            yield pytest.param(task, name, marks=marks, id=f"{task}-{name}")


@pytest.mark.filterwarnings("ignore")  # of other people's packages
@pytest.mark.parametrize(("task", "name"), list(contenders()))
def test_sharing(benchmark, pytestconfig, task, name):
    """Replays what was recorded of one contender."""
    if benchmark.disabled:
        pytest.skip("measures with --benchmark-only")
    rows, seconds = found_of(task, pytestconfig)
    facts = dataclasses.asdict(rows[name])
    told = ("kind", "peak_extra_mib", "saved_mib", "max_error")
    benchmark.extra_info |= {key: facts[key] for key in told}
    CLOCK.replay(seconds[name])
    benchmark.pedantic(CLOCK.advance, rounds=len(seconds[name]))
