"""Tasks of sharing: who takes part, measured in turns."""

import dataclasses
import statistics
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from bench._measure import Timing, measure
from bench._sharing import Problem, llama
from bench._sharing_agreement import check_gradients, errors, gradients
from bench._sharing_game24 import SAMPLERS, SCORERS, Puzzles
from bench._sharing_saved import saved_mib
from bench._sharing_ways import (
    BOUNDED,
    CACHED,
    PADDED,
    WAYS,
    Ways,
    backward_ways,
    forward_ways,
)  # fmt: skip
from bench.peers.finding import Missing

What = Literal["forward", "forward+backward", "sampling", "scoring"]
WHATS: tuple[What, ...] = get_args(What)
NAMES: dict[What, tuple[str, ...]] = {
    "forward": (*WAYS, PADDED, CACHED),
    "forward+backward": (*WAYS, PADDED, CACHED, BOUNDED),
    "sampling": tuple(SAMPLERS),
    "scoring": tuple(SCORERS),
}
LIMIT_GIB = 20.0  # of what the padded batch may hold; chosen


class Found(NamedTuple):
    """What came of one task."""

    timings: dict[str, Timing]
    missing: Missing
    errors: dict[str, float]  # nats
    flops: float
    saved_mib: dict[str, float] | None = None
    gradient_error: float | None = None  # largest difference over largest gradient


@dataclasses.dataclass(frozen=True)
class Task:
    """One group of contenders. `shape` is (P, C, N), or (prompts, C, N) of the model that ships."""

    what: What
    shape: tuple[int, int, int]

    def __str__(self) -> str:
        letters = ("P", "C", "N") if self.what.startswith("forward") else ("prompts", "C", "N")
        sizes = (f"{k}={n}" for k, n in zip(letters, self.shape, strict=True))
        return f"sharing {self.what}, {' '.join(sizes)}, float32, cpu"

    @property
    def sizes(self) -> str:
        """The shape with its letters."""
        return str(self).split(", ")[1]

    def run(self, seconds: float) -> Found:
        """Measure the contenders; a RuntimeError if one fails, or they disagree."""
        if self.what in ("sampling", "scoring"):
            puzzles = Puzzles(*self.shape)
            ways = puzzles.sampling() if self.what == "sampling" else puzzles.scoring()
            timings, last = _timed(ways, seconds)
            puzzles.check_draws()
            return Found(timings, {}, errors(None, last), puzzles.flops)
        problem = Problem(*self.shape)
        # one model each, of the same weights: ours has hooks in its own
        ours, plain = llama(), llama()
        if self.what == "forward+backward":
            ways = backward_ways(problem, ours, plain)
            timings, last = _timed(ways, seconds)
            more = _saved(ways, {n: ours if n.startswith("ours") else plain for n in ways})
            return Found(timings, {}, errors(problem, last), 3 * problem.flops, *more)
        ways = forward_ways(problem, ours, plain)
        missing: Missing = {}
        if problem.padded_gib > LIMIT_GIB:
            missing[PADDED] = f"would hold {problem.padded_gib:.0f} GiB"
            del ways[PADDED]
        with torch.no_grad():
            timings, last = _timed(ways, seconds)
        return Found(timings, missing, errors(problem, last), problem.flops)


def _timed(ways: Ways, seconds: float) -> tuple[dict[str, Timing], dict[str, Tensor]]:
    """Timings, and all that each contender returned last."""
    last: dict[str, Tensor] = {}

    def call(name: str) -> Tensor:
        last[name] = ways[name]().detach()
        return last[name]

    calls: Ways = {name: lambda name=name: call(name) for name in ways}
    timings, failed = measure(calls, "cpu", seconds)
    if failed:
        raise RuntimeError(f"a contender failed: {failed}")
    return timings, last


def _saved(ways: Ways, models: dict[str, torch.nn.Module]) -> tuple[dict[str, float], float]:
    """MiB kept for backward by each, and how far apart their gradients are."""
    saved, found = {}, {}
    for name, way in ways.items():
        saved[name] = saved_mib(way, models[name])
        found[name] = gradients(models[name])
    return saved, check_gradients(found)


def speedup(task: Found, ours: str, peer: str) -> float:
    """Median over rounds of the peer's time over ours."""
    times = task.timings[peer].seconds, task.timings[ours].seconds
    return statistics.median(a / b for a, b in zip(*times, strict=True))
