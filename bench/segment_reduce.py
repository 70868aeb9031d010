"""Token statistics to sequences and groups, beside PyTorch's ways to reduce ragged runs.

    python -m bench.segment_reduce                # every task of this device
    python -m bench.segment_reduce --what groups --shape 64 16 256 --threads 1 --out FILE.jsonl
    python -m bench.segment_reduce --check        # tiny, agreement with fp64 alone

Memory bound: S fp32 values are read once, 4 S bytes; the floor is one read of them (their sum).
One operation a token is counted. Ours sums in fp64, so what sums in fp32 is `rounded`, and runs a
second time on an fp64 copy. `statistics` are sum, mean, least value and least window mean; `groups`
are argmax, mean, std, advantage and weights of the sums. Errors are of the sums, in nats.

P prompts, G completions of each, L tokens of a completion on average: S tokens, N sequences.
"""

import dataclasses
import functools
from typing import Literal

import torch
from torch import Tensor

from bench._measure import (
    Contender,
    Results,
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
from sharpen_kernels import GroupStats, segment_reduce

What = Literal["sum", "statistics", "groups", "sum, forward+backward"]
WHATS: tuple[What, ...] = ("sum", "statistics", "groups", "sum, forward+backward")
WINDOW = 16  # values
EPSILON = 1e-4  # beside the std of an advantage
TOLERANCE = 1e-6  # of the largest sum, of what is exact
SHAPES = {"cpu": ((64, 16, 256), (8, 64, 64)), "cuda": ((512, 16, 1024), (64, 64, 256))}
CHECKED = (3, 4, 20)


@dataclasses.dataclass(frozen=True)
class Task:
    """One group of contenders."""

    what: What
    shape: tuple[int, ...]
    device: str

    def __str__(self) -> str:
        return f"segment_reduce {self.what}, {self.sizes}, float32, {self.device}"

    @property
    def sizes(self) -> str:
        """The shape with its letters."""
        return " ".join(f"{k}={n}" for k, n in zip("PGL", self.shape, strict=True))

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities [S] of ragged sequences, L / 2 to 3 L / 2 long, and their offsets."""
        P, G, L = self.shape
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(L // 2, 3 * L // 2 + 1, (P * G,), generator=generator)
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        values = torch.randn(int(offsets[-1]), generator=generator).exp().neg()
        return values.to(self.device), offsets.to(self.device)

    def run(self, seconds: float) -> tuple[Results, Missing]:
        """Measure the contenders and the floor in turns."""
        values, offsets = self.inputs()
        contenders = {
            "sum": _of_sums,
            "statistics": _of_statistics,
            "groups": functools.partial(_of_groups, self.shape),
            "sum, forward+backward": _of_gradients,
        }[self.what](values, offsets)
        contenders["bare read"] = Contender("floor", lambda: values.sum())
        op, facts = f"segment_reduce {self.what}", machine(self.device)
        subject = Subject(op, self.sizes, "float32", float(len(values)), facts)
        truth = _summed(values.double(), offsets)
        return compare(subject, contenders, truth, self.device, seconds)


def main() -> None:
    """Parse the flags; check or measure."""
    parser = flags("reductions of ragged runs", seconds=1.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--what", choices=WHATS)
    parser.add_argument("--shape", type=int, nargs=3, metavar=("P", "G", "L"))
    args = parsed(parser)
    shapes = (tuple(args.shape),) if args.shape else SHAPES[args.device]
    shapes = (CHECKED,) if args.check else shapes
    whats = WHATS if args.what is None else (args.what,)
    tasks = [Task(what, shape, args.device) for shape in shapes for what in whats]
    for task in steps(tasks):
        results, missing = task.run(0.0 if args.check else args.seconds)
        rows = [row for row, _ in results.values()]
        print(table(str(task), rows, missing), flush=True)
        if args.check:
            check(task, results, missing)
        if args.out:
            write(rows, args.out)


def check(task: Task, results: Results, missing: Missing) -> None:
    """Everyone ran, and ours and the exact peers agree with fp64."""
    assert not missing, missing
    bound = TOLERANCE * _summed(*task.inputs()).abs().max().item()
    for row, _ in results.values():
        if row.kind in ("ours", "exact"):
            assert row.max_error is not None, row
            assert row.max_error <= bound, row


def _ours(values: Tensor, offsets: Tensor) -> Tensor:
    found = segment_reduce({"logprob": values}, offsets).sequences["logprob"].sum
    assert found is not None
    return found


def _summed(values: Tensor, offsets: Tensor) -> Tensor:
    """PyTorch's own op of this name."""
    return torch.segment_reduce(values, "sum", lengths=offsets.diff())


def _index_added(values: Tensor, offsets: Tensor) -> Tensor:
    """A scatter; the owner of each token is made in the call."""
    N = len(offsets) - 1
    owner = torch.arange(N, device=values.device).repeat_interleave(offsets.diff())
    return values.new_zeros(N).index_add(0, owner, values)


def _by_padding(values: Tensor, offsets: Tensor) -> Tensor:
    """A padded batch, as trainers hold log-probabilities."""
    runs = values.split(offsets.diff().tolist())
    return torch.nn.utils.rnn.pad_sequence(list(runs), batch_first=True).sum(1)


PEERS = {
    "torch.segment_reduce": _summed,
    "index_add": _index_added,
    "padded batch": _by_padding,
}


def _of_sums(values: Tensor, offsets: Tensor) -> dict[str, Contender]:
    contenders = {"ours": Contender("ours", lambda: _ours(values, offsets))}
    for name, call in PEERS.items():
        plain = functools.partial(call, values, offsets)
        contenders[name] = Contender("rounded", plain)
        wide = functools.partial(lambda call: call(values.double(), offsets).float(), call)
        contenders[f"{name}, fp64 copy"] = Contender("exact", wide)
    return contenders


def _of_gradients(values: Tensor, offsets: Tensor) -> dict[str, Contender]:
    """The sums, and the gradient of the sum of their squares."""
    leaf = values.detach().requires_grad_()

    def through(call) -> tuple[Tensor, Tensor]:
        out = call(leaf, offsets)
        (gradient,) = torch.autograd.grad(out.square().sum(), leaf)
        return out.detach(), gradient

    def wide(call, x: Tensor, at: Tensor) -> Tensor:
        return call(x.double(), at).float()

    contenders = {"ours": Contender("ours", lambda: through(_ours))}
    for name, call in PEERS.items():
        contenders[name] = Contender("rounded", functools.partial(through, call))
        copied = functools.partial(through, functools.partial(wide, call))
        contenders[f"{name}, fp64 copy"] = Contender("exact", copied)
    return contenders


def _of_statistics(values: Tensor, offsets: Tensor) -> dict[str, Contender]:
    asked = ("sum", "mean", "min", "lowest_window")

    def ours() -> tuple[Tensor | None, ...]:
        found = segment_reduce({"logprob": values}, offsets, stats=asked, window=WINDOW)
        return tuple(getattr(found.sequences["logprob"], name) for name in asked)

    def loop() -> tuple[Tensor, ...]:
        """One sequence after the other, in fp64."""
        found = []
        for x in values.double().split(offsets.diff().tolist()):
            windows = x.unfold(0, min(WINDOW, len(x)), 1)
            found.append(torch.stack([x.sum(), x.mean(), x.min(), windows.mean(1).min()]))
        return torch.stack(found).float().unbind(1)

    def reduced() -> list[Tensor]:
        lengths = offsets.diff()
        return [torch.segment_reduce(values, name, lengths=lengths) for name in asked[:3]]

    return {
        "ours": Contender("ours", ours),
        "loop over sequences": Contender("exact", loop),
        "torch.segment_reduce, without windows": Contender("partial", reduced),
    }


def _of_groups(shape: tuple[int, ...], values: Tensor, offsets: Tensor) -> dict[str, Contender]:
    """The sums of sequences, reduced to groups of G neighbours."""
    P, G, _ = shape
    group_offsets = torch.arange(0, P * G + 1, G, device=values.device)

    def ours() -> tuple[Tensor, GroupStats]:
        found = segment_reduce(
            {"logprob": values},
            offsets,
            group_offsets,
            group_stats=("argmax", "mean", "std", "advantage", "weights"),
        )
        of_sequences, of_groups = found.sequences["logprob"].sum, found.groups["logprob"]
        assert of_sequences is not None
        return of_sequences, of_groups

    def by_view() -> tuple[Tensor, ...]:
        """As GRPO's trainers do, where every prompt has as many completions."""
        score_PG = _summed(values.double(), offsets).float().view(P, G)
        mean, std = score_PG.mean(1, keepdim=True), score_PG.std(1, keepdim=True)
        advantage = (score_PG - mean) / (std + EPSILON)
        return score_PG, score_PG.argmax(1), mean, std, advantage, score_PG.softmax(1)

    return {
        "ours": Contender("ours", ours),
        "torch.segment_reduce, view": Contender("exact", by_view),
    }


if __name__ == "__main__":
    main()
