"""What the benchmarks of `linear_logprob` and `token_logprob` share: tasks, contenders, command.

A `Task` is one op asked for one thing at one shape and dtype; each op's file says what its inputs,
its operations and its floors are. Its contenders are the peers of `bench/peers` that have what is
asked for, and the floors. A peer that rounds is timed a second time on fp32 copies of its inputs.
"""

import abc
import argparse
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bench._measure import (
    SAMPLE_ROWS,
    Contender,
    Kind,
    Results,
    Subject,
    compare,
    digest,
    flags,
    machine,
    parsed,
    read,
    steps,
    table,
    write,
)
from bench.peers import PEERS
from bench.peers.finding import Call, Missing, Peer, available

What = Literal["forward", "entropy", "statistics", "forward+backward"]
RETURNS = {"forward": "logprob", "forward+backward": "logprob"}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
HEADS = {  # (hidden, vocabulary)
    "Game of 24, ships here": (128, 204),
    "Qwen2.5-0.5B": (896, 151_936),
    "Llama-3.2-1B": (2048, 128_256),
    "Phi-3-mini": (3072, 32_064),
    "Mistral-7B": (4096, 32_768),
    "Llama-3.1-8B": (4096, 128_256),
}
K = 1024
EXACT = 1e-4  # nats: what an implementation that is marked exact must keep on tiny shapes


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """One group of contenders."""

    what: What
    shape: tuple[int, ...]
    dtype: str
    device: str

    op: ClassVar[Literal["linear_logprob", "token_logprob"]]
    letters: ClassVar[str]  # of the shape
    whats: ClassVar[tuple[What, ...]]
    checked: ClassVar[tuple[int, ...]]  # the tiny shape

    @property
    @abc.abstractmethod
    def flops(self) -> float:
        """Operations of the task itself, whatever a contender computes."""

    @abc.abstractmethod
    def inputs(self) -> tuple[Tensor, ...]:
        """Random data with the spread of a trained model's logits (3), then random targets."""

    @abc.abstractmethod
    def floors(self) -> dict[str, Call]:
        """What no implementation can beat; each takes the inputs but the target."""

    @abc.abstractmethod
    def logits(self, tensors: Sequence[Tensor], rows: int) -> Tensor:
        """Of the first rows, in fp64."""

    @classmethod
    @abc.abstractmethod
    def whole_run(cls, device: str) -> tuple[list["Task"], list["Task"]]:
        """The tasks of `make bench` on a device: the more telling ones, then the others."""

    def __str__(self) -> str:
        return f"{self.op} {self.what}, {self.sizes}, {self.dtype}, {self.device}"

    @property
    def sizes(self) -> str:
        """The shape with its letters."""
        return " ".join(f"{k}={n}" for k, n in zip(self.letters, self.shape, strict=True))

    def peers(self) -> tuple[dict[str, tuple[Kind, Call]], Missing]:
        """Who takes part: exactness and call by name; and who does not, with the reason."""
        timed = [peer for peer in PEERS[self.op] if peer.timed]
        found, missing = available(timed, self.device)
        taking: dict[str, tuple[Kind, Call]] = {}
        for peer in found:
            named = list(_named(peer, RETURNS.get(self.what, self.what), self.dtype))
            if not named and not peer.ours:
                missing[peer.name] = f"has no {self.what}"
            taking.update({name: (kind, call) for name, kind, call in named})
        ours = found[0].calls if found and found[0].ours else {}
        if self.what == "statistics":
            taking["ours, log-prob alone"] = "partial", ours["logprob"]
        elif self.what == "forward" and "ten" in ours:
            taking["ours, ten statistics"] = "ours", ours["ten"]
        return taking, missing

    def run(self, seconds: float, only: Sequence[str] = ("",)) -> tuple[Results, Missing]:
        """Measure the contenders whose name holds one of `only`, and the floors."""
        # else a contender meets the limit of shapes that torch.compile is willing to see
        torch.compiler.reset()
        *tensors, target = self.inputs()
        peers, missing = self.peers()
        backward = self.what == "forward+backward"
        leaves = [x.requires_grad_(backward) for x in tensors]
        plain = [x.detach() for x in tensors]
        contenders: dict[str, Contender] = {}
        for name, (kind, call) in peers.items():
            if any(part in name for part in only):
                forward = functools.partial(call, *leaves, target)
                both = functools.partial(through, call, leaves, target)
                contenders[name] = Contender(kind, both if backward else forward)
        for name, call in self.floors().items():
            contenders[name] = Contender("floor", functools.partial(call, *plain))
        log_p = self.logits(plain, SAMPLE_ROWS).log_softmax(1)
        truth = log_p.gather(1, target[:SAMPLE_ROWS, None])[:, 0]
        op = f"{self.op} {self.what}"
        subject = Subject(op, self.sizes, self.dtype, self.flops, machine(self.device))
        results, failed = compare(subject, contenders, truth, self.device, seconds)
        return results, missing | failed


