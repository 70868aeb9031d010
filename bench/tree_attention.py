"""Attention on trees alone: its rate on the tiles that are not empty, beside flash and Flex.

    python -m bench.tree_attention                  # every tree, bf16 on a GPU
    python -m bench.tree_attention --K 128 --out FILE.jsonl
    python -m bench.tree_attention --check          # tiny, agreement with fp64 alone

The floor is what flash kernels do on a causal sequence of as many tiles (flash-attn where it can be
imported, PyTorch's otherwise). FlexAttention has the tree's mask, made before it is timed; ours
makes its lists of tiles in every call. Operations: 4 K a pair of query and key in those tiles
forward, 3.5 times as many with the gradients of q, k and v.
"""

import argparse
import dataclasses
from pathlib import Path

import torch

from bench._attention_problems import Problem
from bench._attention_rows import run, text_of
from bench._rows import write

BUSH = "P=2048 C=256 N=64"
TRIE = "trie 1000 + 8 x (500 + 4 x (200 + 4 x 100))"  # no run is whole tiles
LEVELS = {
    BUSH: ((1, 2048), (64, 256)),
    TRIE: ((1, 1000), (8, 500), (4, 200), (4, 100)),
}
HEADS = {128: (32, 8), 64: (14, 2)}  # Llama-3.1-8B, Qwen2.5-0.5B: of queries and keys, by K
PROBLEMS = [Problem(name, LEVELS[name], HEADS[K], K) for K in HEADS for name in LEVELS]
CHECKED = [
    Problem("P=150 C=9 N=3", ((1, 150), (3, 9)), (4, 2), 16),
    Problem("trie", ((2, 20), (2, 11), (3, 40)), (2, 1), 32),
]
# chosen; fp32 rounds to some 1e-6, and bf16 to half a percent
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def check(device: str) -> None:
    """Every contender that is there runs tiny, and those with the tree's mask agree with fp64."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    for problem in CHECKED:
        for backward in (False, True):
            rows, missing = run(problem, dtype, device, 0.0, backward=backward)
            print(text_of(rows, missing))
            assert {"ours", "floor"} <= {row.kind for row in rows}, missing
            for row in rows:
                judged = row.errors or {}
                assert row.kind == "floor" or len(judged) == (4 if backward else 1), row
                assert all(error <= TOLERANCE[dtype] for error in judged.values()), row
            if not backward:
                assert "FlexAttention" in {row.impl for row in rows}, missing


def main() -> None:
    """Parse the flags; check or measure."""
    parser = argparse.ArgumentParser(description="attention on trees alone")
    parser.add_argument("--check", action="store_true", help="tiny trees, agreement alone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=TOLERANCE, help="default: bfloat16 on a GPU")
    parser.add_argument("--K", type=int, choices=HEADS, help="one head size")
    parser.add_argument("--tree", nargs="+", help="trees whose name begins so; default: all")
    parser.add_argument("--heads", type=int, nargs=2, metavar=("H", "Hkv"), help="other heads")
    parser.add_argument("--seconds", type=float, default=1.0, help="of rounds, for each task")
    parser.add_argument("--out", type=Path, help="append the rows to this file, as JSON lines")
    args = parser.parse_args()
    if args.check:
        check(args.device)
        return
    dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    compiled = 0
    for problem in PROBLEMS:
        if args.K not in (None, problem.K):
            continue
        if args.tree and not problem.name.startswith(tuple(args.tree)):
            continue
        if args.heads:
            problem = dataclasses.replace(problem, heads=tuple(args.heads))
        # else FlexAttention meets the limit of shapes that torch.compile is willing to see
        if compiled != problem.K:
            torch.compiler.reset()
            compiled = problem.K
        for backward in (False, True):
            rows, missing = run(problem, dtype, args.device, args.seconds, backward=backward)
            if rows:
                print(text_of(rows, missing), flush=True)
            else:
                print(f"{problem}: nobody ran: {missing}", flush=True)
            if args.out:
                write(list(rows), args.out)


if __name__ == "__main__":
    main()
