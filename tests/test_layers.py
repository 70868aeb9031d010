"""Imports point one way, importing changes nothing, files keep to their budgets."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"sharpen": ROOT / "sharpen", "sharpen_kernels": ROOT / "kernels" / "sharpen_kernels"}
# highest first; a layer may import itself and any later line, never an earlier one
LAYERS = [
    ("sharpen.cli", "sharpen.__main__"),
    ("sharpen.commands",),
    ("sharpen.integrations", "sharpen.server"),
    ("sharpen.evaluation",),
    ("sharpen.training",),
    ("sharpen.sampling",),
    ("sharpen.selection",),
    ("sharpen.scoring",),
    ("sharpen.tasks",),
    ("sharpen.models", "sharpen.limits"),
    ("sharpen.runs",),
    ("sharpen.records",),
    ("sharpen.errors", "sharpen.console"),
    ("sharpen_kernels",),
]
BUDGETS = {"sharpen": 250, "kernels": 350, "tests": 250}


def each_module():
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            yield pytest.param(name, path, id=name)


MODULES = list(each_module())


def level(name):
    for i, layer in enumerate(LAYERS):
        if any(name == prefix or name.startswith(prefix + ".") for prefix in layer):
            return i
    return None


def imported(name, path):
    """Every module that the file names in an import, with relative ones made absolute."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield stem
            yield from (f"{stem}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("name", "path"), MODULES)
def test_imports_point_down(name, path):
    if name == "sharpen":
        return_names = [n for n in imported(name, path) if n.count(".") == 1]
        assert set(return_names) <= {"sharpen.scoring", "sharpen.selection"}
        return
    here = level(name)
    assert here is not None, f"{name} has no layer; give it one in LAYERS"
    for other in imported(name, path):
        assert other.split(".")[0] != "kernels", f"{name}: import sharpen_kernels, not kernels"
        there = level(other)
        if there is not None:
            assert there >= here, f"{name} must not import {other}"
        assert other != "sharpen", f"{name} must import from a module, not from the package"


@pytest.mark.parametrize(("name", "path"), MODULES)
def test_kernels_stand_alone(name, path):
    if name.startswith("sharpen_kernels"):
        roots = {other.split(".")[0] for other in imported(name, path)}
        assert not roots & {"sharpen", "transformers"}


@pytest.mark.parametrize("folder", BUDGETS)
def test_files_keep_to_their_budget(folder):
    over = {
        str(path.relative_to(ROOT)): lines
        for path in (ROOT / folder).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > BUDGETS[folder]
    }
    assert over == {}, "split by idea"


def test_kernels_is_never_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True, text=True, cwd=ROOT, env={"PATH": "/usr/bin:/bin", **environment},
    )  # fmt: skip


def test_import_has_no_side_effects():
    code = """
import logging, os, random, sys
import numpy, torch
before = (dict(os.environ), list(sys.argv), torch.get_num_threads(), torch.get_default_dtype(),
          torch.get_rng_state().tolist(), logging.getLogger().handlers[:], list(sys.path))
import sharpen, sharpen_kernels
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
