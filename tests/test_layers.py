"""The shape of the code: imports point one way without cycles, importing changes nothing.

Every rule has a list of exceptions, empty or with the reason of each entry; a test fails for an
entry that is no longer needed, too.
"""

import ast
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"sharpen": ROOT / "sharpen", "sharpen_kernels": ROOT / "kernels" / "sharpen_kernels"}
# highest first; a layer may import itself and any later line, never an earlier one
LAYERS = [
    ("sharpen.cli", "sharpen.__main__"),
    ("sharpen.experiments.game24.run", "sharpen.experiments.theory.run"),
    ("sharpen.experiments",),
    ("sharpen.commands",),
    ("sharpen.integrations", "sharpen.server"),
    ("sharpen.evaluation",),
    ("sharpen.training",),
    ("sharpen.sampling",),
    ("sharpen.selection",),
    ("sharpen.scoring",),
    ("sharpen.tasks",),
    ("sharpen.models",),
    ("sharpen.text", "sharpen.ends"),
    ("sharpen.runs",),
    ("sharpen.records",),
    ("sharpen.errors", "sharpen.console"),
    ("sharpen_kernels",),
]
SMOKE_ALARM = 900  # lines of a file; a file past it asks whether it holds one concept
CRUMB = 60  # lines of a module with a single importer, which asks why it stands apart
FORMAT_SKIPS = 40

# module: why it is longer than SMOKE_ALARM
LONG: dict[str, str] = {}
# module: why it is short, with one importer
CRUMBS: dict[str, str] = {
    "sharpen.commands.sample": "a verb; the command line names it in a string",
}
# ops whose files have another name
OP_FILES = {"vocab_parallel_linear_logprob": "vocab_parallel"}
# functions of the door that are not ops: helpers and oracles
NOT_OPS = {"tree_mask", "tree_attention_reference"}
# (package, class): why the name stands twice
TWICE: dict[tuple[str, str], str] = {
    ("sharpen.integrations", "SelfReward"): "documented under this name in TRL and in OpenRLHF",
}


def each_module():
    """(name, path) of every module of both packages."""
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(each_module())
CASES = [pytest.param(name, path, id=name) for name, path in MODULES.items()]
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def level(name):
    """Index of the layer with the longest prefix of `name`, or None."""
    found = [
        (len(prefix), i)
        for i, layer in enumerate(LAYERS)
        for prefix in layer
        if name == prefix or name.startswith(prefix + ".")
    ]
    return max(found)[1] if found else None


def imports(name):
    """(module, name or None) of every import, at any depth, relative ones made absolute."""
    is_package = MODULES[name].name == "__init__.py"
    package = name.split(".") if is_package else name.split(".")[:-1]
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((stem, alias.name) for alias in node.names)


def imported_modules(name):
    """Our own modules that a module imports; a name of a package counts as where it comes from."""
    for stem, item in imports(name):
        if item is not None and f"{stem}.{item}" in MODULES:
            yield f"{stem}.{item}"
        elif stem in MODULES:
            yield stem


@pytest.mark.parametrize(("name", "path"), CASES)
def test_imports_point_down(name, path):
    if name == "sharpen":
        doors = {"sharpen.scoring", "sharpen.selection"}
        assert {other for other, _ in imports(name) if other.startswith("sharpen")} <= doors
        return
    here = level(name)
    assert here is not None, f"{name} has no layer; give it one in LAYERS"
    for stem, item in imports(name):
        assert stem.split(".")[0] != "kernels", f"{name}: import sharpen_kernels, not kernels"
        assert stem != "sharpen" or f"sharpen.{item}" in MODULES, f"{name}: import from a module"
    for other in imported_modules(name):
        there = level(other)
        assert there is None or there >= here, f"{name} must not import {other}"


def cycles(edges):
    """The groups of modules that import each other, directly or around a circle (Tarjan 1972)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in edges[node]:
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            at = stack.index(node)
            group, stack[at:] = stack[at:], []
            if len(group) > 1:
                found.append(sorted(group))

    for node in edges:
        if node not in index:
            visit(node)
    return found


def test_modules_make_no_circle():
    """Imports inside functions and under TYPE_CHECKING count; a package's own door does not."""
    edges = {
        name: {other for other in imported_modules(name) if MODULES[other].name != "__init__.py"}
        for name in MODULES
    }
    assert cycles(edges) == []


