"""Times the tiles of the fused kernels on this GPU, and writes the best into `_tiles.py`.

    python -m bench.tune --out bench/results/tune.jsonl   # every key, some 10 minutes
    python -m bench.tune --quick --out FILE               # bf16 alone, a second a key
    python -m bench.tune --op tree_attention --quick      # one op
    python -m bench.tune --check                          # no GPU, no timing

A candidate is timed once it is as accurate as its dtype allows and spills no register; one of
linear_logprob must give a row alone the bits it has in a batch too, and what counts
is the time of four statistics plus that of one.

In reading order: the command and the tables; linear_logprob; tree attention.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench import tree_attention as trees
from bench._measure import Timing, machine, measure, steps
from bench.peers.finding import reason
from sharpen_kernels import _tiles
from sharpen_kernels._tiles import Tile, Tiling, TilingKey
from sharpen_kernels.linear_logprob import linear_logprob, linear_logprob_reference
from sharpen_kernels.stats import NAMES, Statistic
from sharpen_kernels.tree import Rule, Tree
from sharpen_kernels.tree_attention import tree_attention

Problem = tuple[Tensor, Tensor, Tensor]  # hidden, weight, target

# linear_logprob
ROWS = 4096
SHAPES = [(D, V) for D in (896, 2048, 4096) for V in (32_064, 151_936)]  # (hidden, vocabulary)
STATS: tuple[tuple[Statistic, ...], ...] = (
    ("logprob",),
    ("logprob", "entropy", "self_certainty", "is_greedy"),
)
EVERY: dict[str, Any] = {"stats": NAMES, "renyi_order": 2.0, "k": 8}
ERROR_ROWS = 64  # compared with fp64
MAX_ERROR_NATS = 1e-4  # from fp64: a hundred times what an exact product shows
HALF_TILES = [
    Tile("fused", r, v, 64, pieces, pieces, num_warps=w, num_stages=s, per_sm=n, tma=True)
    for r, v, pieces, w, s, n in (
        (128, 128, 2, 8, 4, 1),
        (128, 128, 2, 8, 3, 1),
        (128, 256, 4, 8, 3, 1),
        (128, 256, 4, 8, 4, 1),
        (128, 128, 4, 4, 3, 2),
        (64, 256, 4, 4, 3, 2),
        (128, 64, 1, 8, 4, 2),
        (64, 128, 1, 8, 4, 2),
    )
]
WIDER_TILES = [dataclasses.replace(HALF_TILES[i], SEGMENT=8192) for i in (0, 2)]
SINGLE_TILES = [_tiles.SINGLE, dataclasses.replace(_tiles.SINGLE, BLOCK_R=128, num_warps=8)]

# tree attention
KERNELS = ("fwd", "dq", "dkv")
HEADS = {64: (14, 2), 128: (32, 8), 256: (16, 8)}  # of queries and keys, by head size
Levels = tuple[tuple[int, int], ...]
TIMED: Levels = ((1, 2048), (64, 256))
# whole tiles, so that a kernel that was judged is compiled for what is timed
JUDGED: Levels = ((1, 1024), (8, 128))
MAX_ERROR = {False: 2e-2, True: 1e-4}  # relative, of bf16 and of fp32; chosen
# queries, keys, warps, stages: of those tried, what spills nothing on sm90 at some head size
# (Triton 3.6); the tiling that stands in `TILINGS` is always among them
HALF = {
    "fwd": [
        (128, 64, 8, 3),
        (128, 64, 8, 2),
        (128, 128, 8, 2),
        (128, 128, 8, 3),
        (128, 64, 4, 3),
        (64, 64, 4, 3),
        (64, 128, 4, 2),
    ],
    "dq": [(128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2)],
    "dkv": [
        (64, 128, 8, 2),
        (64, 128, 8, 1),
        (32, 128, 8, 2),
        (32, 128, 8, 3),
        (32, 128, 8, 1),
        (16, 128, 8, 2),
        (64, 64, 8, 2),
        (64, 64, 4, 2),
        (32, 64, 8, 1),
    ],
}
SINGLE = [(32, 32, 4, 2), (32, 16, 8, 2), (32, 32, 8, 1), (64, 32, 8, 1), (16, 16, 8, 1)]

PATH = Path(_tiles.__file__)  # holds the tables


def check() -> None:
    """What can be checked without a GPU: tables are written as they are read, judges judge."""
    for part in steps((check_tables, check_linear, check_tree), lambda part: part.__name__):
        part()


def check_tables() -> None:
    """What is written is what is read."""
    table = {("linear_logprob", "sm90", "bfloat16", "wide", "large"): HALF_TILES[0]}
    (entry,) = read_back("linear_logprob", "TABLE", table).values()
    assert dataclasses.asdict(entry) == dataclasses.asdict(HALF_TILES[0])
    key = "fwd", "sm90", False, 64
    tiling = tree_candidates("fwd", False, 64)[-1]
    found = read_back("tree_attention", "TILING_TABLE", {key: tiling})
    assert {k: tuple(x) for k, x in found.items()} == {key: tuple(tiling)}


def read_back(op: str, name: str, table: dict[Any, Any]) -> dict[Any, Any]:
    """The table of an op as it is read, under its `name`, from the file that would be written."""
    assert rewritten(PATH.read_text(), op, OPS[op][0]) == PATH.read_text()
    found: dict[str, Any] = {"__name__": _tiles.__name__, "__package__": _tiles.__package__}
    exec(compile(rewritten(PATH.read_text(), op, table), PATH, "exec"), found)
    return found[name]


def rewritten(source: str, op: str, table: Mapping) -> str:
    """The source with this table of an op in it, under the name and the type that it has there."""
    begin, end = f"# <table of {op}>\n", f"# </table of {op}>\n"
    before, _, rest = source.partition(begin)
    old, _, after = rest.partition(end)
    declared, _, _ = old.partition(" = ")
    entries = "".join(f"    {key!r}: {tile!r},\n" for key, tile in sorted(table.items()))
    body = f"{declared} = {{\n{entries}}}\n".replace("{\n}", "{}")
    return before + begin + body + end + after


def tuned_linear(*, quick: bool, out: Path | None) -> Iterator[tuple[_tiles.Key, Tile]]:
    """Each key of this GPU, and its tile, as soon as it is found."""
    arch = _tiles.architecture(torch.device("cuda"))
    dtypes = (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32)
    for dtype, (D, V) in steps([(dtype, shape) for dtype in dtypes for shape in SHAPES]):
        name = str(dtype).removeprefix("torch.")
        key = ("linear_logprob", arch, name, _tiles.d_class(D), _tiles.v_class(V))
        yield key, fastest_tile(dtype, D, V, 1.0 if quick else 5.0, out)


def timed_tiles(tiles: list[Tile], problem: Problem, seconds: float) -> dict[str, Timing]:
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


def fastest_tile(dtype: torch.dtype, D: int, V: int, seconds: float, out: Path | None) -> Tile:
    """The fastest sound candidate of one key; prints the ranking."""
    problem = inputs(ROWS, D, V, dtype, "cuda")
    sound = []
    for tile in linear_candidates(dtype):
        try:
            why = tile_fault(tile, problem)
        except Exception as error:  # a tile too large for this GPU is no reason to stop
            why = f"{type(error).__name__}: {error}"
        print(f"{dtype} D={D} V={V} {tile}: {why or 'sound'}", flush=True)
        sound += [] if why else [tile]
    found = timed_tiles(sound, problem, seconds)
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


def inputs(R: int, D: int, V: int, dtype: torch.dtype, device: str) -> Problem:
    """Hidden rows, a head whose logits have the spread of a trained model (3), random targets."""
    torch.manual_seed(0)
    hidden = torch.randn(R, D, device=device).to(dtype)
    weight = (torch.randn(V, D, device=device) * 3 / D**0.5).to(dtype)
    return hidden, weight, torch.randint(V, (R,), device=device)


def linear_candidates(dtype: torch.dtype) -> list[Tile]:
    """What is tried for a dtype; the vendor's product is always among them."""
    return [Tile("chunk"), *(SINGLE_TILES if dtype == torch.float32 else HALF_TILES + WIDER_TILES)]


