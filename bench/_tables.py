"""Rows of measurements as text: a table a task, and a line a task."""

import math

from bench._rows import Row
from bench.peers.finding import Missing


def table(title: str, rows: list[Row], missing: Missing) -> str:
    """The rows in the order of time.

    "peer" is the time of the fastest equally exact peer over the row's, "floor" the row's over
    the floor's.
    """
    best = min((row.median_us for row in rows if row.kind == "exact"), default=float("nan"))
    floor = min((row.median_us for row in rows if row.kind == "floor"), default=float("nan"))
    columns = f"{'peer':>10}{'floor':>9}{'extra':>12}{'error':>9}"
    wide = max(len(row.impl) for row in rows) + 2
    lines = [title, f"{'':{wide + 11}}{'median':>12}{'spread':>8}{columns}"]
    for row in sorted(rows, key=lambda row: row.median_us):
        error = "" if row.max_error is None else f"{row.max_error:.0e}"
        lines.append(
            f"  {row.impl:{wide}}{row.kind or '-':9}{row.median_us / 1e3:9.2f} ms{row.spread:8.1%}"
            f"{_times(best / row.median_us):>10}{_times(row.median_us / floor):>9}"
            f"{row.peak_extra_mib:8.1f} MiB{error:>9}"
        )
    for why in dict.fromkeys(missing.values()):
        lines.append(f"  missing, {why}: {', '.join(n for n in missing if missing[n] == why)}")
    return "\n".join(lines)


def _times(ratio: float) -> str:
    return "" if math.isnan(ratio) else f"{ratio:.2f} x"


def digest(rows: list[Row]) -> str:
    """A line for each op, shape and dtype among the rows: ours beside the best and the floor."""
    lines = []
    for task in dict.fromkeys((row.op, row.shape, row.dtype) for row in rows):
        here = [row for row in rows if (row.op, row.shape, row.dtype) == task]
        ours = next((row for row in here if row.impl == "ours"), None)
        if ours is None:
            continue
        exact, floor = (
            min(
                (row for row in here if row.kind == kind),
                key=lambda row: row.median_us,
                default=None,
            )
            for kind in ("exact", "floor")
        )
        text = f"{task[0]:31}{task[1]:25}{task[2]:9}{ours.median_us / 1e3:10.2f} ms"
        if exact:
            text += f"{exact.median_us / ours.median_us:7.2f} x {exact.impl}"
        if floor:
            text += f", {ours.median_us / floor.median_us:.2f} x floor"
        lines.append(f"{text}, {ours.peak_extra_mib:.1f} MiB")
    return "\n".join(lines)
