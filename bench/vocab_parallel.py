"""`linear_logprob` of a head that is spread over processes, beside the ways of other trainers.

    python -m bench.vocab_parallel                # two processes, every task of this device
    python -m bench.vocab_parallel --world 4 --shape 256 896 32768 --threads 1 --out FILE.jsonl
    python -m bench.vocab_parallel --check        # tiny, agreement with fp64 alone

Compute bound: each rank multiplies hidden with its V / world rows of the head, 2 R D V / world
operations forward and 6 with both gradients; the floor is that bare product (three with
gradients). `tflop_per_s` counts the operations of the whole head: the rate of all ranks together.

Peers: the vocab-parallel cross entropy of Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053,
section 3), which reduces the maximum, the sum of exponentials and the chosen logit over ranks, and
gathered logits, R V numbers sent. Both hold the logits of a rank. "ours, whole head" is
`linear_logprob` on one rank with nothing spread. Ranks wait for each other before every timed call.

R rows, D hidden, V vocabulary.
"""

import dataclasses
import functools
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn as start_processes

from bench._measure import (
    MAX_ROUNDS,
    MIN_ROUNDS,
    SAMPLE_ROWS,
    Contender,
    Kind,
    Row,
    Subject,
    compare,
    flags,
    machine,
    parsed,
    steps,
    table,
    write,
)
from bench.peers.finding import Missing
from sharpen_kernels import linear_logprob, vocab_parallel_linear_logprob

What = Literal["forward", "forward+backward"]
WHATS: tuple[What, ...] = ("forward", "forward+backward")
DTYPES = ("float32", "bfloat16")
SHAPES = {"cpu": (256, 896, 32_768), "cuda": (8192, 4096, 128_256)}
CHECKED = (70, 40, 301)  # ranks hold different numbers of rows
TOLERANCE = 1e-4  # nats, of what is exact
Score = Callable[[Tensor, Tensor], Tensor]  # of hidden and this rank's rows of the head


@dataclasses.dataclass(frozen=True)
class Task:
    """One group of contenders, on `world` processes."""

    what: What
    shape: tuple[int, ...]
    dtype: str
    device: str
    world: int
    threads: int  # of each process

    def __str__(self) -> str:
        return f"vocab_parallel {self.what}, {self.sizes}, {self.dtype}, {self.device}"

    @property
    def sizes(self) -> str:
        """The shape with its letters, and how many share the head."""
        names = zip("RDV", self.shape, strict=True)
        return " ".join(f"{k}={n}" for k, n in names) + f" world={self.world}"

    @property
    def shards(self) -> list[int]:
        """Rows of the head on each rank; the first ones hold what does not divide."""
        V = self.shape[2]
        return [V // self.world + (rank < V % self.world) for rank in range(self.world)]

    def run(self, seconds: float) -> tuple[list[Row], Missing]:
        """Start the processes, and take what the first one measured."""
        found = multiprocessing.get_context("spawn").SimpleQueue()
        with tempfile.TemporaryDirectory() as folder:
            given = self, f"file://{folder}/store", seconds, found
            start_processes(measured, args=given, nprocs=self.world)
        return found.get()


def main() -> None:
    """Parse the flags; check or measure."""
    parser = flags("a head that is spread over processes", seconds=2.0)
    parser.add_argument("--device", choices=tuple(SHAPES), default="cpu", help="cuda: a GPU a rank")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU")
    parser.add_argument("--world", type=int, default=2, help="processes")
    parser.add_argument("--what", choices=WHATS)
    parser.add_argument("--shape", type=int, nargs=3, metavar=("R", "D", "V"))
    args = parsed(parser)
    dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    shape = CHECKED if args.check else tuple(args.shape or SHAPES[args.device])
    rest = shape, dtype, args.device, args.world, args.threads or 1
    for task in steps([Task(what, *rest) for what in ((args.what,) if args.what else WHATS)]):
        rows, missing = task.run(0.0 if args.check else args.seconds)
        print(table(str(task), rows, missing), flush=True)
        if args.check:
            assert not missing, missing
            assert {"ours", "exact", "floor"} <= {row.kind for row in rows}, rows
            for row in rows:
                exact = row.kind in ("ours", "exact")
                assert not exact or (row.max_error or 0.0) <= TOLERANCE, row
        if args.out:
            write(rows, args.out)


def measured(rank: int, task: Task, store: str, seconds: float, found: Any) -> None:
    """What each process does; the first one tells."""
    torch.set_num_threads(task.threads)
    if rank > 0:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, progress is that of the first
    if task.device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if task.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=task.world)
    hidden, weight, target = inputs(task)
    contenders = contenders_of(task, hidden, weight, target)
    rounds = agreed_rounds(contenders, seconds)
    logits = hidden[:SAMPLE_ROWS].double() @ weight.double().T
    truth = logits.log_softmax(1).gather(1, target[:SAMPLE_ROWS, None])[:, 0]
    R, D, V = task.shape
    flops = 2.0 * R * D * V * (3 if task.what == "forward+backward" else 1)
    op, facts = f"vocab_parallel {task.what}", machine(task.device)
    subject = Subject(op, task.sizes, task.dtype, flops, facts)
    # as many rounds on every rank: none may wait for a call that another does not make
    results, missing = compare(
        subject, contenders, truth, task.device, 0.0, min_rounds=rounds, before=dist.barrier
    )
    if rank == 0:
        found.put(([row for row, _ in results.values()], missing))
    dist.barrier()
    dist.destroy_process_group()


