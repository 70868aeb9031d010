"""What sharing a prompt saves: in scoring, in a training step, in sampling.

    python -m bench.sharing                               # every task
    python -m bench.sharing --what forward --shape 512 64 16 --threads 1 --out FILE.jsonl
    python -m bench.sharing --chart docs/sharing.svg      # seconds against N, beside P + N C
    python -m bench.sharing --check                       # tiny shapes, agreement alone

Scoring and training: a random Llama of 4 layers x 256, V = 8192, beside the padded batch with
`logits_to_keep` and beside a DynamicCache of the prompt that is repeated N times. Sampling and
scoring of samples: the model that ships, its prompts after six worked examples, beside `generate`
and padded batches of whole sequences. All fp32 on a CPU.
"""

import argparse
import os
from pathlib import Path

import torch
import transformers

from bench._rows import Row, write
from bench._sharing_chart import chart
from bench._sharing_rows import rows_of, text_of
from bench._sharing_tasks import WHATS, Task

TASKS = [
    Task("forward", (512, 64, 16)),
    Task("forward", (2048, 64, 16)),
    Task("forward", (512, 64, 1)),
    Task("forward", (16, 64, 16)),
    Task("forward+backward", (512, 64, 16)),
    Task("sampling", (4, 48, 50)),
    Task("scoring", (4, 48, 50)),
]
CHECKED = [
    Task("forward", (20, 5, 3)),
    Task("forward", (7, 2, 1)),
    Task("forward+backward", (20, 5, 6)),
    Task("sampling", (2, 6, 3)),
    Task("scoring", (2, 6, 3)),
]
CHART = [Task("forward", (512, 64, n)) for n in (1, 4, 16, 64, 256)]


def measured(task: Task, seconds: float) -> tuple[list[Row], dict[str, tuple[float, ...]], str]:
    """Rows, the seconds of each round, and the table."""
    transformers.logging.disable_progress_bar()
    found = task.run(seconds)
    seen = {name: timing.seconds for name, timing in found.timings.items()}
    return rows_of(task, found), seen, text_of(task, found)


def main() -> None:
    """Parse the flags and measure."""
    parser = argparse.ArgumentParser(description="what sharing a prompt saves")
    parser.add_argument("--what", choices=WHATS)
    letters = ("P", "C", "N")
    parser.add_argument("--shape", type=int, nargs=3, metavar=letters, help="P: prompts of game24")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=5.0, help="of rounds, for each task")
    parser.add_argument("--out", type=Path, help="append the rows to this file, as JSON lines")
    parser.add_argument("--chart", type=Path, help="draw scoring against N into this file instead")
    parser.add_argument("--check", action="store_true", help="tiny shapes, agreement alone")
    args = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler counts memory, in silence
    if args.threads:
        torch.set_num_threads(args.threads)
    every: list[Row] = []
    for task in chosen(args):
        rows, _, text = measured(task, 0.0 if args.check else args.seconds)
        print(text, flush=True)
        every += rows
        if args.out:
            write(rows, args.out)
    if args.chart:
        chart(every, args.chart)


def chosen(args: argparse.Namespace) -> list[Task]:
    """The tasks that the flags name."""
    if args.check or args.chart:
        return CHECKED if args.check else CHART
    shape = tuple(args.shape) if args.shape else None
    if shape:
        return [Task(args.what or "forward", shape)]
    return [task for task in TASKS if args.what in (None, task.what)]


if __name__ == "__main__":
    main()
