"""Ours beside every peer that imports, one table a task; the shape can be chosen.

    python -m bench.speed                                   # every task, as `make bench` does
    python -m bench.speed --op linear_logprob --what forward --shape 2048 896 151936 \
        --dtype bfloat16 --threads 2 --out bench/results/speed_cpu.jsonl
    python -m bench.speed --check                           # tiny, asserts agreement, no timing

The tasks of `bench.linear_logprob` and `bench.token_logprob`, which say what their floors are.
"""

from bench._logprob import Task, command, whole_run
from bench.linear_logprob import LinearTask
from bench.token_logprob import TokenTask

OPS: tuple[type[Task], ...] = (LinearTask, TokenTask)


def all_tasks(device: str) -> list[Task]:
    """The tasks of `make bench` on a device."""
    return whole_run(OPS, device)


if __name__ == "__main__":
    command(OPS)
