"""The tilings of tree attention that `bench/tune.py` tries, and what one must show before that."""

import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

import torch

from bench._attention_problems import Problem, errors, truth
from bench._candidates import Recorder
from bench.peers.finding import reason
from sharpen_kernels import _tiles as tiles
from sharpen_kernels._tiles import Tiling
from sharpen_kernels._tiles import TilingKey as Key
from sharpen_kernels.tree_attention import tree_attention

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
        (128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 4, 3),
        (64, 64, 4, 3), (64, 128, 4, 2),
    ],
    "dq": [(128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2)],
    "dkv": [
        (64, 128, 8, 2), (64, 128, 8, 1), (32, 128, 8, 2), (32, 128, 8, 3), (32, 128, 8, 1),
        (16, 128, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (32, 64, 8, 1),
    ],
}  # fmt: skip
SINGLE = [(32, 32, 4, 2), (32, 16, 8, 2), (32, 32, 8, 1), (64, 32, 8, 1), (16, 16, 8, 1)]


def candidates(kernel: str, is_single: bool, size: int) -> list[Tiling]:
    """What is tried; what stands is first."""
    tried = SINGLE if is_single else HALF[kernel]
    every = [tiles.TILINGS[kernel, is_single, size], *(Tiling(*each) for each in tried)]
    return list(dict.fromkeys(every))


@contextlib.contextmanager
def with_tiling(key: Key, tiling: Tiling) -> Iterator[None]:
    """The table has this entry."""
    with mock.patch.dict(tiles.TILING_TABLE, {key: tiling}):
        yield


@functools.cache
def problem(levels: Levels, is_single: bool, size: int, device: str):
    """A tree and inputs on it."""
    asked = Problem("tuned", levels, HEADS[size], size)
    tree = asked.tree().to(device)
    dtype = torch.float32 if is_single else torch.bfloat16
    return tree, asked.inputs(tree.T, dtype, device)


def fault(key: Key, tiling: Tiling, device: str = "cuda", levels: Levels = JUDGED) -> str | None:
    """Why a candidate may not be timed; None if it may."""
    kernel, _, is_single, size = key
    tree, inputs = problem(levels, is_single, size, device)
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
    found = errors(got, truth(inputs, tree))
    if not max(found.values()) <= MAX_ERROR[is_single]:
        return f"errors {found}"
    return f"spills {recorder.spills}" if recorder is not None and recorder.spills else None


def route():
    """The module that launches the kernels."""
    from sharpen_kernels import _tree_attention_triton as fused

    return fused


def check() -> None:
    """Every candidate divides 128 as bits want it, and the judge passes what is right."""
    for kernel, is_single, size in tiles.TILINGS:
        for each in candidates(kernel, is_single, size):
            assert 128 % each.BLOCK_Q == 0, each
            assert 128 % each.BLOCK_K == 0, each
    key: Key = ("fwd", "none", True, 64)
    small = ((1, 40), (3, 20))
    assert fault(key, candidates(*key[:1], *key[2:])[0], "cpu", small) is None
    with mock.patch.dict(MAX_ERROR, {True: 0.0}):
        assert "errors" in (fault(key, candidates(*key[:1], *key[2:])[0], "cpu", small) or "")
