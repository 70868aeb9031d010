"""What is measured: an op, what it is asked for, a shape of a real model, and who takes part."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal

import torch

from bench.peers import PEERS
from bench.peers.finding import Call, Missing, Peer, available

Op = Literal["linear_logprob", "token_logprob"]
What = Literal["forward", "entropy", "statistics", "forward+backward"]
Kind = Literal["ours", "exact", "rounded", "partial", "floor"]
WHATS: dict[Op, tuple[What, ...]] = {
    "linear_logprob": ("forward", "statistics", "forward+backward"),
    "token_logprob": ("forward", "entropy", "forward+backward"),
}
RETURNS = {"forward": "logprob", "forward+backward": "logprob"}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Task:
    """One group of contenders."""

    op: Op
    what: What
    shape: tuple[int, ...]  # (rows, hidden, vocabulary), or (rows, vocabulary) of logits
    dtype: str
    device: str

    def __str__(self) -> str:
        return f"{self.op} {self.what}, {self.sizes}, {self.dtype}, {self.device}"

    @property
    def sizes(self) -> str:
        """The shape with its letters."""
        letters = "RDV" if self.op == "linear_logprob" else "RV"
        return " ".join(f"{k}={n}" for k, n in zip(letters, self.shape, strict=True))

    @property
    def flops(self) -> float:
        """Operations of the task itself: products, or an exponential and a sum a logit."""
        if self.op == "token_logprob":
            return 2.0 * self.shape[0] * self.shape[1]
        R, D, V = self.shape
        return 2.0 * R * D * V * (3 if self.what == "forward+backward" else 1)

    def inputs(self):
        """Random data with the spread of a trained model's logits (3), and random targets."""
        torch.manual_seed(0)
        dtype, (R, *_, V) = DTYPES[self.dtype], self.shape
        target = torch.randint(V, (R,), device=self.device)
        x = torch.randn(R, self.shape[1], device=self.device)
        if self.op == "token_logprob":
            return (3 * x).to(dtype), target
        w = torch.randn(V, self.shape[1], device=self.device) * 3 / self.shape[1] ** 0.5
        return x.to(dtype), w.to(dtype), target

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


def through(call: Call, leaves: list[torch.Tensor], target: torch.Tensor) -> Callable[[], object]:
    """Forward, and backward to the gradients of every leaf."""

    def run():
        out = call(*leaves, target)
        return out.detach(), torch.autograd.grad(out.sum(), leaves)

    return run
