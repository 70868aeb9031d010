"""`sharpen study TASK`: every selector, sampler and trained model on one task, compared.

Runs the other commands, each into a place of its own under OUT, and puts what they left into one
table. Writes `stages.jsonl` (every run with its command and seconds), `study.json`, `study.md` and
its figures. A killed study goes on with the stage it was in; a finished one runs nothing again.

options -> plan -> stages (runs the commands) -> pools (reads what they left) -> tables -> page
"""

import json
import sys
from pathlib import Path
from typing import Any

from sharpen.commands.inputs import model_settings
from sharpen.errors import InputError, check_value
from sharpen.experiments.options import TASKS, StudyConfig
from sharpen.records import write_text
from sharpen.runs import Run
from sharpen.training.fit import require_train

from .page import figure_files, format_page, headline
from .plan import Sizes, plan, sizes_of
from .stages import STAGES, run_stages
from .tables import tables

STUDY, PAGE = "study.json", "study.md"


def run(config: StudyConfig) -> None:
    """Run the command, or go on with it."""
    if config.task not in TASKS:
        raise InputError(f"`task` must be one of {', '.join(TASKS)}, got {config.task!r}.")
    check_value("jobs", config.jobs, config.jobs >= 1, "at least 1")
    require_train()
    sizes = sizes_of(config)
    out = Path(config.out)
    with Run(out / "run.json", settings(config, sizes), [out / STAGES, out / STUDY, out / PAGE]):
        stages = plan(config, sizes)
        run_stages(out, stages, config.jobs)
        if not (out / STUDY).exists():
            found = {"settings": settings(config, sizes), **tables(config, sizes, stages)}
            write_text(out / STUDY, json.dumps(found, indent=1, allow_nan=False) + "\n")
        study = json.loads((out / STUDY).read_text())
        for name, svg in figure_files(study).items():
            write_text(out / name, svg)
        write_text(out / PAGE, format_page(study))
    sys.stdout.write(f"{headline(study)}\npage: {out / PAGE}\n")


def settings(config: StudyConfig, sizes: Sizes) -> dict[str, Any]:
    """Everything that the outputs depend on."""
    return {
        "command": "study",
        "task": config.task,
        **model_settings(config, config.device or "auto"),
        "quick": config.quick,
        "max_new_tokens": config.max_new_tokens,
        **vars(sizes),
    }
