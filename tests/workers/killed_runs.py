"""Runs commands of `sharpen`, each killed by SIGKILL as something is called for the nth time.

Reads jobs from stdin, JSON lists [argv, place, n] with `place` as MODULE:NAME.NAME. Each job is a
fork of one warm process, so a kill costs no import.
"""

import gc
import importlib
import json
import os
import signal
import sys

import accelerate  # noqa: F401 (imported before the forks, as peft)
import peft  # noqa: F401
import torch

from sharpen.cli import main
from sharpen.scoring import Scorer


def kill_at(place, n):
    """Die, with no time to tidy up, where `place` is called for the nth time."""
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for inner in owners:
        owner = getattr(owner, inner)
    original = getattr(owner, name)
    calls = 0

    def called(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, called)


def run(argv, place, n):
    """One command, in a fork; an error unless it was killed."""
    child = os.fork()
    if child == 0:
        kill_at(place, n)
        os._exit(main(argv) or 99)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
        sys.exit(f"{argv[0]} was not killed at call {n} of {place}: status {status}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    # what every fork needs is loaded once; no backward, which would start a thread
    Scorer("game24", device="cpu").score([[1, 2, 3]], [[[4], [5]]])
    gc.collect()
    gc.freeze()
    for job in json.load(sys.stdin):
        run(*job)
