"""Every contender of every task, for pytest-benchmark.

    pytest bench --benchmark-only [--benchmark-json=FILE] [-k "linear_logprob and forward"]

The contenders of a task are measured in turns, once; each test then replays what was recorded of
its contender on a clock of its own, so that the statistics are those of interleaved calls.
"""

import dataclasses
import functools

import pytest
import torch

from bench._measure import RecordedClock, say, table, write
from bench.speed import all_tasks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOCK = RecordedClock()


@functools.cache
def measured(task, config):
    """What came of one task, printed as soon as it is known; its tensors are gone by then."""
    # so that progress is seen while it runs
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        say(f"\n{task}")
        results, missing = task.run(config.getoption("seconds"))
        rows = [row for row, _ in results.values()]
        print(table(str(task), rows, missing), flush=True)
    if config.getoption("out"):
        write(rows, config.getoption("out"))
    return results, missing


def contenders():
    """A test for each contender, floor and absentee of each task."""
    for task in all_tasks(DEVICE):
        taking, missing = task.peers()
        marks = pytest.mark.benchmark(group=str(task), timer=CLOCK.now)
        for name in [*taking, *task.floors(), *missing]:
            yield pytest.param(task, name, marks=marks, id=f"{task}-{name}")


@pytest.mark.filterwarnings("ignore")  # of other people's packages
@pytest.mark.parametrize(("task", "name"), list(contenders()))
def test_speed(benchmark, pytestconfig, task, name):
    """Replays what was recorded of one contender."""
    if benchmark.disabled:
        pytest.skip("measures with --benchmark-only")
    results, missing = measured(task, pytestconfig)
    if name in missing:
        pytest.skip(f"missing: {name}: {missing[name]}")
    row, timing = results[name]
    facts = dataclasses.asdict(row)
    benchmark.extra_info |= {key: facts[key] for key in ("kind", "peak_extra_mib", "max_error")}
    CLOCK.replay(timing.seconds)
    benchmark.pedantic(CLOCK.advance, rounds=len(timing.seconds))
