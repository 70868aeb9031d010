"""Each host is imported in its own place and nowhere else, in whatever way Python lets one."""

import ast
import re

import pytest

from test_layers import MODULES, PACKAGES, ROOT

# a host's module to the only files and folders that may import it
PLACES = {
    "axolotl": [],
    "llamafactory": [],
    "lm_eval": ["sharpen/integrations/lm_eval/", "sharpen/commands/lm_eval.py"],
    "nemo_rl": ["sharpen/integrations/nemo_rl.py"],
    "openrlhf": [],
    "ray": ["sharpen/integrations/nemo_rl.py"],
    "swift": ["sharpen/integrations/ms_swift.py"],
    "trl": ["sharpen/integrations/trl/"],
    "verl": ["sharpen/integrations/verl_manager.py"],
    # an engine beside our own sampler, and what the server is made of: deliberate places
    "vllm": ["sharpen/sampling/vllm_engine.py"],
    "fastapi": ["sharpen/server/"],
    "msgpack": ["sharpen/server/"],
    "prometheus_client": ["sharpen/server/"],
    "starlette": ["sharpen/server/"],
    "uvicorn": ["sharpen/server/"],
    # Parquet, where it is asked for
    "datasets": [],
    "pyarrow": ["sharpen/records.py"],
}
IMPORTERS = {"import_module", "__import__", "find_spec", "importorskip", "require"}
DOTTED = re.compile(r"[A-Za-z_]\w*(\.\w+)+")


def called(node):
    """The last part of what a call calls."""
    return getattr(node.func, "id", getattr(node.func, "attr", ""))


def helpers(tree):
    """Functions that import a module which they are told."""
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            given = function.args
            names = {x.arg for x in (*given.posonlyargs, *given.args, *given.kwonlyargs)}
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
            told = [arg for call in calls if called(call) in IMPORTERS for arg in call.args]
            if names & {getattr(x, "id", None) for arg in told for x in ast.walk(arg)}:
                yield function.name


def texts(nodes):
    for node in nodes:
        for part in ast.walk(node):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield part.value


def docstrings(tree):
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
            yield node.body[0].value.value


def roots(tree, importers):
    """First names of the modules that a file may import, by statement, call or dotted text."""
    told = set(docstrings(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call) and called(node) in importers:
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            yield from (text.split(".")[0] for text in texts(given))
    # a module's name that is kept in a variable or a table
    dotted = {text for text in texts([tree]) if DOTTED.fullmatch(text)}
    yield from (text.split(".")[0] for text in dotted - told)


PATHS = list(MODULES.values())
TREES = {path: ast.parse(path.read_text()) for path in PATHS}
ALL_IMPORTERS = IMPORTERS | {name for tree in TREES.values() for name in helpers(tree)}
FOUND = {
    str(path.relative_to(ROOT)): set(roots(tree, ALL_IMPORTERS)) for path, tree in TREES.items()
}


@pytest.mark.parametrize("host", PLACES)
def test_a_host_is_imported_in_its_place_alone(host):
    users = {path for path, found in FOUND.items() if host in found}
    strangers = [path for path in users if not path.startswith(tuple(PLACES[host]))]
    assert strangers == []
    # and every place that is named is one
    for place in PLACES[host]:
        assert any(path.startswith(place) for path in users), f"{place} does not import {host}"


def test_all_of_the_library_is_looked_at():
    assert {path.parts[len(ROOT.parts)] for path in PATHS} == {"sharpen", "kernels"}
    assert len(PATHS) > 100
    assert set(PACKAGES) == {"sharpen", "sharpen_kernels"}


@pytest.mark.parametrize(
    "source",
    [
        "import trl",
        "import os, trl.trainer as t",
        "def f():\n    from trl.trainer import utils",
        "import importlib\nimportlib.import_module('trl')",
        "from importlib import import_module\nimport_module(name='trl')",
        "__import__('trl')",
        "import importlib.util\nimportlib.util.find_spec('trl')",
        "NAME = 'trl.trainer.utils'\nload(NAME)",
        "def optional(module):\n    return import_module(module)\noptional('trl')",
        "def optional(module):\n    return import_module(f'{module}.x')\nhere.optional('trl')",
        "x = optional_of(('trl', 'peft'))\ndef optional_of(names):\n    __import__(names[0])",
    ],
)
def test_every_way_to_import_is_seen(source):
    tree = ast.parse(source)
    assert "trl" in roots(tree, IMPORTERS | set(helpers(tree)))


@pytest.mark.parametrize(
    "source",
    [
        "'''Takes the place of trl.trainer.utils.'''",
        "'''trl.trainer'''",
        "from .trl import x",
        "from sharpen.integrations import trl",
        "engine = 'trl'",
        "print('trl')",
        "message = 'install trl.'",
    ],
)
def test_what_is_no_import_is_none(source):
    tree = ast.parse(source)
    assert "trl" not in roots(tree, IMPORTERS | set(helpers(tree)))
