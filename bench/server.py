"""The server beside the scorer that it serves: 32 clients, the same work, seconds of all of it.

    python -m bench.server                              # in an environment with sharpen[serve]
    python -m bench.server --prompts 16 --shape 512 64 16 --threads 1 --out FILE.jsonl
    python -m bench.server --check                      # tiny shapes, agreement alone

    offline           one call of Scorer.score
    micro-batcher     32 threads of this process, one completion each, no HTTP
    a prompt          over loopback, a prompt with its N completions a request
    a completion      over loopback, one completion a request, as OpenRLHF asks

A random Llama of 4 layers x 256, V = 8192, fp32 on a CPU. Clients run on the same cores, so their
work is part of what is measured.
"""

import argparse
import contextlib
import importlib.util
import statistics
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from bench._machine import machine
from bench._measure import measure
from bench._rows import Row, write
from bench._server_clients import answers, request, serving
from bench._sharing import Problem, V, llama
from bench._tables import table
from sharpen.scoring import Scorer
from sharpen.server.dialect import scores_of
from sharpen.server.jobs import Job
from sharpen.server.micro_batcher import MicroBatcher

CLIENTS = 32


@contextlib.contextmanager
def contenders(
    problem: Problem, n_prompts: int, threads: int
) -> Iterator[dict[str, Callable[[], Tensor]]]:
    """By name, what scores all completions of all prompts; the server ends with the block."""
    generator = torch.Generator().manual_seed(1)
    P, C, N = problem.P, problem.C, problem.N
    prompts = torch.randint(V, (n_prompts, P), generator=generator).tolist()
    groups = torch.randint(V, (n_prompts, N, C), generator=generator).tolist()
    each = [(prompt, [one]) for prompt, group in zip(prompts, groups, strict=True) for one in group]
    scorer = Scorer(llama(), max_tokens=16384)
    ways: dict[str, Callable[[], Tensor]] = {
        "offline": lambda: scorer.score(prompts, groups).reward("logprob")
    }
    with contextlib.ExitStack() as stack:
        batcher = stack.enter_context(MicroBatcher(scorer.score))
        pool = stack.enter_context(ThreadPoolExecutor(CLIENTS))

        def one(pair: tuple[list[int], list[list[int]]]) -> Tensor:
            job = Job(*pair)
            (tokens,) = batcher.submit([job]).future.result()
            return scores_of(job, tokens).reward("logprob")

        ways["ours, micro-batcher"] = lambda: torch.cat(list(pool.map(one, each)))
        if importlib.util.find_spec("uvicorn") and importlib.util.find_spec("fastapi"):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            scorer.model.save_pretrained(folder)
            flags = ("--max-tokens", "16384", "--device", "cpu")
            port = stack.enter_context(serving(folder, *flags, threads=threads))
            whole = list(zip(prompts, groups, strict=True))
            for name, pairs in (("a prompt", whole), ("a completion", each)):
                sent = [request("/score", {"prompt": p, "completions": c}) for p, c in pairs]
                ways[f"ours, server, {name}"] = lambda sent=sent: torch.tensor(
                    [x for got in answers(port, sent, CLIENTS) for x in got["rewards"]["logprob"]]
                )
        yield ways


def main() -> None:
    """Parse the flags and measure."""
    parser = argparse.ArgumentParser(description="the server beside its scorer")
    parser.add_argument(
        "--shape", type=int, nargs=3, metavar=("P", "C", "N"), default=(512, 64, 16)
    )
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=30.0, help="of rounds")
    parser.add_argument("--out", type=Path, help="append the rows to this file, as JSON lines")
    parser.add_argument("--check", action="store_true", help="tiny shapes, agreement alone")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    problem, n = (Problem(20, 5, 3), 5) if args.check else (Problem(*args.shape), args.prompts)
    with contenders(problem, n, args.threads) as ways:
        truth = ways["offline"]()
        errors = {name: (way() - truth).abs().max().item() for name, way in ways.items()}
        timings, missing = measure(ways, "cpu", 0.0 if args.check else args.seconds)
    if missing or max(errors.values()) > 1e-3:
        raise SystemExit(f"does not agree with the scorer: {errors} {missing}")
    base = timings["offline"]
    rows = [
        Row(
            "server", name, f"prompts={n} {problem} clients={CLIENTS}", "float32",
            round(t.median * 1e6, 1), round(t.spread, 3), len(t.seconds),
            round(n * problem.flops / t.median / 1e12, 4), round(t.peak_extra_mib, 2),
            machine("cpu"), errors[name], "ours" if name != "offline" else "exact",
        )
        for name, t in timings.items()
    ]  # fmt: skip
    print(table(f"server, {rows[0].shape}, float32, cpu", rows, missing))
    n_tokens = n * (problem.P + problem.N * problem.C)
    for name, t in timings.items():
        ratio = statistics.median(a / b for a, b in zip(base.seconds, t.seconds, strict=True))
        print(f"  {name}: {n_tokens / t.median:.0f} tokens/s, {ratio:.1%} of offline")
    if args.out:
        write(rows, args.out)


if __name__ == "__main__":
    main()
