"""Times the tiles of the fused kernels on this GPU, and writes the best into `_tiles.py`.

    python -m bench.tune --out bench/results/tune.jsonl   # every key, some 10 minutes
    python -m bench.tune --quick --out FILE               # bf16 alone, a second a key
    python -m bench.tune --op tree_attention --quick      # one op
    python -m bench.tune --check                          # no GPU, no timing

A candidate is timed once it is as accurate as its dtype allows and spills no register; one of
linear_logprob must give a row alone the bits it has in a batch too, and what counts
is the time of four statistics plus that of one.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from bench import _tilings, _tune_linear, _tune_tree
from bench._candidates import HALF, fault, inputs
from bench._tile_tables import rewritten
from sharpen_kernels import _tiles

PATH = Path(_tiles.__file__)
# the table of an op, and who finds its entries
OPS: dict[str, tuple[dict[Any, Any], Any]] = {
    "tree_attention": (_tiles.TILING_TABLE, _tune_tree.tuned),
    "linear_logprob": (_tiles.TABLE, _tune_linear.tuned),
}


def read_back(op: str, name: str, table: dict[Any, Any]) -> dict[Any, Any]:
    """The table as it is read, under its `name`, from the file that would be written."""
    assert rewritten(PATH.read_text(), op, OPS[op][0]) == PATH.read_text()
    found: dict[str, Any] = {"__name__": _tiles.__name__, "__package__": _tiles.__package__}
    exec(compile(rewritten(PATH.read_text(), op, table), PATH, "exec"), found)
    return found[name]


def check() -> None:
    """What can be checked without a GPU: tables are written as they are read, judges judge."""
    table = {("linear_logprob", "sm90", "bfloat16", "wide", "large"): HALF[0]}
    (entry,) = read_back("linear_logprob", "TABLE", table).values()
    assert dataclasses.asdict(entry) == dataclasses.asdict(HALF[0])
    assert fault(_tiles.INTERPRETER, inputs(70, 40, 600, torch.bfloat16, "cpu")) is None
    tilings = {("fwd", "sm90", False, 64): _tilings.candidates("fwd", False, 64)[-1]}
    found = read_back("tree_attention", "TILING_TABLE", tilings)
    assert {key: tuple(x) for key, x in found.items()} == {k: tuple(x) for k, x in tilings.items()}
    _tilings.check()


def main() -> None:
    """Parse the flags; check, or measure and write."""
    parser = argparse.ArgumentParser(description="tiles of the fused kernels")
    parser.add_argument("--check", action="store_true", help="no GPU, no timing")
    parser.add_argument("--op", choices=OPS, action="append", help="default: every one")
    parser.add_argument("--quick", action="store_true", help="bf16 alone, a second a key")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    args = parser.parse_args()
    if args.check:
        check()
        return
    for op in args.op or OPS:
        standing, tuned = OPS[op]
        table = dict(standing)
        for key, tile in tuned(quick=args.quick, out=args.out):
            table[key] = tile
            # a run cut short keeps what it found
            PATH.write_text(rewritten(PATH.read_text(), op, table))


if __name__ == "__main__":
    main()
