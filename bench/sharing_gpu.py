"""What a shared prompt saves on random models of real shapes, in bf16 on a GPU.

    python -m bench.sharing_gpu                                     # every task
    python -m bench.sharing_gpu --what forward --model Llama-3.1-8B --out FILE.jsonl
    python -m bench.sharing_gpu --check                             # tiny, fp32, agreement alone

Scoring and a training step (forward and backward) beside whole sequences in batches that fit,
which take PyTorch's flash attention, and beside a DynamicCache of the prompt that is repeated for
a part of its completions at a time. Sampling beside `generate` on N copies of the prompt. The
saving in tokens is N (P + C) over P + N C. The models are made on the device; nothing is read.
"""

import argparse
import dataclasses
import os
from pathlib import Path

import torch
import transformers

from bench._rows import write
from bench._sharing_gpu_rows import SharingGpuRow, rows_of, text_of
from bench._sharing_gpu_tasks import Task
from bench._sharing_models import SHAPES, Prompted
from bench.peers.finding import reason

SMALL, LARGE = "Qwen2.5-0.5B", "Llama-3.1-8B"
# the most telling first, for a run that is cut short
TASKS = [
    Task("forward", Prompted(SMALL, 2048, 256, 64), 2**15),
    Task("forward", Prompted(LARGE, 2048, 256, 64), 2**15, alone=False),
    Task("forward+backward", Prompted(SMALL, 2048, 256, 64), 2**14),
    # each token is a step, whatever its row: fewer of them say the same
    Task("sampling", Prompted(SMALL, 2048, 64, 64), 2**15),
    Task("sampling", Prompted(LARGE, 2048, 32, 64), 2**15),
]
CHECKED = [
    Task("forward", Prompted("tiny", 40, 6, 5), 92),
    Task("forward+backward", Prompted("tiny", 40, 6, 5), 92),
    Task("sampling", Prompted("tiny", 40, 6, 5), 92, temperature=0.0),
]
TOLERANCE_NATS = 1e-3  # of fp32; chosen


def measured(task: Task, device: str, dtype: str, seconds: float) -> list[SharingGpuRow]:
    """Rows of one task; prints its table."""
    found = task.run(device, getattr(torch, dtype), seconds)
    rows = rows_of(task, found, device, dtype)
    print(text_of(task, rows, found.missing), flush=True)
    return rows


def check(device: str) -> None:
    """Every contender runs tiny in fp32, and agrees: log-probs, gradients, greedy samples."""
    for task in CHECKED:
        found = task.run(device, torch.float32, 0.0)
        assert not found.missing, found.missing
        print(text_of(task, rows_of(task, found, device, "float32"), found.missing))
        assert all(error.most <= TOLERANCE_NATS for error in found.errors.values()), found.errors
        if task.what == "sampling":
            first, *others = found.returned.values()
            assert all(torch.equal(first, other) for other in others), found.returned
        else:
            assert len(found.errors) == len(found.timings)
        if task.what == "forward+backward":
            print(f"  gradients: {task.gradient_error(device, torch.float32):.0e} of the largest")


def main() -> None:
    """Parse the flags; check or measure."""
    parser = argparse.ArgumentParser(description="what sharing a prompt saves on a GPU")
    parser.add_argument("--check", action="store_true", help="tiny model, agreement alone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--what", choices=sorted({task.what for task in TASKS}))
    parser.add_argument("--model", choices=SHAPES, help="tasks of one model")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("P", "C", "N"), help="instead")
    parser.add_argument("--seconds", type=float, default=1.0, help="of rounds, for each task")
    parser.add_argument("--out", type=Path, help="append the rows to this file, as JSON lines")
    args = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler counts memory, in silence
    transformers.logging.disable_progress_bar()
    if args.check:
        check(args.device)
        return
    for task in chosen(args):
        try:
            rows = measured(task, args.device, args.dtype, args.seconds)
        # a model that does not fit is no reason to lose the other tasks
        except Exception as error:
            print(f"{task}: {reason(error)}", flush=True)
            continue
        if args.out:
            write(list(rows), args.out)


def chosen(args: argparse.Namespace) -> list[Task]:
    """The tasks that the flags name; of a shape or model of their own, where one is given."""
    tasks = [task for task in TASKS if args.what in (None, task.what)]
    if args.shape:
        problem = Prompted(args.model or SMALL, *args.shape)
        # the first task of each kind
        kinds = {task.what: task for task in reversed(tasks)}
        return [dataclasses.replace(task, problem=problem) for task in kinds.values()]
    return [task for task in tasks if args.model in (None, task.problem.name)]


if __name__ == "__main__":
    main()
