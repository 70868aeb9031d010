"""Processes that run stages side by side, and end with the process that started them."""

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from sharpen.console import log_to_stderr, quiet_libraries
from sharpen.errors import RunError

log = logging.getLogger("sharpen")


@contextmanager
def workers(jobs: int, printed: Path) -> Iterator[Executor]:
    """Where calls run: this process if `jobs` is 1, else as many others.

    Args:
        jobs: Calls at a time; the threads of this process are shared out among them.
        printed: The file that takes what other processes print.
    """
    if jobs == 1:
        yield _ThisProcess()
        return
    threads = max(1, torch.get_num_threads() // jobs)
    log.info("%d stages at a time; what they print: %s", jobs, printed)
    try:
        with ProcessPoolExecutor(
            jobs,
            # a fork would share the state of thread pools
            mp_context=get_context("spawn"),
            initializer=_begin,
            initargs=(threads, str(printed)),
        ) as pool:
            yield pool
    except BrokenProcessPool as error:
        raise RunError(
            f"a process of `jobs` {jobs} was killed, perhaps for want of memory; what it printed "
            f"is in {str(printed)!r}. The same command goes on; fewer `jobs` take less memory."
        ) from error


class _ThisProcess(Executor):
    """Runs a call while it is submitted."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a call; the future is done."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        # as other processes do; who asks for the result gets it
        except BaseException as error:
            future.set_exception(error)
        return future


def _begin(threads: int, printed: str) -> None:
    """Make ready a process of its own."""
    torch.set_num_threads(threads)
    with open(printed, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    log_to_stderr()
    quiet_libraries()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
