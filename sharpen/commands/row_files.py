"""Rows into a file whose suffix says how: JSON lines, or parquet. All of them or none."""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path

from sharpen.errors import InputError
from sharpen.records import Row, write_rows

SUFFIXES = (".jsonl", ".parquet")


def check_suffix(path: Path) -> None:
    """Refuse a file that `write_file` could not write, before anything is computed.

    Raises:
        InputError: If its suffix is neither `.jsonl` nor `.parquet`, or parquet has no library.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"`out` must end in {' or '.join(SUFFIXES)}, got {str(path)!r}.")
    if path.suffix == ".parquet":
        try:
            importlib.import_module("pyarrow.parquet")
        except ImportError as error:
            raise InputError(
                f"`out` {str(path)!r} needs pyarrow, got {error}; "
                'run `pip install "sharpen[data]"`, or write .jsonl.'
            ) from error


def write_file(path: Path, rows: Sequence[Row]) -> None:
    """Write a whole file or nothing; the same rows make the same bytes with one pyarrow.

    Args:
        path: Ends in `.jsonl` or `.parquet`, as `check_suffix` wants it.
        rows: At least one: a column has the type that its values have.
    """
    if path.suffix == ".jsonl":
        write_rows(path, rows)
        return
    arrow = importlib.import_module("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    neighbour = path.with_name(f".{path.name}.part")
    parquet.write_table(arrow.Table.from_pylist(list(rows)), neighbour)
    with open(neighbour, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(neighbour, path)