def test_circles_are_seen():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


@pytest.mark.parametrize(("name", "path"), CASES)
def test_private_names_stay_in_their_module(name, path):
    private = [
        f"{stem}.{item}"
        for stem, item in imports(name)
        if stem.split(".")[0] in PACKAGES
        and item is not None
        and item.startswith("_")
        and f"{stem}.{item}" not in MODULES
    ]
    aliases = {
        alias.asname or alias.name
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if any(module.endswith(f".{alias.name}") for module in MODULES)
    }
    private += [
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in aliases
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
    ]
    assert private == []


def test_a_class_name_stands_once_in_a_package():
    places = defaultdict(list)
    for name, tree in TREES.items():
        package = (
            ".".join(name.split(".")[:2]) if name.startswith("sharpen.") else "sharpen_kernels"
        )
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                places[package, node.name].append(name)
    twice = {key: names for key, names in places.items() if len(names) > 1}
    assert twice.keys() == TWICE.keys(), twice


def test_a_short_module_has_several_readers():
    """A module under CRUMB lines with one importer is part of that importer, or has a reason."""
    readers = Counter(other for name in MODULES for other in set(imported_modules(name)))
    crumbs = {
        name
        for name, path in MODULES.items()
        if path.name not in ("__init__.py", "__main__.py")
        and len(path.read_text().splitlines()) < CRUMB
        and readers[name] == 1
    }
    assert crumbs == CRUMBS.keys()


def test_long_files_hold_one_concept():
    long = {
        str(path.relative_to(ROOT))
        for folder in ("sharpen", "kernels", "bench", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if len(path.read_text().splitlines()) > SMOKE_ALARM
    }
    assert long == LONG.keys()


def test_formatting_is_left_to_the_formatter():
    mark = "# fmt: " + "skip"
    found = {
        str(path.relative_to(ROOT)): n
        for folder in ("sharpen", "kernels", "bench", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if (n := path.read_text().count(mark))
    }
    assert sum(found.values()) < FORMAT_SKIPS, found


@pytest.mark.parametrize("place", ["bench/{}.py", "tests/kernels/test_{}.py"])
def test_every_op_has_its_benchmark_and_its_tests(place):
    import sharpen_kernels

    ops = [
        name
        for name, value in vars(sharpen_kernels).items()
        if callable(value) and not isinstance(value, type) and name not in NOT_OPS
    ]
    assert {"linear_logprob", "token_logprob", "segment_reduce", "tree_attention"} <= set(ops)
    files = {op: OP_FILES.get(op, op) for op in ops}
    assert [op for op, stem in files.items() if not (ROOT / place.format(stem)).exists()] == []


def test_kernels_stand_alone():
    for name in MODULES:
        if name.startswith("sharpen_kernels"):
            assert not {stem.split(".")[0] for stem, _ in imports(name)} & {
                "sharpen",
                "transformers",
            }


def test_kernels_is_never_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def run(code, **environment):
    """`code` in a process of its own, warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", **environment},
    )


def test_import_has_no_side_effects():
    code = """
import logging, os, random, sys
import numpy, torch
before = (dict(os.environ), list(sys.argv), torch.get_num_threads(), torch.get_default_dtype(),
          torch.get_rng_state().tolist(), logging.getLogger().handlers[:], list(sys.path))
import sharpen, sharpen_kernels
sharpen.Scorer, sharpen.best_of_n
after = (dict(os.environ), list(sys.argv), torch.get_num_threads(), torch.get_default_dtype(),
         torch.get_rng_state().tolist(), logging.getLogger().handlers[:], list(sys.path))
assert before == after
assert not torch.cuda.is_initialized()
assert not {"matplotlib", "accelerate", "peft"} & sys.modules.keys()
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""


def test_transformers_imports_beside_us_from_the_repository_root():
    code = """
import transformers, sharpen
from transformers import LlamaForCausalLM
import kernels
# a namespace portion, or Hugging Face's package where it is installed; never a file of ours
origin = getattr(kernels, "__file__", None)
assert origin is None or "site-packages" in origin, origin
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
