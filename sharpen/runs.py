"""Runs that survive being killed: settings that are claimed once, lines that are kept.

A run owns its outputs through one settings file. The same command finds the same settings
and goes on; another command is refused with the difference named. Lines are appended and
flushed to disk as they are finished; a line torn by a crash is cut off on the next start.
"""

import errno
import fcntl
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import InputError, RunError
from .records import Row, dump, write_text

logger = logging.getLogger(__name__)

Settings = dict[str, Any]
# what a lock that another process holds says; any other error is a place without locks
HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class Run:
    """The right to write one set of outputs, held until closed (a lock on the settings file).

    Args:
        settings_path: Where the settings live: `DIR/run.json`, or beside an output file.
        settings: Everything that the outputs depend on; JSON values.
        outputs: Files that this run will write. They must not exist without the settings file.

    Raises:
        RunError: If the outputs belong to other settings or to nobody, or another process
            is writing them.
        InputError: If the place cannot be written to.
    """

    def __init__(self, settings_path: Path, settings: Settings, outputs: Iterable[Path]):
        self.settings_path = settings_path
        # as it will read back: tuples become lists
        settings = json.loads(json.dumps(settings))
        existing = [str(path) for path in outputs if path.exists()]
        if existing and not settings_path.exists():
            raise RunError(
                f"{existing[0]!r} exists and was not made by this command; "
                "choose another output or move it away."
            )
        try:
            settings_path.parent.mkdir(parents=True, exist_ok=True)
            lock_path = settings_path.with_name(f".{settings_path.name}.lock")
            self._lock = open(lock_path, "w")  # noqa: SIM115 (held till close)
        except OSError as error:
            raise InputError(
                f"`out` {str(settings_path.parent)!r} cannot be written: {error.strerror}; "
                "choose another place."
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in HELD:
                # NFS without a lock server, and some mounts of object stores
                logger.warning(
                    "%r is on a file system without locks (%s): make sure that one process alone "
                    "writes there.",
                    *(str(settings_path.parent), error.strerror),
                )
            else:
                self._lock.close()
                raise RunError(
                    f"{str(settings_path.parent)!r} is in use by another process; wait for it."
                ) from error
        try:
            self._claim(settings)
        except BaseException:
            self.close()
            raise

    def _claim(self, settings: Settings) -> None:
        if not self.settings_path.exists():
            write_text(self.settings_path, json.dumps(settings, indent=2) + "\n")
            return
        try:
            before = json.loads(self.settings_path.read_text())
        except (OSError, ValueError) as error:
            raise RunError(
                f"{str(self.settings_path)!r} is not a settings file ({error}); "
                "choose another output."
            ) from error
        different = [
            f"{key} was {before.get(key)!r}, is {settings.get(key)!r}"
            for key in sorted({*before, *settings})
            if before.get(key) != settings.get(key)
        ]
        if different:
            raise RunError(
                f"{str(self.settings_path.parent)!r} was made with other settings: "
                f"{'; '.join(different)}. Use those settings or another output."
            )

    def close(self) -> None:
        """Give the outputs free for another process."""
        self._lock.close()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


class Journal:
    """An append-only JSON lines file that a crash can only ever lose the end of.

    `rows` holds what was there when it was opened. Appended rows are on disk (fsync) when
    `append` returns.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[Row] = []
        if path.exists():
            self._recover()

    def _recover(self) -> None:
        kept = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                # only the last line can be without its newline: the one a crash tore
                if not line.endswith(b"\n"):
                    break
                try:
                    self.rows.append(json.loads(line))
                except ValueError as error:
                    raise RunError(
                        f"{self.path}:{number}: not a line this command wrote ({error}); "
                        "mend or remove the file."
                    ) from error
                kept += len(line)
        if kept < self.path.stat().st_size:
            os.truncate(self.path, kept)

    def append(self, rows: Iterable[Row]) -> None:
        """Write whole lines and flush them to disk."""
        text = "".join(map(dump, rows))
        with open(self.path, "a", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
