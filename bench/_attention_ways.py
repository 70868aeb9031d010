"""Who computes attention on a tree, and who on a causal sequence of as many tiles.

A causal sequence of n tiles a side has n (n + 1) / 2 that are not empty: the rate of a flash
kernel there is what it could reach on the tree, had it the tree's mask.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bench._attention_problems import TILE, Inputs, Problem, n_tiles
from bench._tasks import Kind
from bench.peers.attention import PEERS, Attend
from bench.peers.finding import Missing, available, reason
from sharpen_kernels.tree import Tree


class Way(NamedTuple):
    """One contender: its inputs, and how many of their tiles are not empty."""

    kind: Kind
    attend: Attend
    inputs: Inputs
    n_tiles: int

    def forward(self) -> Tensor:
        """Output alone."""
        with torch.no_grad():
            return self.attend(*self.inputs[:3])

    def backward(self) -> tuple[Tensor, ...]:
        """Output, and gradients of q, k and v."""
        leaves = [x.detach().requires_grad_() for x in self.inputs[:3]]
        out = self.attend(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, self.inputs.dout)


def ways(problem: Problem, dtype: torch.dtype, device: str) -> tuple[Tree, dict[str, Way], Missing]:
    """The tree on `device`, the contenders by name, and who is missing and why."""
    tree = problem.tree().to(device)
    tiles = n_tiles(tree)
    side = round((math.sqrt(8 * tiles + 1) - 1) / 2)
    inputs = problem.inputs(tree.T, dtype, device)
    causal = problem.inputs(side * TILE, dtype, device)
    found, missing = available(PEERS, device)
    taking: dict[str, Way] = {}
    for peer in found:
        kind: Kind = "ours" if peer.name == "ours" else "exact"
        if "causal" in peer.calls:
            half = side * (side + 1) // 2
            taking[peer.name] = Way("floor", peer.calls["causal"], causal, half)
            continue
        try:
            taking[peer.name] = Way(kind, peer.calls["tree"](tree), inputs, tiles)
        # a mask that does not fit is no reason to stop
        except Exception as error:
            missing[peer.name] = reason(error)
    return tree, taking, missing