def _named(peer: Peer, wanted: str, dtype: str) -> Iterator[tuple[str, Kind, Call]]:
    """The peer's contenders: as it is and, where it rounds, from fp32 copies of its inputs."""
    calls = {name: call for name, call in peer.calls.items() if name.startswith(wanted)}
    if wanted == "statistics" and not calls and "entropy" in peer.calls:
        calls = {"statistics, entropy alone": peer.calls["entropy"]}
    for returned, call in calls.items():
        name = peer.name + returned[len(wanted) :].replace(" but", ", without")
        whole = "exact" if returned == wanted else "partial"
        if peer.ours:
            yield name, "ours", call
        elif not peer.rounds or dtype == "float32":
            yield name, whole, call
        else:
            yield name, "rounded", call
            yield f"{name}, fp32 copies", whole, _upcast(call)


def _upcast(call: Call) -> Call:
    return lambda *args: call(*(x.float() for x in args[:-1]), args[-1])


def through(call: Call, leaves: Sequence[Tensor], target: Tensor) -> tuple[Tensor, object]:
    """Forward, and backward to the gradients of every leaf."""
    out = call(*leaves, target)
    return out.detach(), torch.autograd.grad(out.sum(), leaves)


def whole_run(ops: Sequence[type[Task]], device: str) -> list[Task]:
    """The tasks of these ops on a device; the most telling first, for a run that is cut short."""
    parts = [op.whole_run(device) for op in ops]
    return [task for i in range(2) for part in parts for task in part[i]]


def check(ops: Sequence[type[Task]], device: str) -> None:
    """Every task runs tiny, and ours and the exact peers agree with fp64."""
    tasks = [op(what, op.checked, "bfloat16", device) for op in ops for what in op.whats]
    for task in steps(tasks):
        # compiling every peer would take a minute: ours and eager PyTorch
        results, missing = task.run(0.0, only=("ours", "eager", "log_softmax + gather"))
        rows = [row for row, _ in results.values()]
        assert {"ours", "exact", "floor"} <= {row.kind for row in rows}, (task, missing)
        for row in rows:
            if row.kind in ("ours", "exact") and row.max_error is not None:
                assert row.max_error < EXACT, row
        print(table(str(task), rows, missing))


def command(ops: Sequence[type[Task]]) -> None:
    """Parse the flags; check or measure tasks of these ops."""
    parser = flags("ours beside every peer", seconds=1.0)
    parser.add_argument("--digest", type=Path, help="a line a task of such a file; no timing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--op", choices=[op.op for op in ops], action="append")
    parser.add_argument("--what", choices=sorted({what for op in ops for what in op.whats}))
    parser.add_argument("--dtype", choices=DTYPES)
    letters = " or ".join(" ".join(op.letters) for op in ops)
    parser.add_argument("--shape", type=int, nargs="+", metavar="N", help=letters)
    parser.add_argument("--only", action="append", help="contenders whose name holds this")
    args = parsed(parser)
    if args.check:
        check(ops, args.device)
        return
    if args.digest:
        print(digest(read(args.digest)))
        return
    for task in steps(chosen(ops, args)):
        results, missing = task.run(args.seconds, only=args.only or ("",))
        rows = [row for row, _ in results.values()]
        print(table(str(task), rows, missing), flush=True)
        if args.out:
            write(rows, args.out)


def chosen(ops: Sequence[type[Task]], args: argparse.Namespace) -> list[Task]:
    """The tasks that the flags name: of the whole run, or of a shape of its own."""
    tasks = whole_run(ops, args.device)
    if args.shape:
        tasks = [
            op(what, tuple(args.shape), dtype, args.device)
            for op in ops
            if len(args.shape) == len(op.letters)
            for what in op.whats
            for dtype in DTYPES
        ]
    return [
        task
        for task in tasks
        if (not args.op or task.op in args.op)
        and args.what in (None, task.what)
        and args.dtype in (None, task.dtype)
    ]
