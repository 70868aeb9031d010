"""One way to time and one row format."""

import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from bench._machine import machine

Contenders = dict[str, Callable[[], object]]
MIN_ROUNDS, MAX_ROUNDS = 5, 100
L2_BYTES = 256 * 2**20  # several times the cache of any GPU, written between two runs


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement. Units are in the names, so a table needs no legend."""

    op: str
    impl: str
    shape: str
    dtype: str
    median_us: float
    spread: float  # (p80 - p20) / median; above 0.05 the number is noise
    rounds: int
    tflop_per_s: float  # of the operation's own FLOPs, whatever the contender computes
    peak_extra_mib: float  # beyond the inputs: outputs and workspace
    machine: dict[str, str]
    max_error: float | None = None  # nats, against fp64; None where nothing was compared


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


def measure(
    contenders: Contenders, names: dict[str, Any], *, device: str, flops: float, seconds: float
) -> list[Row]:
    """Time the contenders in turns, so that a slow minute of the machine slows all of them.

    `names` are the fields op, shape and dtype; the rounds last `seconds`, within their bounds.
    """
    times: dict[str, list[float]] = {impl: [] for impl in contenders}
    peak = {impl: peak_extra_mib(fn, device) for impl, fn in contenders.items()}
    stop = time.perf_counter() + seconds
    for i in range(MAX_ROUNDS):
        if i >= MIN_ROUNDS and time.perf_counter() > stop:
            break
        for impl, fn in contenders.items():
            times[impl].append(once(fn, device))
    rows = []
    for impl, found in times.items():
        median = statistics.median(found)
        p20, *_, p80 = statistics.quantiles(found, n=5)
        row = Row(
            **names,
            impl=impl,
            median_us=round(median * 1e6, 1),
            spread=round((p80 - p20) / median, 3),
            rounds=len(found),
            tflop_per_s=round(flops / median / 1e12, 3),
            peak_extra_mib=round(peak[impl], 2),
            machine=machine(device),
        )
        rows.append(row)
    return rows


def write(rows: list[Row], path: Path | None) -> None:
    """Print each row as a JSON line, and append it to `path`."""
    lines = [json.dumps(dataclasses.asdict(row)) for row in rows]
    print("\n".join(lines))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.writelines(line + "\n" for line in lines)
