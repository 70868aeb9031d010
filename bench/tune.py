"""Times the tiles of the fused linear_logprob on this GPU, and writes the best into `_tiles.py`.

    python -m bench.tune --out bench/results/tune.jsonl   # every key, some 10 minutes
    python -m bench.tune --quick --out FILE               # bf16 alone, a second a key
    python -m bench.tune --check                          # no GPU, no timing

A candidate is timed once it is as accurate as fp32, gives a row alone the bits it has in a batch,
and spills no register. The time that counts is that of four statistics plus that of one.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench._measure import Row, measure, write
from bench.linear_logprob import ERROR_ROWS, FOUR, inputs
from sharpen_kernels import _tiles
from sharpen_kernels._tiles import Key, Tile
from sharpen_kernels.linear_logprob import linear_logprob, linear_logprob_reference

ROWS = 4096
SHAPES = [(D, V) for D in (896, 2048, 4096) for V in (32_064, 151_936)]  # (hidden, vocabulary)
HALF = [
    Tile("fused", r, v, 64, pieces, pieces, num_warps=w, num_stages=s, per_sm=n, tma=True)
    for r, v, pieces, w, s, n in [
        (128, 128, 2, 8, 4, 1), (128, 128, 2, 8, 3, 1), (128, 256, 4, 8, 3, 1),
        (128, 256, 4, 8, 4, 1), (128, 128, 4, 4, 3, 2), (64, 256, 4, 4, 3, 2),
        (128, 64, 1, 8, 4, 2), (64, 128, 1, 8, 4, 2),
    ]
]  # fmt: skip
WIDER = [dataclasses.replace(HALF[i], SEGMENT=8192) for i in (0, 2)]
SINGLE = [_tiles.SINGLE, dataclasses.replace(_tiles.SINGLE, BLOCK_R=128, num_warps=8)]
BEFORE, AFTER = "# <table>\n", "# </table>\n"


def candidates(dtype: torch.dtype) -> list[Tile]:
    """What is tried for a dtype; the vendor's product is always among them."""
    return [Tile("chunk"), *(SINGLE if dtype == torch.float32 else HALF + WIDER)]


def with_tile(tile: Tile):
    """A context in which every key of the table has this tile."""
    return mock.patch.object(_tiles, "tile", lambda *key: tile)


class Recorder:
    """A kernel that remembers how many registers its launches spilled."""

    def __init__(self, kernel):
        self.kernel, self.spills = kernel, 0

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.spills += self.kernel[grid](*args, **kwargs).n_spills

        return launch


def fault(tile: Tile, x, w, t) -> str | None:
    """Why a candidate may not be timed; None if it may."""
    from sharpen_kernels import _linear_logprob_fused as fused

    part = x[:ERROR_ROWS], w, t[:ERROR_ROWS]
    truth = linear_logprob_reference(*(y.double() for y in part[:2]), part[2]).logprob
    recorder = Recorder(fused.segment_kernel)
    context = mock.patch.object(fused, "segment_kernel", recorder) if x.is_cuda else with_tile(tile)
    with with_tile(tile), context:
        for stats in (("logprob",), FOUR):
            batch = linear_logprob(x, w, t, stats=stats).logprob
            alone = linear_logprob(*part, stats=stats).logprob
            if not torch.equal(batch[:ERROR_ROWS], alone):
                return "other bits in a batch"
            if (error := (alone.double() - truth).abs().max().item()) > 1e-4:
                return f"error {error:.1e}"
    return f"spills {recorder.spills}" if recorder.spills else None


def times(tiles: list[Tile], x, w, t, names: dict[str, Any], seconds: float) -> list[Row]:
    """Rows of all candidates in turns, one for one statistic and one for four."""

    def call(tile, stats):
        with with_tile(tile):
            return linear_logprob(x, w, t, stats=stats)

    calls = {
        f"{i} {len(stats)}": lambda tile=tile, stats=stats: call(tile, stats)
        for i, tile in enumerate(tiles)
        for stats in (("logprob",), FOUR)
    }
    flops = 2.0 * x.shape[0] * x.shape[1] * w.shape[0]
    return measure(calls, names, device="cuda", flops=flops, seconds=seconds)


def tune(dtype: torch.dtype, D: int, V: int, seconds: float, out: Path | None) -> Tile:
    """The fastest sound candidate of one key; prints the ranking."""
    x, w, t = inputs(ROWS, D, V, dtype, "cuda")
    sound = []
    for tile in candidates(dtype):
        try:
            why = fault(tile, x, w, t)
        except Exception as error:  # a tile too large for this GPU is no reason to stop
            why = f"{type(error).__name__}: {error}"
        print(f"{dtype} D={D} V={V} {tile}: {why or 'sound'}", flush=True)
        sound += [] if why else [tile]
    names = {"op": "tune linear_logprob", "shape": f"R={ROWS} D={D} V={V}", "dtype": str(dtype)}
    rows = times(sound, x, w, t, names, seconds)
    totals = [a.median_us + b.median_us for a, b in zip(rows[::2], rows[1::2], strict=True)]
    ranking = sorted(zip(totals, sound, strict=True), key=lambda pair: pair[0])
    for total, tile in ranking:
        print(f"{total / 2e3:9.3f} ms  {tile}")
    tile_of = {str(i): str(tile) for i, tile in enumerate(sound)}
    write([dataclasses.replace(r, impl=f"{r.impl} {tile_of[r.impl.split()[0]]}") for r in rows], out)
    return ranking[0][1]


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
    module: dict[str, Any] = {"__name__": "sharpen_kernels._tiles", "__package__": "sharpen_kernels"}
    exec(compile(rewritten(path.read_text(), table), path, "exec"), module)
    (entry,) = module["TABLE"].values()
    assert dataclasses.asdict(entry) == dataclasses.asdict(HALF[0])
    assert rewritten(path.read_text(), _tiles.TABLE) == path.read_text()
    assert fault(_tiles.INTERPRETER, *inputs(70, 40, 600, torch.bfloat16, "cpu")) is None


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
