"""Code blocks of a page of documentation, to be run as a reader would."""

import os
import re
import subprocess
import sys
from pathlib import Path

from test_layers import ROOT


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of `page`, a path from the root, in order."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def ran(block: str, language: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """`block` in a process of its own in `folder`, with this environment's `sharpen`."""
    commands = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    first = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PYTHONPATH": path, "PATH": first}
    return subprocess.run(
        [*commands[language], block], cwd=folder, env=environment, capture_output=True, text=True
    )
