"""What was found of a task of sharing, as rows and as text."""

import dataclasses

from bench._machine import machine
from bench._rows import Row
from bench._sharing_tasks import Found, Task, speedup
from bench._tables import table


@dataclasses.dataclass(frozen=True)
class SharingRow(Row):
    """A row, and what autograd kept for backward."""

    saved_mib: float | None = None


def rows_of(task: Task, found: Found) -> list[Row]:
    """One of each contender."""
    facts = machine("cpu")
    return [
        SharingRow(
            op=f"sharing {task.what}",
            impl=name,
            kind="ours" if name.startswith("ours") else "exact",
            shape=task.sizes,
            dtype="float32",
            median_us=round(timing.median * 1e6, 1),
            spread=round(timing.spread, 3),
            rounds=len(timing.seconds),
            tflop_per_s=round(found.flops / timing.median / 1e12, 4),
            peak_extra_mib=round(timing.peak_extra_mib, 2),
            machine=facts,
            max_error=found.errors.get(name),
            saved_mib=round(found.saved_mib[name], 2) if found.saved_mib else None,
        )
        for name, timing in found.timings.items()
    ]


def text_of(task: Task, found: Found) -> str:
    """The table of all tasks, then ours over each peer, round by round, and what backward keeps."""
    lines = [table(str(task), rows_of(task, found), found.missing)]
    peers = [name for name in found.timings if not name.startswith("ours")]
    for name in found.timings:
        if name not in peers:
            times = [f"{speedup(found, name, peer):.2f} x {peer}" for peer in peers]
            lines.append(f"  {name}: {', '.join(times)}")
    if found.saved_mib:
        kept = [f"{name} {mib:.1f}" for name, mib in found.saved_mib.items()]
        lines.append(f"  saved for backward, MiB: {', '.join(kept)}")
        lines.append(f"  gradients differ by {found.gradient_error:.0e} of the largest")
    return "\n".join(lines)
