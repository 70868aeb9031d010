"""The stages of a study: one run of another command each, done once, with its seconds kept.

They run one after another in this process, or side by side in processes that end with it.
"""

import contextlib
import importlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from sharpen.console import log_to_stderr, quiet_libraries
from sharpen.errors import RunError
from sharpen.records import Row
from sharpen.runs import Journal

log = logging.getLogger("sharpen")

STAGES, PRINTED = "stages.jsonl", "stages.log"


@dataclass(frozen=True)
class Stage:
    """One run.

    Attributes:
        name: Unique in its study.
        verb: The command.
        config: Its flags.
        needs: Names of the stages whose files it reads.
    """

    name: str
    verb: str
    # of the verb's own class
    config: Any
    needs: tuple[str, ...] = ()

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


def run_stages(out: Path, stages: Sequence[Stage], jobs: int = 1) -> None:
    """Run what is not finished yet, each stage after those that it needs.

    A stage that was killed is started again, and its own command goes on where it stopped. Where
    one fails, those that run beside it are finished first.

    Args:
        out: Where the journal is, and what the stages print if they run side by side.
        stages: In an order in which one job can run them.
        jobs: Processes side by side, each with its share of the threads; with 1, this process.
    """
    journal = Journal(out / STAGES)
    finished = {row["stage"] for row in journal.rows if row["finished"]}
    waiting = [stage for stage in stages if stage.name not in finished]
    running: dict[Future[float], tuple[Stage, float]] = {}
    n_started, failure = len(stages) - len(waiting), None
    with workers(jobs, out / PRINTED) as pool:
        try:
            while waiting or running:
                ready = [stage for stage in waiting if finished.issuperset(stage.needs)]
                for stage in ready[: 0 if failure else jobs - len(running)]:
                    waiting.remove(stage)
                    n_started += 1
                    log.info("%d of %d: %s", n_started, len(stages), stage.command)
                    running[pool.submit(run_stage, stage)] = stage, time.monotonic()
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    stage, started = running.pop(future)
                    error = future.exception()
                    seconds = time.monotonic() - started if error else future.result()
                    journal.append([_entry(stage, seconds, finished=error is None)])
                    if error is None:
                        finished.add(stage.name)
                    failure = failure or error
        finally:
            # interrupted
            now = time.monotonic()
            journal.append(
                _entry(stage, now - started, finished=False) for stage, started in running.values()
            )
        if failure is not None:
            raise failure


def _entry(stage: Stage, seconds: float, *, finished: bool) -> Row:
    return {"stage": stage.name, "seconds": seconds, "finished": finished}


def run_stage(stage: Stage) -> float:
    """Run one command; return its seconds."""
    started = time.monotonic()
    config: Any = stage.config
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    # stdout is for the result of the study
    with contextlib.redirect_stdout(sys.stderr):
        importlib.import_module(f"sharpen.commands.{stage.verb}").run(config)
    return time.monotonic() - started


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
            initializer=_start_worker,
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


def _start_worker(threads: int, printed: str) -> None:
    """Set up a worker process: its threads, what it prints, its end."""
    torch.set_num_threads(threads)
    with open(printed, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    log_to_stderr()
    quiet_libraries()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait for the parent process to end, then end this one at once."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