def with_tile(tile: Tile):
    """A context in which every key of the table has this tile."""
    return mock.patch.object(_tiles, "tile", return_value=tile)


class Recorder:
    """A kernel that remembers how many registers its launches spilled."""

    def __init__(self, kernel: Any):
        self.kernel, self.spills = kernel, 0

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.spills += self.kernel[grid](*args, **kwargs).n_spills

        return launch


def tile_fault(tile: Tile, problem: Problem) -> str | None:
    """Why a candidate may not be timed; None if it may."""
    from sharpen_kernels import _linear_logprob_triton as fused

    x, w, t = problem
    part = x[:ERROR_ROWS], w, t[:ERROR_ROWS]
    truth = linear_logprob_reference(part[0].double(), w.double(), part[2]).logprob
    assert truth is not None
    recorder = Recorder(fused.segment_kernel)
    context = mock.patch.object(fused, "segment_kernel", recorder) if x.is_cuda else with_tile(tile)
    with with_tile(tile), context:
        asked: list[dict[str, Any]] = [{"stats": stats} for stats in STATS]
        for wanted in (*asked, EVERY):
            batch = linear_logprob(x, w, t, **wanted).logprob
            alone = linear_logprob(*part, **wanted).logprob
            assert batch is not None
            assert alone is not None
            if not torch.equal(batch[:ERROR_ROWS], alone):
                return "other bits in a batch"
            if (error := (alone.double() - truth).abs().max().item()) > MAX_ERROR_NATS:
                return f"error {error:.1e}"
    return f"spills {recorder.spills}" if recorder.spills else None


