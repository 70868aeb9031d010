"""Interpreters of hosts that cannot share an environment with the rest, and runs in them."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python_of(folder, variable, how):
    """Its path; skips the test where there is none."""
    path = Path(os.environ.get(variable, ROOT / folder / "bin" / "python"))
    if not path.exists():
        pytest.skip(f"no {path}: {how}")
    return path


def run(python, *arguments, code=0, cwd=None, **environment):
    """Standard output of one run with our own code first on the path."""
    done = subprocess.run(
        [python, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
            "TOKENIZERS_PARALLELISM": "false",
            **environment,
        },
    )
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"[-4000:]
    return done.stdout


def code_block(page, index=0, language="python"):
    """The index-th block of a language in a page of docs/hosts."""
    text = (ROOT / "docs" / "hosts" / page).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)[index]
