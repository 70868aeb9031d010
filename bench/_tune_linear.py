"""The fastest sound tile of the fused linear_logprob for each key of its table."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from bench._candidates import STATS, Problem, candidates, fault, inputs, with_tile
from bench._machine import machine
from bench._measure import Timing, measure
from sharpen_kernels import _tiles
from sharpen_kernels._tiles import Key, Tile
from sharpen_kernels.linear_logprob import linear_logprob

ROWS = 4096
SHAPES = [(D, V) for D in (896, 2048, 4096) for V in (32_064, 151_936)]  # (hidden, vocabulary)


def tuned(*, quick: bool, out: Path | None) -> Iterator[tuple[Key, Tile]]:
    """Each key of this GPU, and its tile, as soon as it is found."""
    arch = _tiles.architecture(torch.device("cuda"))
    for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32):
        for D, V in SHAPES:
            name = str(dtype).removeprefix("torch.")
            key = ("linear_logprob", arch, name, _tiles.d_class(D), _tiles.v_class(V))
            yield key, tune(dtype, D, V, 1.0 if quick else 5.0, out)


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
