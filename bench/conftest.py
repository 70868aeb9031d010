"""`pytest bench --benchmark-only` measures, whatever the settings of the tests say."""

from pathlib import Path

import pytest


def pytest_addoption(parser):
    """Two flags of our own."""
    group = parser.getgroup("bench")
    group.addoption("--seconds", type=float, default=1.0, help="of rounds, for each task")
    group.addoption("--out", type=Path, help="append what was measured, as JSON lines")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Benchmarks are off in the settings, for the tests; asking for them turns them on."""
    if config.getoption("benchmark_only", False):
        config.option.benchmark_enable = True
