"""token_logprob against PyTorch from logits, forward and forward with backward.

    python -m bench.token_logprob                       # JSON lines, then a table
    python -m bench.token_logprob --out bench/results/token_logprob.jsonl
    python -m bench.token_logprob --check               # tiny, asserts agreement, no timing

Memory bound: forward's floor is one read of the logits, `read` (their sum) in the same rounds;
backward's is one more read and one write of the gradient.
"""

import argparse
import dataclasses
import os
from pathlib import Path

import torch

from bench._measure import Contenders, Row, measure, write
from sharpen_kernels.token_logprob import token_logprob, token_logprob_reference

GPU_SHAPES = [(4096, 151_936), (4096, 128_256), (16_384, 32_768)]  # Qwen 2.5, Llama 3, Mistral
CPU_SHAPES = [(4096, 204), (256, 32_768), (64, 151_936)]  # Game of 24, Mistral, Qwen 2.5
FOUR = ("logprob", "entropy", "self_certainty", "is_greedy")
TEN = (*FOUR, "lse", "varentropy", "sum_p2", "top1", "margin", "rank")
ERROR_ROWS = 64  # compared with fp64


def inputs(R: int, V: int, dtype: torch.dtype, device: str):
    """Logits with the spread of a trained model (3), random targets."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(R, V, device=device)).to(dtype)
    return logits, torch.randint(V, (R,), device=device)


def eager(x, t):
    """All log-probabilities at once from fp32 logits: equally exact."""
    return x.float().log_softmax(1).gather(1, t[:, None])[:, 0]


def indexed(x, t):
    """Chosen logit minus logsumexp: no second R x V tensor for fp32 logits."""
    x = x.float()
    return x.gather(1, t[:, None])[:, 0] - x.logsumexp(1)


IMPLS = {
    "ours": lambda x, t: token_logprob(x, t).logprob,
    "log_softmax + gather": eager,
    "gather - logsumexp": indexed,
    "log_softmax + gather, compiled": torch.compile(eager, dynamic=False),
}


def max_errors(impls, x, t) -> dict[str, float]:
    """Largest difference from fp64 on the first rows, in nats."""
    x, t = x[:ERROR_ROWS], t[:ERROR_ROWS]
    truth = token_logprob_reference(x.double(), t).logprob
    return {name: (fn(x, t).double() - truth).abs().max().item() for name, fn in impls.items()}


def compare(impls, shape: tuple[int, int], dtype: torch.dtype, device: str, seconds: float):
    """Rows of one shape: forward, then forward with backward."""
    x, t = inputs(*shape, dtype, device)
    leaf = x.clone().requires_grad_()
    forward: Contenders = {name: lambda fn=fn: fn(x, t) for name, fn in impls.items()}
    forward["ours, 4 statistics"] = lambda: token_logprob(x, t, stats=FOUR)
    forward["ours, 10 statistics"] = lambda: token_logprob(x, t, stats=TEN)
    forward["read"] = lambda: x.sum()
    backward: Contenders = {
        name: lambda fn=fn: torch.autograd.grad(fn(leaf, t).sum(), leaf)
        for name, fn in impls.items()
    }
    rows: list[Row] = []
    for op, calls in (("forward", forward), ("forward+backward", backward)):
        names = {"op": f"token_logprob {op}", "shape": "R={} V={}".format(*shape)}
        names["dtype"] = str(dtype)
        # an exponential and an addition a logit
        flops = 2.0 * x.numel()
        rows += measure(calls, names, device=device, flops=flops, seconds=seconds)
    errors = max_errors(impls, x, t)
    return [dataclasses.replace(row, max_error=errors.get(row.impl)) for row in rows]


def main() -> None:
    """Parse the flags; check or measure."""
    parser = argparse.ArgumentParser(description="token_logprob against PyTorch")
    parser.add_argument("--check", action="store_true", help="agreement on a tiny shape only")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing, for each group")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    without = args.check or args.no_compile
    impls = {n: fn for n, fn in IMPLS.items() if not (without and "compiled" in n)}
    if args.check:
        errors = max_errors(impls, *inputs(5, 20_000, torch.bfloat16, args.device))
        assert max(errors.values()) < 1e-4, errors
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler counts memory, in silence
    table = []
    for dtype in (torch.bfloat16, torch.float32):
        for shape in GPU_SHAPES if args.device == "cuda" else CPU_SHAPES:
            rows = compare(impls, shape, dtype, args.device, args.seconds)
            write(rows, args.out)
            table += rows
    for row in table:
        name = f"{row.op:32}{row.shape:18}{row.dtype:15}{row.impl:32}"
        print(f"{name}{row.median_us / 1e3:10.2f} ms{row.peak_extra_mib:10.1f} MiB")


if __name__ == "__main__":
    main()
