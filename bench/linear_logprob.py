"""linear_logprob against PyTorch, forward and forward with backward, on heads of real models.

    python -m bench.linear_logprob                       # JSON lines, then a table
    python -m bench.linear_logprob --out bench/results/linear_logprob.jsonl
    python -m bench.linear_logprob --check               # tiny, asserts agreement, no timing

Compute bound: 2 R V D operations forward, 6 R V D with both gradients; `gemm` is the product
alone, in the inputs' dtype: the floor of its group.
"""

import argparse
import dataclasses
import os
from pathlib import Path

import torch
from torch.nn import functional

from bench._measure import Contenders, Row, measure, write
from sharpen_kernels.linear_logprob import linear_logprob, linear_logprob_reference

GPU_SHAPES = [  # (rows, hidden, vocabulary)
    (8192, 896, 151_936),  # Qwen2.5-0.5B
    (8192, 2048, 128_256),  # Llama-3.2-1B
    (8192, 4096, 128_256),  # Llama-3.1-8B
]
CPU_SHAPES = [
    (4096, 128, 204),  # the Game of 24 model that ships
    (256, 896, 32_768),  # Qwen2.5-0.5B's width, a quarter of its vocabulary
]
FOUR = ("logprob", "entropy", "self_certainty", "is_greedy")
ERROR_ROWS = 64  # compared with fp64


def inputs(R: int, D: int, V: int, dtype: torch.dtype, device: str):
    """Hidden rows, a head whose logits have the spread of a trained model (3), random targets."""
    torch.manual_seed(0)
    hidden = torch.randn(R, D, device=device).to(dtype)
    weight = (torch.randn(V, D, device=device) * 3 / D**0.5).to(dtype)
    return hidden, weight, torch.randint(V, (R,), device=device)


def eager(x, w, t):
    """All logits at once from fp32 copies: equally exact."""
    return (x.float() @ w.float().T).log_softmax(1).gather(1, t[:, None])[:, 0]


def torch_fused(x, w, t):
    """PyTorch's own op (2.13 and later), on fp32 copies: equally exact."""
    return -functional.linear_cross_entropy(x.float(), w.float(), t, reduction="none")


IMPLS = {"ours": lambda x, w, t: linear_logprob(x, w, t).logprob, "eager fp32": eager}
if hasattr(functional, "linear_cross_entropy"):
    IMPLS["linear_cross_entropy fp32"] = torch_fused


def forward(x, w, t) -> Contenders:
    """Every contender as a call without arguments, with the bare product beside them."""
    calls: Contenders = {name: lambda fn=fn: fn(x, w, t) for name, fn in IMPLS.items()}
    calls["ours, 4 statistics"] = lambda: linear_logprob(x, w, t, stats=FOUR)
    calls["gemm"] = lambda: x @ w.T
    return calls


def backward(x, w, t) -> Contenders:
    """Through to the gradients of hidden and weight."""
    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    return {
        name: lambda fn=fn: torch.autograd.grad(fn(*leaves, t).sum(), leaves)
        for name, fn in IMPLS.items()
    }


def max_errors(x, w, t) -> dict[str, float]:
    """Largest difference from fp64 on the first rows, in nats."""
    x, t = x[:ERROR_ROWS], t[:ERROR_ROWS]
    truth = linear_logprob_reference(x.double(), w.double(), t).logprob
    return {name: (fn(x, w, t).double() - truth).abs().max().item() for name, fn in IMPLS.items()}


def compare(shape: tuple[int, int, int], dtype: torch.dtype, device: str, seconds: float):
    """Rows of one shape: forward, then forward with backward."""
    R, D, V = shape
    x, w, t = inputs(*shape, dtype, device)
    rows: list[Row] = []
    for op, calls, products in (("forward", forward, 1), ("forward+backward", backward, 3)):
        names = {"op": f"linear_logprob {op}", "shape": f"R={R} D={D} V={V}", "dtype": str(dtype)}
        flops = 2.0 * R * D * V * products
        rows += measure(calls(x, w, t), names, device=device, flops=flops, seconds=seconds)
    errors = max_errors(x, w, t)
    return [dataclasses.replace(row, max_error=errors.get(row.impl)) for row in rows]


def main() -> None:
    """Parse the flags; check or measure."""
    parser = argparse.ArgumentParser(description="linear_logprob against PyTorch")
    parser.add_argument("--check", action="store_true", help="agreement on a tiny shape only")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing, for each group")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.check:
        errors = max_errors(*inputs(5, 40, 5000, torch.bfloat16, args.device))
        assert max(errors.values()) < 1e-4, errors
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler counts memory, in silence
    table = []
    for dtype in (torch.bfloat16, torch.float32):
        for shape in GPU_SHAPES if args.device == "cuda" else CPU_SHAPES:
            rows = compare(shape, dtype, args.device, args.seconds)
            write(rows, args.out)
            table += rows
    for row in table:
        name = f"{row.op:32}{row.shape:24}{row.dtype:15}{row.impl:28}"
        print(f"{name}{row.median_us / 1e3:10.2f} ms{row.peak_extra_mib:10.1f} MiB")


if __name__ == "__main__":
    main()
