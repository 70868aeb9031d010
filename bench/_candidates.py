"""The tiles that `bench/tune.py` tries, and what one must show before it is timed."""

import dataclasses
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sharpen_kernels import _tiles
from sharpen_kernels._tiles import Tile
from sharpen_kernels.linear_logprob import linear_logprob, linear_logprob_reference
from sharpen_kernels.stats import NAMES, Statistic

Problem = tuple[Tensor, Tensor, Tensor]  # hidden, weight, target
STATS: tuple[tuple[Statistic, ...], ...] = (
    ("logprob",),
    ("logprob", "entropy", "self_certainty", "is_greedy"),
)
EVERY: dict[str, Any] = {"stats": NAMES, "renyi_order": 2.0, "k": 8}
ERROR_ROWS = 64  # compared with fp64
MAX_ERROR = 1e-4  # nats, from fp64: a hundred times what an exact product shows
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


def inputs(R: int, D: int, V: int, dtype: torch.dtype, device: str) -> Problem:
    """Hidden rows, a head whose logits have the spread of a trained model (3), random targets."""
    torch.manual_seed(0)
    hidden = torch.randn(R, D, device=device).to(dtype)
    weight = (torch.randn(V, D, device=device) * 3 / D**0.5).to(dtype)
    return hidden, weight, torch.randint(V, (R,), device=device)


def candidates(dtype: torch.dtype) -> list[Tile]:
    """What is tried for a dtype; the vendor's product is always among them."""
    return [Tile("chunk"), *(SINGLE if dtype == torch.float32 else HALF + WIDER)]


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


def fault(tile: Tile, problem: Problem) -> str | None:
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
            if (error := (alone.double() - truth).abs().max().item()) > MAX_ERROR:
                return f"error {error:.1e}"
    return f"spills {recorder.spills}" if recorder.spills else None
