"""linear_logprob's C++ route against its PyTorch route and the bare product, on large heads.

    OMP_NUM_THREADS=1 python -m bench.linear_logprob_cpu                # JSON lines, then ratios
    OMP_NUM_THREADS=2 python -m bench.linear_logprob_cpu --shape 2048 896 151936 --op forward
    python -m bench.linear_logprob_cpu --check                          # tiny, asserts agreement

`gemm` is the product alone in the inputs' dtype, `x @ W^T` forward and, backward, the three
products a step cannot do without; the PyTorch peers compute from fp32 copies, equally exact.
"""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch

from bench._measure import Contenders, Row, measure, write
from bench.linear_logprob import FOUR, IMPLS, inputs, max_errors
from sharpen_kernels import _linear_logprob_cpu as native
from sharpen_kernels import linear_logprob

SHAPES = [(2048, 1024, 32_768)]  # (rows, hidden, vocabulary): Mistral's vocabulary at half width


def pytorch_route(call):
    """`call` with the C++ route refused."""

    def refused(*args):
        with mock.patch.object(native, "takes", return_value=False):
            return call(*args)

    return refused


def forward(x, w, t) -> Contenders:
    """Calls that score the rows."""
    peers = {name: fn for name, fn in IMPLS.items() if name != "ours"}
    return {
        "ours": lambda: linear_logprob(x, w, t),
        "ours, 4 statistics": lambda: linear_logprob(x, w, t, stats=FOUR),
        "ours, PyTorch route": pytorch_route(lambda: linear_logprob(x, w, t)),
        **{name: lambda fn=fn: fn(x, w, t) for name, fn in peers.items()},
        "gemm": lambda: x @ w.T,
    }


def backward(x, w, t) -> Contenders:
    """Calls that go through to the gradients of hidden and weight."""
    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]

    def gradients(fn):
        return torch.autograd.grad(fn(*leaves, t).sum(), leaves)

    def gemms():
        z = x @ w.T
        return z @ w, z.T @ x

    return {
        "ours": lambda: gradients(IMPLS["ours"]),
        "ours, PyTorch route": pytorch_route(lambda: gradients(IMPLS["ours"])),
        **{name: lambda fn=fn: gradients(fn) for name, fn in IMPLS.items() if name != "ours"},
        "gemm": gemms,
    }


OPS = {"forward": (forward, 1), "forward+backward": (backward, 3)}


def compare(op: str, shape: Sequence[int], dtype: torch.dtype, seconds: float) -> list[Row]:
    """Rows of one operation, shape and dtype."""
    R, D, V = shape
    x, w, t = inputs(R, D, V, dtype, "cpu")
    calls, products = OPS[op]
    names = {"op": f"linear_logprob {op}", "shape": f"R={R} D={D} V={V}", "dtype": str(dtype)}
    flops = 2.0 * R * D * V * products
    rows = measure(calls(x, w, t), names, device="cpu", flops=flops, seconds=seconds)
    errors = max_errors(x, w, t)
    return [dataclasses.replace(row, max_error=errors.get(row.impl)) for row in rows]


def main() -> None:
    """Parse the flags; check or measure."""
    parser = argparse.ArgumentParser(description="the C++ route of linear_logprob")
    parser.add_argument("--check", action="store_true", help="agreement on a tiny shape only")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing, for each group")
    parser.add_argument("--shape", type=int, nargs=3, action="append", metavar=("R", "D", "V"))
    parser.add_argument("--op", choices=OPS, action="append")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), action="append")
    args = parser.parse_args()
    if args.check:
        x, w, t = inputs(5, 40, 5000, torch.bfloat16, "cpu")
        both = (IMPLS["ours"], pytorch_route(IMPLS["ours"]))
        gap = both[0](x, w, t) - both[1](x, w, t)
        assert gap.abs().max() < 1e-5, gap
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler counts memory, in silence
    for dtype in args.dtype or ("bfloat16", "float32"):
        for shape in args.shape or SHAPES:
            for op in args.op or OPS:
                rows = compare(
                    op, (shape[0], shape[1], shape[2]), getattr(torch, dtype), args.seconds
                )
                write(rows, args.out)
                (floor,) = (row.median_us for row in rows if row.impl == "gemm")
                for row in rows:
                    ratio = f"{row.median_us / floor:6.2f} x gemm"
                    name = f"{op:18}{row.shape:24}{dtype:10}{row.impl:28}"
                    print(
                        f"{name}{row.median_us / 1e6:9.3f} s{ratio}{row.peak_extra_mib:10.1f} MiB"
                    )


if __name__ == "__main__":
    main()
