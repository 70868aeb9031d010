"""Tasks by name. A new task is a folder here and a row in `TASKS`."""

from collections.abc import Callable

from sharpen.errors import InputError

from .game24.task import Game24
from .protocol import Example as Example
from .protocol import Task as Task

TASKS: dict[str, Callable[[], Task]] = {"game24": Game24}


def get_task(name: str) -> Task:
    """The task called `name`.

    Raises:
        InputError: If there is none.
    """
    if name not in TASKS:
        raise InputError(f"`task` must be one of {', '.join(TASKS)}, got {name!r}.")
    return TASKS[name]()
