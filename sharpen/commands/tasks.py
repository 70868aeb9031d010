"""`sharpen tasks`: list the tasks and their splits."""

import sys

from sharpen.tasks import TASKS, get_task

from .options import TasksConfig


def run(config: TasksConfig) -> None:
    """Print one line a task, and its splits."""
    for name in TASKS:
        task = get_task(name)
        sizes = ", ".join(f"{split} {len(task.examples(split))}" for split in task.splits)
        sys.stdout.write(f"{name}: {task.description}; splits: {sizes}\n")
