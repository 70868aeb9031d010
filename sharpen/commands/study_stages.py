"""Stages of a study: one run of another command each, done once, with its seconds kept."""

import contextlib
import importlib
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from sharpen.records import Row
from sharpen.runs import Journal

log = logging.getLogger("sharpen")

STAGES = "stages.jsonl"


@dataclass(frozen=True)
class Stage:
    """One run.

    Attributes:
        name: Unique in its study.
        verb: The command.
        config: Its flags.
    """

    name: str
    verb: str
    # of the verb's own class
    config: Any

    @property
    def command(self) -> str:
        """As it is typed."""
        return command_line(self.verb, self.config)


# config: a dataclass of any verb
def command_line(verb: str, config: Any) -> str:
    """The command that has these flags; those that are at their default are left out."""
    parts = ["sharpen", verb]
    for field in fields(config):
        value, default = getattr(config, field.name), field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        if value == default or value is None:
            continue
        flag = "-n" if field.name == "n" else f"--{field.name.replace('_', '-')}"
        values = value if isinstance(value, list) else [value]
        parts += [flag, *map(str, values)]
    return " ".join(parts)


def run_stages(out: Path, stages: Sequence[Stage]) -> None:
    """Run what is not finished yet, in order.

    A stage that was killed is begun again, and goes on by the means of its own command.
    """
    journal = Journal(out / STAGES)
    finished = {row["stage"] for row in journal.rows if row["finished"]}
    for number, stage in enumerate(stages, start=1):
        if stage.name in finished:
            continue
        log.info("%d of %d: %s", number, len(stages), stage.command)
        started, is_finished = time.monotonic(), False
        try:
            config: Any = stage.config
            Path(config.out).parent.mkdir(parents=True, exist_ok=True)
            # stdout is for the result of the study
            with contextlib.redirect_stdout(sys.stderr):
                importlib.import_module(f"sharpen.commands.{stage.verb}").run(config)
            is_finished = True
        finally:
            seconds = time.monotonic() - started
            journal.append([{"stage": stage.name, "seconds": seconds, "finished": is_finished}])


def stage_rows(out: Path, stages: Sequence[Stage]) -> list[Row]:
    """Every stage with its command, seed and wall time, killed attempts included."""
    seconds: dict[str, float] = {}
    for row in Journal(out / STAGES).rows:
        seconds[row["stage"]] = seconds.get(row["stage"], 0.0) + row["seconds"]
    return [
        {
            "stage": stage.name,
            "command": stage.command,
            "seed": getattr(stage.config, "seed", None),
            "seconds": round(seconds[stage.name], 2),
        }
        for stage in stages
    ]
