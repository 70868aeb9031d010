"""Rows of measurements: made, written and read."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch

from bench._floors import floors_of, true_logprob
from bench._machine import machine
from bench._measure import SAMPLE_ROWS, Timing, measure
from bench._tasks import Kind, Task, through
from bench.peers.finding import Missing


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
    max_error: float | None = None  # nats, against fp64; None for a floor
    kind: Kind | None = None  # None in rows that are older than it


Results = dict[str, tuple[Row, Timing]]


def run(task: Task, seconds: float, only: tuple[str, ...] = ("",)) -> tuple[Results, Missing]:
    """Measure in turns the contenders of `task` whose name holds one of `only`, and the floors."""
    # else a contender meets the limit of shapes that torch.compile is willing to see
    torch.compiler.reset()
    *tensors, target = task.inputs()
    peers, missing = task.peers()
    backward = task.what == "forward+backward"
    leaves = [x.requires_grad_(backward) for x in tensors]
    calls: dict[str, Callable[[], object]] = {}
    for name, (_, call) in peers.items():
        if any(part in name for part in only):
            calls[name] = (
                through(call, leaves, target) if backward else lambda c=call: c(*leaves, target)
            )
    plain = [x.detach() for x in tensors]
    floors = {name: lambda call=call: call(*plain) for name, call in floors_of(task).items()}
    timings, failed = measure(calls | floors, task.device, seconds)
    truth = true_logprob(tuple(plain), target, SAMPLE_ROWS)
    facts, results = machine(task.device), {}
    for name, timing in timings.items():
        error = None if name in floors else (timing.sample - truth).abs().max().item()
        row = Row(
            op=f"{task.op} {task.what}",
            impl=name,
            kind="floor" if name in floors else peers[name][0],
            shape=task.sizes,
            dtype=task.dtype,
            median_us=round(timing.median * 1e6, 1),
            spread=round(timing.spread, 3),
            rounds=len(timing.seconds),
            tflop_per_s=round(task.flops / timing.median / 1e12, 3),
            peak_extra_mib=round(timing.peak_extra_mib, 2),
            machine=facts,
            max_error=error,
        )
        results[name] = row, timing
    return results, missing | failed


def write(rows: list[Row], path: Path) -> None:
    """Append each row to `path` as a JSON line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)


def read(path: Path) -> list[Row]:
    """The rows that `write` left there, without what those of sharing say beside."""
    names = {field.name for field in dataclasses.fields(Row)}
    lines = map(json.loads, path.read_text().splitlines())
    return [Row(**{name: x for name, x in line.items() if name in names}) for line in lines]