def check_linear() -> None:
    """The judge passes a tile that is right."""
    assert tile_fault(_tiles.INTERPRETER, inputs(70, 40, 600, torch.bfloat16, "cpu")) is None


def tuned_tree(*, quick: bool, out: Path | None) -> Iterator[tuple[TilingKey, Tiling]]:
    """Each key of this GPU, and its tiling, as soon as it is found."""
    arch = _tiles.architecture(torch.device("cuda"))
    kinds = [(False, 128), (False, 64)]
    kinds += [] if quick else [(False, 256), (True, 64), (True, 128), (True, 256)]
    keys: list[TilingKey] = [(kernel, arch, *kind) for kind in kinds for kernel in KERNELS]
    tried = {key: tree_candidates(key[0], *key[2:]) for key in keys}
    # compiling takes most of the time, and one core a process: its cache is on the disk
    spawn = multiprocessing.get_context("spawn")
    n = max(1, min(8, (os.cpu_count() or 2) - 2))
    with concurrent.futures.ProcessPoolExecutor(n, spawn) as pool:
        asked = {(k, t): pool.submit(tiling_fault, k, t) for k in keys for t in tried[k]}
    # all of them are judged before any is timed: the GPU is this process's own by then
    for key in steps(keys):
        sound = []
        for tiling in tried[key]:
            why = asked[key, tiling].result()
            print(f"{key} {tiling}: {why or 'sound'}", flush=True)
            sound += [] if why else [tiling]
        yield key, fastest_tiling(key, sound, quick, out)


def fastest_tiling(key: TilingKey, sound: list[Tiling], quick: bool, out: Path | None) -> Tiling:
    """The one that takes the least time; prints the ranking."""
    tree, inputs = tree_problem(TIMED, *key[2:], "cuda")
    # without a sound one, what stands
    sound = sound or tree_candidates(key[0], *key[2:])[:1]
    calls = {str(tiling): _tiling_call(key, tiling, tree, inputs) for tiling in sound}
    found, failed = measure(calls, "cuda", 0.3 if quick else 3.0)
    ranking = sorted(found, key=lambda name: found[name].median)
    for name in ranking:
        print(f"{found[name].median * 1e3:9.3f} ms  {key[0]} {key[3]} {name}", flush=True)
    print(*(f"{name}: {why}" for name, why in failed.items()), sep="\n", end="")
    if out is not None:
        facts = {"op": "tune tree_attention", "key": key, "machine": machine("cuda")}
        with out.open("a") as file:
            for name in ranking:
                row = {"median_us": found[name].median * 1e6, "spread": found[name].spread}
                file.write(json.dumps(facts | {"candidate": name} | row) + "\n")
    return next(t for t in sound if str(t) == ranking[0]) if ranking else sound[0]


