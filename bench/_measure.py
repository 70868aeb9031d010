"""One way to time, one way to count memory."""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from bench.peers.finding import Missing, reason

MIN_ROUNDS, MAX_ROUNDS = 5, 100
L2_BYTES = 256 * 2**20  # several times the cache of any GPU, written between two runs
SAMPLE_ROWS = 64  # kept of what a contender returned, to be compared with fp64


@dataclasses.dataclass(frozen=True)
class Timing:
    """What was seen of one contender."""

    seconds: tuple[float, ...]  # one a round
    peak_extra_mib: float  # beyond the inputs: outputs and workspace
    sample: Tensor  # the first of what it returned

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(80th - 20th percentile) / median; above 0.05 the number is noise."""
        p20, *_, p80 = statistics.quantiles(self.seconds, n=5)
        return (p80 - p20) / self.median


def once(fn: Callable[[], object], device: str) -> float:
    """Seconds of one call; on a GPU by its own clock, with its L2 cache emptied before."""
    if device == "cuda":
        torch.empty(L2_BYTES, dtype=torch.int8, device=device).zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begun = time.perf_counter()
    fn()
    return time.perf_counter() - begun


def peak_extra_mib(fn: Callable[[], object], device: str) -> float:
    """Most memory that one call held at a time, beyond what was there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        fn()
    results = cast(Any, profile).kineto_results  # optional, and in part missing, in the stubs
    events = [e for e in results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held, default=0) / 2**20


def _first(returned) -> Tensor:
    """The first tensor of a result, its first rows, on the CPU in fp64."""
    x = returned if isinstance(returned, Tensor) else returned[0]
    return x.detach().flatten()[:SAMPLE_ROWS].double().cpu()


def measure(
    contenders: Mapping[str, Callable[[], object]],
    device: str,
    seconds: float,
    min_rounds: int = MIN_ROUNDS,
) -> tuple[dict[str, Timing], Missing]:
    """Time the contenders in turns, so that a slow minute of the machine slows all of them.

    The rounds last `seconds`, but there are `min_rounds` to MAX_ROUNDS. A contender that fails is
    left out, and why is told.
    """
    times: dict[str, list[float]] = {}
    seen: dict[str, tuple[float, Tensor]] = {}
    failed: Missing = {}
    for name, fn in contenders.items():
        try:
            sample = _first(fn())
            seen[name] = peak_extra_mib(fn, device), sample
            times[name] = []
        # someone else's kernel can fail in any way; the others are measured without it
        except Exception as error:
            failed[name] = reason(error)
        if device == "cuda":
            torch.cuda.empty_cache()
    stop = time.perf_counter() + seconds
    for i in range(MAX_ROUNDS):
        if i >= min_rounds and time.perf_counter() > stop:
            break
        for name, found in times.items():
            found.append(once(contenders[name], device))
    return {name: Timing(tuple(found), *seen[name]) for name, found in times.items()}, failed
