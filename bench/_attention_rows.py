"""What was found of attention on a tree, as rows and as text."""

import dataclasses

import torch

from bench._attention_problems import Problem, errors, truth
from bench._attention_ways import ways
from bench._machine import machine
from bench._measure import measure
from bench._rows import Row
from bench.peers.finding import Missing


@dataclasses.dataclass(frozen=True)
class AttentionRow(Row):
    """A row; its rate is of the tiles that are not empty, its error ||x - truth|| / ||truth||."""

    n_tiles: int = 0  # of 128 x 128, a head
    errors: dict[str, float] | None = None  # of the output and of each gradient


def run(
    problem: Problem, dtype: str, device: str, seconds: float, *, backward: bool
) -> tuple[list[AttentionRow], Missing]:
    """Measure the contenders in turns; each of the tree is judged against fp64."""
    tree, taking, missing = ways(problem, getattr(torch, dtype), device)
    calls = {name: way.backward if backward else way.forward for name, way in taking.items()}
    timings, failed = measure(calls, device, seconds)
    of_tree = [name for name in timings if taking[name].kind != "floor"]
    want = truth(taking[of_tree[0]].inputs, tree) if of_tree else {}
    facts, rows = machine(device), []
    for name, timing in timings.items():
        way, judged = taking[name], None
        if name in of_tree:
            got = calls[name]()
            judged = errors(got if isinstance(got, tuple) else (got,), want)
        rate = problem.flops(way.n_tiles, backward=backward) / timing.median / 1e12
        row = AttentionRow(
            op=f"tree_attention {'forward+backward' if backward else 'forward'}",
            impl=name,
            kind=way.kind,
            shape=str(problem),
            dtype=dtype,
            median_us=round(timing.median * 1e6, 1),
            spread=round(timing.spread, 3),
            rounds=len(timing.seconds),
            tflop_per_s=round(rate, 4),
            peak_extra_mib=round(timing.peak_extra_mib, 2),
            machine=facts,
            max_error=max(judged.values()) if judged else None,
            n_tiles=way.n_tiles,
            errors=judged,
        )
        rows.append(row)
    return rows, missing | failed


def text_of(rows: list[AttentionRow], missing: Missing) -> str:
    """A line a contender in the order of rate, and what ours reaches of the others."""
    first = rows[0]
    lines = [f"{first.op}, {first.shape}, {first.dtype}, {first.machine['device']}"]
    for row in sorted(rows, key=lambda row: -row.tflop_per_s):
        error = "" if row.max_error is None else f"{row.max_error:.0e}"
        lines.append(
            f"  {row.impl:22}{row.median_us / 1e3:10.3f} ms{row.spread:7.1%}{row.n_tiles:8} tiles"
            f"{row.tflop_per_s:9.4g} TFLOP/s{row.peak_extra_mib:9.1f} MiB{error:>7}"
        )
    for why in dict.fromkeys(missing.values()):
        lines.append(f"  missing, {why}: {', '.join(n for n in missing if missing[n] == why)}")
    return "\n".join([*lines, *verdicts(rows)])


def verdicts(rows: list[AttentionRow]) -> list[str]:
    """Ours beside the fastest flash kernel's rate and FlexAttention's time."""
    by_name = {row.impl: row for row in rows}
    ours, flex = by_name.get("ours"), by_name.get("FlexAttention")
    if ours is None:
        return ["  goal: ours was not measured"]
    lines = []
    # where flash-attn is, its rate is the goal's; PyTorch's copies of it stand in
    flash = [row for row in rows if row.impl.startswith("causal, flash-attn")]
    flash = flash or [row for row in rows if row.kind == "floor"]
    for row in flash:
        share = ours.tflop_per_s / row.tflop_per_s
        lines.append(f"  goal: {share:.2f} of the rate of {row.impl} (at least 0.70)")
    if flex:
        times = flex.median_us / ours.median_us
        lines.append(f"  goal: {times:.2f} x as fast as FlexAttention (above 1)")
    return lines
