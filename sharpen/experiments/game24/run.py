"""`sharpen study TASK`: every selector, sampler and trained model on one task, compared.

Runs the other commands, each into a place of its own under OUT, and puts what they left into one
table. Writes `stages.jsonl` (every run with its command and seconds), `study.json`, `study.md` and
its figures. A killed study goes on with the stage it was in; a finished one runs nothing again.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharpen.commands.inputs import model_settings
from sharpen.commands.options import ModelOptions, option, required
from sharpen.errors import InputError
from sharpen.experiments.game24.page import figure_files, format_page, headline
from sharpen.records import write_text
from sharpen.runs import Run
from sharpen.training.fit import require_train

from .plan import Sizes, plan, sizes_of
from .results import tables
from .stages import STAGES, run_stages

STUDY, PAGE = "study.json", "study.md"
TASKS = ("game24",)
# the first argument needs no flag
POSITIONAL = "task"


@dataclass(frozen=True, kw_only=True)
class StudyConfig(ModelOptions):
    """Compare everything on one task."""

    task: str = required(f"what to study: {', '.join(TASKS)}")
    out: str = required("run directory; the same command again goes on where it stopped")
    model: str = option("the base: game24 (ships with sharpen), or a model folder", "game24")
    quick: bool = option("the same study in small: a few minutes, and no figure to rely on", False)
    seeds: int | None = option("runs of everything that is random; 3, quick 1")
    train_seeds: int | None = option("runs of each training; 3, quick 1")
    limit: int | None = option("only the first LIMIT test prompts; quick 24")
    n: int | None = option("samples of a test prompt to choose from; 50, quick 10", None, ("-n",))
    few: int | None = option("samples of low temperature, and chains; 8, quick 2")
    train_limit: int | None = option("only the first TRAIN_LIMIT training prompts; quick 24")
    train_n: int | None = option("samples of a training prompt; 25, quick 4")
    max_new_tokens: int = option("cut completions here; a cut one is never chosen", 48)
    jobs: int = option("stages side by side, each in a process with its share of the threads", 1)


def run(config: StudyConfig) -> None:
    """Run the command, or go on with it."""
    if config.task not in TASKS:
        raise InputError(f"`task` must be one of {', '.join(TASKS)}, got {config.task!r}.")
    if config.jobs < 1:
        raise InputError(f"`jobs` must be at least 1, got {config.jobs}.")
    require_train()
    sizes = sizes_of(config)
    out = Path(config.out)
    with Run(out / "run.json", settings(config, sizes), [out / STAGES, out / STUDY, out / PAGE]):
        stages = plan(config, sizes)
        run_stages(out, stages, config.jobs)
        if not (out / STUDY).exists():
            found = {
                "settings": settings(config, sizes),
                **tables(config, sizes, stages),
            }
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
