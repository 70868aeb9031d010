"""The log-prob phase of GRPO: TRL's trainer beside ours, by the method that both train with.

    python -m bench.trl_grpo --threads 1 --out FILE.jsonl          # in .venv-hosts, which has TRL
    python -m bench.trl_grpo --device cuda --dtype bfloat16 --shape 2048 256 16
    python -m bench.trl_grpo --check      # tiny, agreement alone; without TRL, beside its logits

One prompt of P tokens and N completions of C, the random Llama of `bench.sharing`. Log-probs and
entropies, as every step of GRPO takes them: `forward` without gradients, as of old and reference
policies, `forward+backward` with those of the log-probs' sum. No gradient checkpointing.
"""

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench._machine import machine
from bench._measure import measure
from bench._rows import Row, write
from bench._sharing import Problem
from bench._sharing_agreement import check_gradients, errors, gradients
from bench._tables import table
from bench._trl_grpo_ways import OURS, ways

WHATS = ("forward", "forward+backward")


def run(what: str, problem: Problem, args: argparse.Namespace) -> list[Row]:
    """Measure both in turns, after they agreed; a RuntimeError if they do not."""
    dtype = getattr(torch, args.dtype)
    last: dict[str, Tensor] = {}
    found: dict[str, Any] = {}
    contenders = ways(problem, args.device, dtype)

    def call(name: str) -> Tensor:
        model, way = contenders[name]
        with torch.set_grad_enabled(what != "forward"):
            last[name] = way()
        if what != "forward":
            model.zero_grad()
            last[name].sum().backward()
        last[name] = last[name].detach()
        return last[name]

    for name, (model, _) in contenders.items():
        call(name)
        found[name] = gradients(model)
    off = {}
    # in half precision both round as they may; fp32 is judged
    if dtype == torch.float32:
        off = errors(problem, {name: x.cpu() for name, x in last.items()})
        if what != "forward":
            print(f"gradients differ by {check_gradients(found):.0e} of the largest")
    calls = {name: lambda name=name: call(name) for name in contenders}
    timings, failed = measure(calls, args.device, 0.0 if args.check else args.seconds)
    if failed:
        raise RuntimeError(f"a contender failed: {failed}")
    mine, peer = (x.seconds for _, x in sorted(timings.items(), key=lambda x: x[0] != OURS))
    ratio = statistics.median(b / a for a, b in zip(mine, peer, strict=True))
    print(f"round by round, ours is {ratio:.2f} times as fast")
    flops, facts = problem.flops * (3 if "backward" in what else 1), machine(args.device)
    return [
        Row(
            op=f"GRPO log-probs {what}",
            impl=name,
            kind="ours" if name == OURS else "exact",
            shape=str(problem),
            dtype=args.dtype,
            median_us=round(timing.median * 1e6, 1),
            spread=round(timing.spread, 3),
            rounds=len(timing.seconds),
            tflop_per_s=round(flops / timing.median / 1e12, 4),
            peak_extra_mib=round(timing.peak_extra_mib, 2),
            machine=facts,
            max_error=off.get(name),
        )
        for name, timing in timings.items()
    ]


def main() -> None:
    """Parse the flags; check or measure."""
    parser = argparse.ArgumentParser(description="the log-prob phase of GRPO, TRL's and ours")
    parser.add_argument("--what", choices=WHATS)
    parser.add_argument("--shape", type=int, nargs=3, metavar=("P", "C", "N"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=10.0, help="of rounds, for each task")
    parser.add_argument("--out", type=Path, help="append the rows to this file, as JSON lines")
    parser.add_argument("--check", action="store_true", help="tiny, agreement alone")
    args = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler counts memory, in silence
    if args.threads:
        torch.set_num_threads(args.threads)
    problem = Problem(*(args.shape or ((20, 5, 4) if args.check else (512, 64, 16))))
    for what in WHATS if args.what is None else (args.what,):
        rows = run(what, problem, args)
        print(table(f"GRPO log-probs {what}, {problem}, {args.dtype}, {args.device}", rows, {}))
        if args.out:
            write(rows, args.out)


if __name__ == "__main__":
    main()
