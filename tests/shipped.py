"""The smallest useful run of the model that ships with the package."""

from pathlib import Path

from sharpen.cli import main

SMALL_RUN = [
    "bon", "--model", "game24", "--task", "game24", "--limit", "6", "-n", "8",
    "--max-new-tokens", "40", "--max-tokens", "400", "--device", "cpu",
]  # fmt: skip


def bon(out: Path, *extra: str) -> int:
    """Exit code of `sharpen bon` on a few test puzzles."""
    return main([*SMALL_RUN, "--out", str(out), *extra])
