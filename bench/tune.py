"""Times the tiles of the fused linear_logprob on this GPU, and writes the best into `_tiles.py`.

    python -m bench.tune --out bench/results/tune.jsonl   # every key, some 10 minutes
    python -m bench.tune --quick --out FILE               # bf16 alone, a second a key
    python -m bench.tune --check                          # no GPU, no timing

A candidate is timed once it is as accurate as fp32, gives a row alone the bits it has in a batch,
and spills no register. The time that counts is that of four statistics plus that of one.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from bench._candidates import HALF, STATS, Problem, candidates, fault, inputs, with_tile
from bench._machine import machine
from bench._measure import Timing, measure
from sharpen_kernels import _tiles
from sharpen_kernels._tiles import Key, Tile
from sharpen_kernels.linear_logprob import linear_logprob

ROWS = 4096
SHAPES = [(D, V) for D in (896, 2048, 4096) for V in (32_064, 151_936)]  # (hidden, vocabulary)
BEFORE, AFTER = "# <table>\n", "# </table>\n"


def timed(tiles: list[Tile], problem: Problem, seconds: float) -> dict[str, Timing]:
    """Each candidate in turns, once for one statistic and once for four."""
    hidden, weight, target = problem

    def call(tile, stats):
        with with_tile(tile):
            return linear_logprob(hidden, weight, target, stats=stats).logprob

    calls = {
        f"{len(stats)} of {tile}": lambda tile=tile, stats=stats: call(tile, stats)
        for tile in tiles
        for stats in STATS
    }
    return measure(calls, "cuda", seconds)[0]


def tune(dtype: torch.dtype, D: int, V: int, seconds: float, out: Path | None) -> Tile:
    """The fastest sound candidate of one key; prints the ranking."""
    problem = inputs(ROWS, D, V, dtype, "cuda")
    sound = []
    for tile in candidates(dtype):
        try:
            why = fault(tile, problem)
        except Exception as error:  # a tile too large for this GPU is no reason to stop
            why = f"{type(error).__name__}: {error}"
        print(f"{dtype} D={D} V={V} {tile}: {why or 'sound'}", flush=True)
        sound += [] if why else [tile]
    found = timed(sound, problem, seconds)
    total = {
        tile: sum(found[f"{len(stats)} of {tile}"].median for stats in STATS) for tile in sound
    }
    ranking = sorted(sound, key=total.__getitem__)
    for tile in ranking:
        print(f"{total[tile] / len(STATS) * 1e3:9.3f} ms  {tile}")
    key = {"op": "tune", "R": ROWS, "D": D, "V": V, "dtype": str(dtype), "machine": machine("cuda")}
    if out is not None:
        with out.open("a") as file:
            for name, timing in found.items():
                row = {"candidate": name, "median_us": timing.median * 1e6, "spread": timing.spread}
                file.write(json.dumps(key | row) + "\n")
    return ranking[0]


def rewritten(source: str, table: dict[Key, Tile]) -> str:
    """The source of `_tiles.py` with this table in it."""
    before, _, rest = source.partition(BEFORE)
    _, _, after = rest.partition(AFTER)
    entries = "".join(f"    {key!r}: {tile!r},\n" for key, tile in sorted(table.items()))
    body = f"TABLE: dict[Key, Tile] = {{\n{entries}}}\n".replace("{\n}", "{}")
    return before + BEFORE + body + AFTER + after


def check() -> None:
    """What can be checked without a GPU: the table is written as it is read."""
    path = Path(_tiles.__file__)
    table = {("linear_logprob", "sm90", "bfloat16", "wide", "large"): HALF[0]}
    module: dict[str, Any] = {"__name__": _tiles.__name__, "__package__": _tiles.__package__}
    exec(compile(rewritten(path.read_text(), table), path, "exec"), module)
    (entry,) = module["TABLE"].values()
    assert dataclasses.asdict(entry) == dataclasses.asdict(HALF[0])
    assert rewritten(path.read_text(), _tiles.TABLE) == path.read_text()
    assert fault(_tiles.INTERPRETER, inputs(70, 40, 600, torch.bfloat16, "cpu")) is None


def main() -> None:
    """Parse the flags; check, or measure and write."""
    parser = argparse.ArgumentParser(description="Tiles of linear_logprob")
    parser.add_argument("--check", action="store_true", help="no GPU, no timing")
    parser.add_argument("--quick", action="store_true", help="bf16 alone, a second a key")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    args = parser.parse_args()
    if args.check:
        check()
        return
    arch, path = _tiles.architecture(torch.device("cuda")), Path(_tiles.__file__)
    table = dict(_tiles.TABLE)
    for dtype in (torch.bfloat16,) if args.quick else (torch.bfloat16, torch.float32):
        for D, V in SHAPES:
            name = str(dtype).removeprefix("torch.")
            key = ("linear_logprob", arch, name, _tiles.d_class(D), _tiles.v_class(V))
            table[key] = tune(dtype, D, V, 1.0 if args.quick else 5.0, args.out)
            # a run cut short keeps what it found
            path.write_text(rewritten(path.read_text(), table))


if __name__ == "__main__":
    main()