def agreed_rounds(contenders: dict[str, Contender], seconds: float) -> int:
    """How many rounds of all contenders last so long, as the first rank finds."""
    for contender in contenders.values():
        contender.call()
    begun = time.perf_counter()
    for contender in contenders.values():
        contender.call()
    rounds = int(seconds / (time.perf_counter() - begun))
    told: list[Any] = [min(max(rounds, MIN_ROUNDS), MAX_ROUNDS)]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def inputs(task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """The same on every rank: hidden, the whole head with logits that spread by 3, targets."""
    generator = torch.Generator().manual_seed(0)
    R, D, V = task.shape
    hidden = torch.randn(R, D, generator=generator)
    weight = torch.randn(V, D, generator=generator) * 3 / D**0.5
    target = torch.randint(V, (R,), generator=generator)
    dtype = getattr(torch, task.dtype)
    device = task.device
    return hidden.to(device, dtype), weight.to(device, dtype), target.to(device)


def contenders_of(
    task: Task, hidden: Tensor, weight: Tensor, target: Tensor
) -> dict[str, Contender]:
    """By name, ours first; each is given its rank's rows of the head."""
    shards, rank = task.shards, dist.get_rank()
    start = sum(shards[:rank])
    shard = weight[start : start + shards[rank]].clone()

    def ours(known: list[int] | None, x: Tensor, w: Tensor) -> Tensor:
        found = vocab_parallel_linear_logprob(x, w, target, shards=known).logprob
        assert found is not None
        return found

    def whole(x: Tensor, w: Tensor) -> Tensor:
        found = linear_logprob(x, w, target).logprob
        assert found is not None
        return found

    # logits of half precision are rounded before the peers widen them
    peer: Kind = "exact" if task.dtype == "float32" else "rounded"
    spread: dict[str, tuple[Kind, Score]] = {
        "ours": ("ours", functools.partial(ours, None)),
        "ours, shards known": ("ours", functools.partial(ours, shards)),
        "vocab-parallel cross entropy": (
            peer,
            lambda x, w: -CrossEntropy.apply((x @ w.T).float(), target, start),
        ),
        "gathered logits": (peer, lambda x, w: by_gathered_logits(x @ w.T, target, shards)),
    }
    backward = task.what == "forward+backward"
    found = {}
    for name, (kind, score) in spread.items():
        # ours has summed the gradient of hidden already
        call = functools.partial(through, score, hidden, shard, sums=kind != "ours")
        forward = functools.partial(without_gradients, score, hidden, shard)
        found[name] = Contender(kind, call if backward else forward)
    alone = functools.partial(through, whole, hidden, weight, sums=False)
    forward = functools.partial(without_gradients, whole, hidden, weight)
    found["ours, whole head"] = Contender("ours", alone if backward else forward)
    floor = three_gemms if backward else lambda x, w: x @ w.T
    found["bare GEMM"] = Contender("floor", functools.partial(floor, hidden, shard))
    return found


def without_gradients(score: Score, hidden: Tensor, weight: Tensor) -> Tensor:
    """Log-probabilities [R]."""
    with torch.no_grad():
        return score(hidden, weight)


def through(
    score: Score, hidden: Tensor, weight: Tensor, *, sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, and the gradients of their sum; that of hidden is whole on every rank."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    out = score(*leaves)
    dhidden, dweight = torch.autograd.grad(out.sum(), leaves)
    if sums:
        dist.all_reduce(dhidden)
    return out.detach(), dhidden, dweight


def three_gemms(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The product of forward, and the two that no backward can do without."""
    z = x @ w.T
    return z, z @ w, z.T @ x


class CrossEntropy(torch.autograd.Function):
    """-log p of the targets from the logits [R, v] of each rank, three reductions in forward."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, target: Tensor, start: int) -> Tensor:
        """Megatron-LM's: the ranks' maximum, sum of exponentials and chosen logit."""
        top = z.amax(1)
        dist.all_reduce(top, op=dist.ReduceOp.MAX)
        z = z - top[:, None]
        here = (target >= start) & (target < start + z.shape[1])
        column = torch.where(here, target - start, 0)
        chosen = torch.where(here, z.gather(1, column[:, None])[:, 0], 0.0)
        p = z.exp()
        mass = p.sum(1)
        dist.all_reduce(chosen)
        dist.all_reduce(mass)
        ctx.save_for_backward(p.div_(mass[:, None]), column, here)
        return mass.log() - chosen

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Probabilities less 1 at the target, of this rank's columns."""
        p, column, here = ctx.saved_tensors
        dz = p.scatter_add(1, column[:, None], -here.to(p.dtype)[:, None])
        return dz * grads[0][:, None], None, None


def by_gathered_logits(z: Tensor, target: Tensor, shards: list[int]) -> Tensor:
    """The logits of all ranks on each of them; gradients reach this rank's own part."""
    widest, rank = max(shards), dist.get_rank()
    # a collective wants parts of one size
    own = torch.nn.functional.pad(z.detach(), (0, widest - z.shape[1]))
    parts = [torch.empty_like(own) for _ in shards]
    dist.all_gather(parts, own)
    parts = [part[:, :width] for part, width in zip(parts, shards, strict=True)]
    parts[rank] = z
    log_p = torch.cat(parts, dim=1).float().log_softmax(1)
    return log_p.gather(1, target[:, None])[:, 0]


if __name__ == "__main__":
    main()
