"""How every benchmark is run: flags, progress, seconds and memory, rows, tables.

Contenders take turns, one call each a round, so that a slow minute of the machine slows all of them
alike. What was measured becomes a `Row`, a JSON line whose keys carry their units, and a table.

In reading order: flags and progress; timing; rows; tables and pages; the machine's facts.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from bench.peers.finding import Missing, reason

MIN_ROUNDS, MAX_ROUNDS = 5, 100
L2_BYTES = 256 * 2**20  # several times the cache of any GPU, written between two runs
SAMPLE_ROWS = 64  # kept of what a contender returned, to be compared with fp64
PROGRESS_SECONDS = 5.0  # between two lines on stderr while rounds go on

Kind = Literal["ours", "exact", "rounded", "partial", "floor"]
T = TypeVar("T")


def flags(description: str, *, seconds: float) -> argparse.ArgumentParser:
    """A parser with the flags that every command which measures has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true", help="tiny shapes, agreement alone")
    parser.add_argument("--out", type=Path, help="append the rows to this file, as JSON lines")
    parser.add_argument(
        "--seconds", type=float, default=seconds, help=f"of rounds, for each task; {seconds:g}"
    )
    parser.add_argument("--threads", type=int, help="of PyTorch and of our C++ kernels")
    return parser


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None):
    """The flags; PyTorch has the threads that they ask for."""
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def say(text: str, depth: int = 0) -> None:
    """One line on stderr."""
    print(f"{'  ' * depth}{text}", file=sys.stderr, flush=True)


def steps(items: Iterable[T], name: Callable[[T], str] = str, depth: int = 0) -> Iterator[T]:
    """The items; before each one a line on stderr says how far the work is and what runs now."""
    listed, begun = list(items), time.monotonic()
    for i, item in enumerate(listed, 1):
        passed = time.monotonic() - begun
        say(f"[{i}/{len(listed)}, {passed:.0f} s] {name(item)}", depth)
        yield item


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


def speedup(ours: Timing, peer: Timing) -> float:
    """Median over rounds of the peer's time over ours."""
    pairs = zip(peer.seconds, ours.seconds, strict=True)
    return statistics.median(theirs / own for theirs, own in pairs)


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
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler counts memory, in silence
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        fn()
    results = cast(Any, profile).kineto_results  # optional, and in part missing, in the stubs
    events = [e for e in results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held, default=0) / 2**20


def measure(
    contenders: Mapping[str, Callable[[], object]],
    device: str,
    seconds: float,
    min_rounds: int = MIN_ROUNDS,
    before: Callable[[], object] | None = None,
) -> tuple[dict[str, Timing], Missing]:
    """Time the contenders in turns.

    The rounds last `seconds`, but there are `min_rounds` to MAX_ROUNDS. A contender that fails is
    left out, and its reason is returned. `before` is called ahead of each timed call, untimed.
    """
    times: dict[str, list[float]] = {}
    seen: dict[str, tuple[float, Tensor]] = {}
    failed: Missing = {}
    for name, fn in steps(contenders.items(), lambda item: f"first call: {item[0]}", depth=1):
        try:
            sample = _first(fn())
            seen[name] = peak_extra_mib(fn, device), sample
            times[name] = []
        # someone else's kernel can fail in any way; the others are measured without it
        except Exception as error:
            failed[name] = reason(error)
        if device == "cuda":
            torch.cuda.empty_cache()
    stop, last_line = time.perf_counter() + seconds, -math.inf
    for i in range(MAX_ROUNDS):
        if i >= min_rounds and time.perf_counter() > stop:
            break
        for name, found in times.items():
            if time.perf_counter() - last_line > PROGRESS_SECONDS:
                say(f"round {i + 1}, at least {min_rounds} in {seconds:g} s: {name}", depth=1)
                last_line = time.perf_counter()
            if before is not None:
                before()
            found.append(once(contenders[name], device))
    return {name: Timing(tuple(found), *seen[name]) for name, found in times.items()}, failed


def _first(returned) -> Tensor:
    """The first tensor of a result, its first rows, on the CPU in fp64."""
    x = returned if isinstance(returned, Tensor) else returned[0]
    return x.detach().flatten()[:SAMPLE_ROWS].double().cpu()


class Subject(NamedTuple):
    """What the rows of one task have in common."""

    op: str
    shape: str
    dtype: str
    flops: float  # of the operation itself, whatever a contender computes
    machine: dict[str, str]


