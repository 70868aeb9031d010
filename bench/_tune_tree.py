"""The fastest sound tiling of each kernel of tree attention, for each key of its table."""

import concurrent.futures
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bench._attention_problems import Inputs
from bench._machine import machine
from bench._measure import measure
from bench._tilings import KERNELS, TIMED, candidates, fault, problem, route, with_tiling
from sharpen_kernels._tiles import Tiling, architecture
from sharpen_kernels._tiles import TilingKey as Key
from sharpen_kernels.tree import Rule, Tree


def tuned(*, quick: bool, out: Path | None) -> Iterator[tuple[Key, Tiling]]:
    """Each key of this GPU, and its tiling, as soon as it is found."""
    arch = architecture(torch.device("cuda"))
    kinds = [(False, 128), (False, 64)]
    kinds += [] if quick else [(False, 256), (True, 64), (True, 128), (True, 256)]
    keys: list[Key] = [(kernel, arch, *kind) for kind in kinds for kernel in KERNELS]
    tried = {key: candidates(key[0], *key[2:]) for key in keys}
    # compiling takes most of the time, and one core a process: its cache is on the disk
    spawn = multiprocessing.get_context("spawn")
    n = max(1, min(8, (os.cpu_count() or 2) - 2))
    with concurrent.futures.ProcessPoolExecutor(n, spawn) as pool:
        asked = {(k, t): pool.submit(fault, k, t) for k in keys for t in tried[k]}
    # all of them are judged before any is timed: the GPU is this process's own by then
    for key in keys:
        sound = []
        for tiling in tried[key]:
            why = asked[key, tiling].result()
            print(f"{key} {tiling}: {why or 'sound'}", flush=True)
            sound += [] if why else [tiling]
        yield key, fastest(key, sound, quick, out)


def fastest(key: Key, sound: list[Tiling], quick: bool, out: Path | None) -> Tiling:
    """The one that takes the least time; prints the ranking."""
    tree, inputs = problem(TIMED, *key[2:], "cuda")
    # without a sound one, what stands
    sound = sound or candidates(key[0], *key[2:])[:1]
    calls = {str(tiling): _call(key, tiling, tree, inputs) for tiling in sound}
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


def _call(key: Key, tiling: Tiling, tree: Tree, inputs: Inputs) -> Callable[[], object]:
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
