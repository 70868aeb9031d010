"""Every example in a docstring, and the README's first one, runs and prints what it says."""

import doctest
import importlib

import pytest

from test_layers import MODULES, ROOT

# importing it is running it
COMMANDS = {"sharpen.__main__"}
NAMES = [param.values[0] for param in MODULES if param.values[0] not in COMMANDS]


@pytest.mark.parametrize("name", NAMES)
def test_examples_of_docstrings(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


def test_examples_of_the_readme():
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert result.attempted >= 4
    assert result.failed == 0
