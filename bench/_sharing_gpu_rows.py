"""What was found of a task of sharing on a GPU, as rows and as text."""

import dataclasses
import statistics

from bench._machine import machine
from bench._rows import Row
from bench._sharing_gpu_sampling import GENERATE
from bench._sharing_gpu_tasks import Found, Task
from bench._sharing_gpu_ways import ALONE, CACHED, PADDED
from bench._tables import table
from bench.peers.finding import Missing

REFERENCES = (PADDED, GENERATE)


@dataclasses.dataclass(frozen=True)
class SharingGpuRow(Row):
    """A row; its errors are nats against the model in fp32, of some completions."""

    tokens: int = 0  # that the layers see in one call
    mean_error: float | None = None
    speedup: float | None = None  # over whole sequences: the median over rounds
    of_tokens: float | None = None  # that, of the saving in tokens
    of_operations: float | None = None  # and of the saving in operations, the head's among them


def rows_of(task: Task, found: Found, device: str, dtype: str) -> list[SharingGpuRow]:
    """One of each contender."""
    facts, rows = machine(device), []
    problem = task.problem
    passes = 3 if task.what == "forward+backward" else 1
    for name, timing in found.timings.items():
        whole = name in (*REFERENCES, ALONE)
        faster = _speedup(found, name)
        errors = found.errors.get(name)
        tokens = problem.tokens(shared=not whole)
        flops = problem.flops(shared=True)
        row = SharingGpuRow(
            op=f"sharing {task.what}",
            impl=name,
            kind="ours" if name.startswith("ours") else "exact",
            shape=str(problem),
            dtype=dtype,
            median_us=round(timing.median * 1e6, 1),
            spread=round(timing.spread, 3),
            rounds=len(timing.seconds),
            tflop_per_s=round(passes * flops / timing.median / 1e12, 4),
            peak_extra_mib=round(timing.peak_extra_mib, 2),
            machine=facts,
            max_error=errors.most if errors else None,
            # a cache takes each row's last token in, and never reads on from it
            tokens=tokens - (problem.N if name == CACHED else 0),
            mean_error=errors.mean if errors else None,
            speedup=faster,
            of_tokens=faster and faster * problem.tokens(shared=True) / _all_tokens(task),
            of_operations=faster and faster * flops / problem.flops(shared=False),
        )
        rows.append(row)
    return rows


def _all_tokens(task: Task) -> int:
    return task.problem.tokens(shared=False)


def _speedup(found: Found, name: str) -> float | None:
    """Median over rounds of the time of whole sequences over the contender's."""
    whole = next((n for n in REFERENCES if n in found.timings), None)
    if whole is None:
        return None
    times = found.timings[whole].seconds, found.timings[name].seconds
    return statistics.median(a / b for a, b in zip(*times, strict=True))


def text_of(task: Task, rows: list[SharingGpuRow], missing: Missing) -> str:
    """The table of all tasks, and the savings that were reached."""
    if not rows:
        return f"{task}: nobody ran: {missing}"
    lines = [table(f"{task}, {rows[0].dtype}", list(rows), missing)]
    by_name = {row.impl: row for row in rows}
    whole = next((by_name[name] for name in REFERENCES if name in by_name), None)
    for row in rows:
        if row is whole or row.speedup is None or row.of_tokens is None or whole is None:
            continue
        saving = row.speedup / row.of_tokens
        text = f"  {row.impl}: {row.speedup:.2f} x {whole.impl}, {row.tokens} tokens a call"
        if task.what != "sampling" and row.impl != ALONE:
            text += (
                f", {row.of_tokens:.2f} of the {saving:.2f} x in tokens"
                f", {row.of_operations:.2f} of that in operations"
            )
        if row.mean_error is not None and whole.mean_error is not None:
            text += f"; mean error {row.mean_error:.1e}, {whole.impl} {whole.mean_error:.1e} nats"
        lines.append(text)
    ours = by_name.get("ours")
    if ours is not None and ours.of_tokens is not None and task.what == "forward":
        lines.append(f"  goal: {ours.of_tokens:.2f} of the saving in tokens (at least 0.85)")
    return "\n".join(lines)
