"""The server beside the scorer that it serves: 32 clients, the same work, seconds of all of it.

    python -m bench.server                              # in an environment with sharpen[serve]
    python -m bench.server --prompts 16 --shape 512 64 16 --threads 1 --out FILE.jsonl
    python -m bench.server --device cuda --dtype bfloat16 --shape 2048 256 16
    python -m bench.server --check                      # tiny shapes, agreement alone

    offline           one call of Scorer.score
    micro-batcher     32 threads of this process, one completion each, no HTTP
    a prompt          over loopback, a prompt with its N completions a request
    a completion      over loopback, one completion a request, as OpenRLHF asks

A random Llama of 4 layers x 256, V = 8192. Clients run on the same cores as the server, so their
work is part of what is measured. Agreement is judged in fp32; bfloat16 rounds as it may.
"""

import argparse
import statistics
from pathlib import Path

import torch

from bench._machine import machine
from bench._measure import measure
from bench._rows import Row, write
from bench._server_ways import CLIENTS, contenders
from bench._sharing import Problem
from bench._tables import table


def main() -> None:
    """Parse the flags and measure."""
    parser = argparse.ArgumentParser(description="the server beside its scorer")
    parser.add_argument(
        "--shape", type=int, nargs=3, metavar=("P", "C", "N"), default=(512, 64, 16)
    )
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=30.0, help="of rounds")
    parser.add_argument("--out", type=Path, help="append the rows to this file, as JSON lines")
    parser.add_argument("--check", action="store_true", help="tiny shapes, agreement alone")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    problem, n = (Problem(20, 5, 3), 5) if args.check else (Problem(*args.shape), args.prompts)
    with contenders(problem, n, args.threads, args.device, args.dtype) as ways:
        truth = ways["offline"]()
        errors = {name: (way() - truth).abs().max().item() for name, way in ways.items()}
        timings, missing = measure(ways, args.device, 0.0 if args.check else args.seconds)
    bound = 1e-3 if args.dtype == "float32" else float("inf")
    # NaN is above no bound, and below none
    if missing or not max(errors.values()) <= bound:
        raise SystemExit(f"does not agree with the scorer: {errors} {missing}")
    base = timings["offline"]
    rows = [
        Row(
            "server", name, f"prompts={n} {problem} clients={CLIENTS}", args.dtype,
            round(t.median * 1e6, 1), round(t.spread, 3), len(t.seconds),
            round(n * problem.flops / t.median / 1e12, 4), round(t.peak_extra_mib, 2),
            machine(args.device), errors[name], "ours" if name != "offline" else "exact",
        )
        for name, t in timings.items()
    ]  # fmt: skip
    print(table(f"server, {rows[0].shape}, {args.dtype}, {args.device}", rows, missing))
    n_tokens = n * (problem.P + problem.N * problem.C)
    for name, t in timings.items():
        ratio = statistics.median(a / b for a, b in zip(base.seconds, t.seconds, strict=True))
        print(f"  {name}: {n_tokens / t.median:.0f} tokens/s, {ratio:.1%} of offline")
    if args.out:
        write(rows, args.out)


if __name__ == "__main__":
    main()
