"""Ours beside every peer that imports, one table a task; the shape can be chosen.

    python -m bench.speed                                   # every task, as `make bench` does
    python -m bench.speed --op linear_logprob --what forward --shape 2048 896 151936 \
        --dtype bfloat16 --threads 2 --out bench/results/speed_cpu.jsonl
    python -m bench.speed --check                           # tiny, asserts agreement, no timing

Compute bound from hidden rows: 2 R V D operations forward, 6 R V D with both gradients; the floor
is the bare product. Memory bound from logits: the floor is one read of them.
"""

import argparse
import os
from pathlib import Path

import torch

from bench._rows import read, run, write
from bench._shapes import all_tasks
from bench._tables import digest, table
from bench._tasks import DTYPES, WHATS, Op, Task

CHECKED: dict[Op, tuple[int, ...]] = {"linear_logprob": (70, 40, 3000), "token_logprob": (70, 3000)}
EXACT = 1e-4  # nats: what an implementation that is marked exact must keep on `CHECKED`


def check(device: str) -> None:
    """Every task runs tiny, and ours and the exact peers agree with fp64."""
    for op, shape in CHECKED.items():
        for what in WHATS[op]:
            task = Task(op, what, shape, "bfloat16", device)
            # compiling every peer would take a minute: ours and eager PyTorch
            results, missing = run(task, 0.0, only=("ours", "eager", "log_softmax + gather"))
            rows = [row for row, _ in results.values()]
            assert {"ours", "exact", "floor"} <= {row.kind for row in rows}, (task, missing)
            for row in rows:
                if row.kind in ("ours", "exact") and row.max_error is not None:
                    assert row.max_error < EXACT, row
            print(table(str(task), rows, missing))


def main() -> None:
    """Parse the flags; check or measure."""
    parser = argparse.ArgumentParser(description="ours beside every peer")
    parser.add_argument("--check", action="store_true", help="agreement on tiny shapes only")
    parser.add_argument("--out", type=Path, help="append the rows to this file, as JSON lines")
    parser.add_argument("--digest", type=Path, help="a line a task of such a file; no timing")
    parser.add_argument("--seconds", type=float, default=1.0, help="of rounds, for each task")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of PyTorch and of our C++ route")
    parser.add_argument("--op", choices=WHATS, action="append")
    parser.add_argument("--what", choices=sorted({w for ws in WHATS.values() for w in ws}))
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--shape", type=int, nargs="+", metavar="N", help="R D V, or R V of logits")
    parser.add_argument("--only", action="append", help="contenders whose name holds this")
    args = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler counts memory, in silence
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.check:
        check(args.device)
        return
    if args.digest:
        print(digest(read(args.digest)))
        return
    for task in chosen(args):
        results, missing = run(task, args.seconds, only=tuple(args.only or [""]))
        rows = [row for row, _ in results.values()]
        print(table(str(task), rows, missing), flush=True)
        if args.out:
            write(rows, args.out)


def chosen(args: argparse.Namespace) -> list[Task]:
    """The tasks that the flags name: of the whole run, or of a shape of its own."""
    tasks = all_tasks(args.device)
    if args.shape:
        shape = tuple(args.shape)
        tasks = [
            Task(op, what, shape, dtype, args.device)
            for op, whats in WHATS.items()
            if len(shape) == len(CHECKED[op])
            for what in whats
            for dtype in DTYPES
        ]
    return [
        task
        for task in tasks
        if (not args.op or task.op in args.op)
        and args.what in (None, task.what)
        and args.dtype in (None, task.dtype)
    ]


if __name__ == "__main__":
    main()