def _tiling_call(
    key: TilingKey, tiling: Tiling, tree: Tree, inputs: trees.Inputs
) -> Callable[[], object]:
    """Forward, or all of backward, in which the kernel of `key` has this tiling."""
    fused = route()
    q, k, v, dout = inputs
    rule = Rule(tree.end, tree.position, q.shape[2] ** -0.5, None, None)
    saved = q, k, v, *fused.forward(q, k, v, None, tree.table, rule)

    def call() -> object:
        with with_tiling(key, tiling):
            if key[0] == "fwd":
                return fused.forward(q, k, v, None, tree.table, rule)
            return fused.backward(dout, saved, None, tree.table, rule)

    return call


def tree_candidates(kernel: str, is_single: bool, size: int) -> list[Tiling]:
    """What is tried; what stands is first."""
    tried = SINGLE if is_single else HALF[kernel]
    every = [_tiles.TILINGS[kernel, is_single, size], *(Tiling(*each) for each in tried)]
    return list(dict.fromkeys(every))


@contextlib.contextmanager
def with_tiling(key: TilingKey, tiling: Tiling) -> Iterator[None]:
    """The table has this entry."""
    with mock.patch.dict(_tiles.TILING_TABLE, {key: tiling}):
        yield


@functools.cache
def tree_problem(levels: Levels, is_single: bool, size: int, device: str):
    """A tree and inputs on it."""
    asked = trees.Problem("tuned", levels, HEADS[size], size)
    tree = asked.tree().to(device)
    dtype = torch.float32 if is_single else torch.bfloat16
    return tree, asked.inputs(tree.T, dtype, device)


def tiling_fault(
    key: TilingKey, tiling: Tiling, device: str = "cuda", levels: Levels = JUDGED
) -> str | None:
    """Why a candidate may not be timed; None if it may."""
    kernel, _, is_single, size = key
    tree, inputs = tree_problem(levels, is_single, size, device)
    recorder, patched = None, contextlib.nullcontext()
    if device == "cuda":
        module = route()
        recorder = Recorder(getattr(module, f"_{kernel}_kernel"))
        patched = mock.patch.object(module, f"_{kernel}_kernel", recorder)
    q, k, v = leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    try:
        with with_tiling(key, tiling), patched:
            out = tree_attention(q, k, v, tree)
            got = out.detach(), *torch.autograd.grad(out, leaves, inputs.dout)
    except Exception as error:  # a tile too large for this GPU is no reason to stop
        return reason(error)
    found = trees.errors(got, trees.truth(inputs, tree))
    if not max(found.values()) <= MAX_ERROR[is_single]:
        return f"errors {found}"
    return f"spills {recorder.spills}" if recorder is not None and recorder.spills else None


def route():
    """The module that launches the kernels."""
    from sharpen_kernels import _tree_attention_triton as fused

    return fused


def check_tree() -> None:
    """Every candidate divides 128 as bits want it, and the judge passes what is right."""
    for kernel, is_single, size in _tiles.TILINGS:
        for each in tree_candidates(kernel, is_single, size):
            assert 128 % each.BLOCK_Q == 0, each
            assert 128 % each.BLOCK_K == 0, each
    key: TilingKey = ("fwd", "none", True, 64)
    small = ((1, 40), (3, 20))
    assert tiling_fault(key, tree_candidates(*key[:1], *key[2:])[0], "cpu", small) is None
    with mock.patch.dict(MAX_ERROR, {True: 0.0}):
        assert "errors" in (
            tiling_fault(key, tree_candidates(*key[:1], *key[2:])[0], "cpu", small) or ""
        )


# the table of an op, and who finds its entries
OPS: dict[str, tuple[dict[Any, Any], Any]] = {
    "tree_attention": (_tiles.TILING_TABLE, tuned_tree),
    "linear_logprob": (_tiles.TABLE, tuned_linear),
}


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
    for op in steps(args.op or OPS):
        standing, tuned = OPS[op]
        table = dict(standing)
        for key, tile in tuned(quick=args.quick, out=args.out):
            table[key] = tile
            # a run cut short keeps what it found
            PATH.write_text(rewritten(PATH.read_text(), op, table))


if __name__ == "__main__":
    main()
