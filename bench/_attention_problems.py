"""Trees that attention is timed on, the work in them, and the truth in fp64."""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sharpen_kernels.tree import Tree

TILE = 128  # of queries and of keys: what work is counted in, whatever tiles a kernel has
BLOCK = 512  # queries of the truth at a time; chosen


class Inputs(NamedTuple):
    """Queries, keys, values and the output's gradient, [heads, T, K] each."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


@dataclasses.dataclass(frozen=True)
class Problem:
    """Attention on one tree; `levels` are (children of each node above, tokens of each child)."""

    name: str
    levels: tuple[tuple[int, int], ...]
    heads: tuple[int, int]  # of queries and of keys
    K: int

    def __str__(self) -> str:
        H, Hkv = self.heads
        return f"{self.name} H={H} Hkv={Hkv} K={self.K}"

    def tree(self) -> Tree:
        """On the CPU."""
        parent: list[int] = []

        def grow(above: int, levels: tuple[tuple[int, int], ...]) -> None:
            if levels:
                (n, length), *rest = levels
                for _ in range(n):
                    start = len(parent)
                    parent.extend([above, *range(start, start + length - 1)])
                    grow(start + length - 1, tuple(rest))

        grow(-1, self.levels)
        return Tree.of(torch.tensor(parent))

    def flops(self, n_tiles: int, *, backward: bool) -> float:
        """Of two products of every tile of every head, and five more for the gradients."""
        forward = 4.0 * self.K * self.heads[0] * n_tiles * TILE**2
        return forward * 3.5 if backward else forward

    def inputs(self, T: int, dtype: torch.dtype, device: str) -> Inputs:
        """Random; logits of standard deviation 2; a token's heads side by side in memory."""
        torch.manual_seed(0)
        H, Hkv = self.heads
        every = (torch.randn(T, n, self.K, device=device) for n in (H, Hkv, Hkv, H))
        q, k, v, dout = (x.to(dtype).transpose(0, 1) for x in every)
        return Inputs(q * 2, k, v, dout)


def n_tiles(tree: Tree) -> int:
    """Tiles of TILE x TILE in which some query sees some key."""
    n = -(-tree.T // TILE)
    last = pad(tree.end.cpu(), (0, n * TILE - tree.T)).view(n, TILE).amax(dim=1)
    start = torch.arange(n) * TILE
    return int(((start <= start[:, None]) & (last > start[:, None])).sum())


def truth(inputs: Inputs, tree: Tree) -> dict[str, Tensor]:
    """Output and gradients of the first key head and its query heads, in fp64."""
    H, T, K = inputs.q.shape
    n = H // inputs.k.shape[0]
    q, dout = inputs.q[:n].double(), inputs.dout[:n].double()
    k, v = inputs.k[0].double(), inputs.v[0].double()
    out, dq = torch.empty_like(dout), torch.empty_like(q)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    place = torch.arange(T, device=q.device)
    for rows in place.split(BLOCK):
        hidden = (place > rows[:, None]) | (rows[:, None] >= tree.end)
        z = (q[:, rows] @ k.T * K**-0.5).masked_fill_(hidden, float("-inf"))
        p = z.softmax(dim=2)
        out[:, rows] = p @ v
        dy = dout[:, rows]
        dv += (p.mT @ dy).sum(dim=0)
        delta = (dy * out[:, rows]).sum(dim=2, keepdim=True)
        dz = p * (dy @ v.T - delta) * K**-0.5
        dq[:, rows] = dz @ k
        dk += (dz.mT @ q[:, rows]).sum(dim=0)
    return {"out": out, "dq": dq, "dk": dk[None], "dv": dv[None]}


def errors(found: tuple[Tensor, ...], want: dict[str, Tensor]) -> dict[str, float]:
    """Of what a contender returned (out, dq, dk, dv): ||x - truth|| / ||truth||."""
    return {
        name: ((x[: len(y)].double() - y).norm() / y.norm()).item()
        for x, (name, y) in zip(found, want.items(), strict=False)
    }