R = TypeVar("R", bound="Row")


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

    @classmethod
    def of(
        cls: type[R],
        subject: Subject,
        impl: str,
        kind: Kind,
        timing: Timing,
        max_error: float | None = None,
    ) -> R:
        """The row of one contender."""
        return cls(
            op=subject.op,
            impl=impl,
            kind=kind,
            shape=subject.shape,
            dtype=subject.dtype,
            median_us=round(timing.median * 1e6, 1),
            spread=round(timing.spread, 3),
            rounds=len(timing.seconds),
            tflop_per_s=round(subject.flops / timing.median / 1e12, 4),
            peak_extra_mib=round(timing.peak_extra_mib, 2),
            machine=subject.machine,
            max_error=max_error,
        )


def kind_of(name: str) -> Kind:
    """Of contenders that all are exact: ours by their name, the others peers."""
    return "ours" if name.startswith("ours") else "exact"


class Contender(NamedTuple):
    """How exact it is, and the call that is timed."""

    kind: Kind
    call: Callable[[], object]


Results = dict[str, tuple[Row, Timing]]


def compare(
    subject: Subject,
    contenders: Mapping[str, Contender],
    truth: Tensor,
    device: str,
    seconds: float,
    min_rounds: int = MIN_ROUNDS,
    before: Callable[[], object] | None = None,
) -> tuple[Results, Missing]:
    """Measure the contenders in turns; errors are of their first numbers against `truth`."""
    calls = {name: contender.call for name, contender in contenders.items()}
    timings, failed = measure(calls, device, seconds, min_rounds, before)
    want, results = _first(truth), {}
    for name, timing in timings.items():
        kind = contenders[name].kind
        error = None if kind == "floor" else (timing.sample - want).abs().max().item()
        results[name] = Row.of(subject, name, kind, timing, error), timing
    return results, failed


def write(rows: Sequence[Row], path: Path) -> None:
    """Append each row to `path` as a JSON line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)


def read(path: Path) -> list[Row]:
    """The rows that `write` left there, without the keys that only some benchmarks add."""
    names = {field.name for field in dataclasses.fields(Row)}
    lines = map(json.loads, path.read_text().splitlines())
    return [Row(**{name: x for name, x in line.items() if name in names}) for line in lines]


def table(title: str, rows: Sequence[Row], missing: Missing) -> str:
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
    return "\n".join([*lines, *missing_lines(missing)])


def missing_lines(missing: Missing) -> list[str]:
    """A line for each reason: who is missing by it."""
    return [
        f"  missing, {why}: {', '.join(name for name in missing if missing[name] == why)}"
        for why in dict.fromkeys(missing.values())
    ]


def _times(ratio: float) -> str:
    return "" if math.isnan(ratio) else f"{ratio:.2f} x"


def digest(rows: Sequence[Row]) -> str:
    """A line for each op, shape and dtype among the rows: ours beside the best and the floor."""
    lines = []
    for task in dict.fromkeys((row.op, row.shape, row.dtype) for row in rows):
        here = [row for row in rows if (row.op, row.shape, row.dtype) == task]
        ours = next((row for row in here if row.impl == "ours"), None)
        if ours is None:
            continue
        exact, floor = (_fastest(here, kind) for kind in ("exact", "floor"))
        text = f"{task[0]:31}{task[1]:25}{task[2]:9}{ours.median_us / 1e3:10.2f} ms"
        if exact:
            text += f"{exact.median_us / ours.median_us:7.2f} x {exact.impl}"
        if floor:
            text += f", {ours.median_us / floor.median_us:.2f} x floor"
        lines.append(f"{text}, {ours.peak_extra_mib:.1f} MiB")
    return "\n".join(lines)


def _fastest(rows: Sequence[Row], kind: str) -> Row | None:
    of_kind = (row for row in rows if row.kind == kind)
    return min(of_kind, key=lambda row: row.median_us, default=None)


def write_between(path: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two marks in a page."""
    before, _, rest = path.read_text().partition(begin)
    _, mark, after = rest.partition(end)
    if not mark:
        raise SystemExit(f"{path} lacks the marks {begin} and {end}.")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


class RecordedClock:
    """A clock that moves by recorded durations: pytest-benchmark's statistics of a past run."""

    def __init__(self):
        self.time = 0.0
        self.durations: Iterator[float] = iter(())

    def replay(self, durations: Iterable[float]):
        """Take these, in seconds, from the next call of `advance` on."""
        self.durations = iter(durations)

    def advance(self):
        """Move by the next of them."""
        self.time += next(self.durations)

    def now(self) -> float:
        """Seconds."""
        return self.time


def machine(device: str) -> dict[str, str]:
    """What a number depends on besides the code: hardware, versions, threads, commit, day."""
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = "none"
    return {
        "device": name,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": triton_version,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    """The processor's name as the system gives it, often vague, and what torch uses of it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    products = [flag for flag in ("avx512_bf16", "amx_tile") if flag in flags]
    return " ".join([name, torch.backends.cpu.get_cpu_capability(), *products])


def _commit() -> str:
    """The commit measured, "+" if files differ from it, "unknown" outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
