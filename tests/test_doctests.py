"""Every example in a docstring, and the README's first one, runs and prints what it says."""

import doctest
import importlib

import pytest

from test_layers import MODULES, ROOT

NAMES = list(MODULES)

# each needs a host, which not every environment has
HOSTED = ("sharpen.integrations.", "sharpen.server.")


def imported(name):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if not name.startswith(HOSTED) or str(missing.name).startswith("sharpen"):
            raise
        pytest.skip(f"needs {missing.name}, which is not installed")


@pytest.mark.parametrize("name", NAMES)
def test_examples_of_docstrings(name):
    module = imported(name)
    assert doctest.testmod(module).failed == 0


def test_examples_of_the_readme():
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert result.attempted >= 4
    assert result.failed == 0
