"""The model type `sharpen` beside lm-evaluation-harness's own `hf`, on many-choice tasks.

    python -m bench.lm_eval_tasks                             # every task, in an environment with
    python -m bench.lm_eval_tasks --threads 1 --out FILE.jsonl              # sharpen[lm-eval]
    python -m bench.lm_eval_tasks --check                     # tiny shapes, agreement alone

`loglikelihood` from text to answers, of a random Llama of 4 layers x 256, V = 8192, fp32,
a token a character. "choices": contexts of 600 tokens, 8 choices of 24 each. "shots": 600 tokens of
worked examples before 16 questions of 40 tokens, 4 choices of 8 each. Batches hold as many tokens:
those of 8 sequences of `hf`, and as large a budget of ours.
"""

import argparse
import functools
import logging
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from bench._lm_eval_problems import BATCH, CHECKED, TASKS, Task, tokenizer
from bench._machine import machine
from bench._measure import Timing, measure
from bench._rows import Row, write
from bench._sharing import llama
from bench._tables import table
from sharpen.errors import InputError
from sharpen.integrations.lm_eval import register

TOLERANCE = 1e-5  # nats a token, of the sums over a choice


# the harness's own classes
def measured(task: Task, device: str, seconds: float) -> tuple[list[Row], dict[str, Timing]]:
    """Rows and timings; a RuntimeError if the answers differ."""
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import get_model  # pyright: ignore[reportMissingImports]

    asked = [Instance("loglikelihood", {}, pair, 0) for pair in task.pairs()]

    def answers(lm: Any) -> torch.Tensor:
        found = lm.loglikelihood(asked, disable_tqdm=True)
        return torch.tensor([x for x, _ in found], dtype=torch.float64) / task.C

    made = functools.partial(dict, tokenizer=tokenizer(), device=device, batch_size=BATCH)
    ways = {
        "ours": get_model("sharpen")(llama().to(device), **made(max_tokens=task.max_tokens)),
        "ours, sharing=none": get_model("sharpen")(
            llama().to(device), **made(max_tokens=task.max_tokens, sharing="none")
        ),
        "hf": get_model("hf")(llama().to(device), **made()),
    }
    truth = answers(ways["hf"])
    errors = {name: (answers(lm) - truth).abs().max().item() for name, lm in ways.items()}
    timings, failed = measure(
        {name: functools.partial(answers, lm) for name, lm in ways.items()}, device, seconds
    )
    if failed or max(errors.values()) > TOLERANCE:
        raise RuntimeError(f"a contender failed or differs: {failed} {errors}")
    facts = machine(device)
    rows = [
        Row(
            op=f"lm-eval {task.name}", impl=name, shape=str(task), dtype="float32",
            median_us=round(timing.median * 1e6, 1), spread=round(timing.spread, 3),
            rounds=len(timing.seconds), tflop_per_s=round(task.flops / timing.median / 1e12, 4),
            peak_extra_mib=round(timing.peak_extra_mib, 2), machine=facts,
            max_error=errors[name], kind="ours" if name.startswith("ours") else "exact",
        )
        for name, timing in timings.items()
    ]  # fmt: skip
    return rows, timings


def main() -> int:
    """Parse the flags and measure."""
    parser = argparse.ArgumentParser(description="lm-eval's many-choice tasks, ours beside hf")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=20.0, help="of rounds, for each task")
    parser.add_argument("--out", type=Path, help="append the rows to this file, as JSON lines")
    parser.add_argument("--check", action="store_true", help="tiny shapes, agreement alone")
    args = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler counts memory, in silence
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        register()
    except InputError as error:
        print(f"missing, {error}")
        return 0 if args.check else 2
    for task in CHECKED if args.check else TASKS:
        rows, timings = measured(task, args.device, 0.0 if args.check else args.seconds)
        times = zip(timings["hf"].seconds, timings["ours"].seconds, strict=True)
        ratio = statistics.median(hf / ours for hf, ours in times)
        print(f"{table(f'lm-eval {task.name}, {task}', rows, {})}\n  ours: {ratio:.2f} x hf")
        if args.out:
            write(rows, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
