"""Token trees packed depth-first in one row: who attends to whom, in one integer a token.

A token's subtree is a stretch of the row, for a node's tokens come first and its children follow
one after another. Query q sees key k if k is an ancestor of q or q itself, which is

    k <= q < end[k],    and under a sliding window also    position[q] - position[k] < window

Prompts with their completions, tries of any depth, forests of several trees and plain packing
(trees that are chains) are all this one rule.

T packed tokens.  Pure tensors: nothing of transformers, no kernel.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from ._checks import check_dtype


class Run(NamedTuple):
    """A maximal stretch without a fork: tokens start ... stop - 1 form a chain.

    What descends from the chain is the stretch stop ... end - 1; a leaf has end = stop.
    """

    start: int
    stop: int
    end: int


@dataclass(frozen=True, eq=False)
class Tree:
    """The shape of one packed row.

    Attributes:
        end: Where the subtree that the token heads ends: k < end[k] <= T.
        position: Depth of the token in its own sequence, 0 at a root.
        runs: The nodes, in the order of the row; plain integers, on the host.
        table: `runs` as a tensor [runs, 3] on the CPU, which custom ops can take.
    """

    end: Int64[Tensor, " tokens"]
    position: Int64[Tensor, " tokens"]
    runs: tuple[Run, ...]
    table: Int64[Tensor, "runs 3"] = field(init=False, repr=False)

    @property
    def T(self) -> int:  # noqa: N802 a size, as everywhere
        """Packed tokens."""
        return self.end.shape[0]

    def __post_init__(self):
        table = torch.tensor(self.runs, dtype=torch.int64, device="cpu").view(-1, 3)
        object.__setattr__(self, "table", table)

    @classmethod
    def of(cls, parent: Int64[Tensor, " tokens"]) -> "Tree":
        """The tree in which the token before k in its sequence is `parent[k]`, -1 at a root.

        Args:
            parent: Packed in depth-first order: the children of a token follow it one after
                another, each with all its descendants. Read on the host: a GPU waits.

        Returns:
            The tree, on the device of `parent`.

        Raises:
            ValueError: If `parent` is not 1-D or not in depth-first order.
            TypeError: If it is not int64.

        Example:
            >>> tree = Tree.of(torch.tensor([-1, 0, 1, 1]))  # a prompt of two, two answers of one
            >>> tree.end.tolist(), tree.position.tolist()
            ([4, 4, 3, 4], [0, 1, 2, 2])
            >>> tree.runs[0]
            Run(start=0, stop=2, end=4)
        """
        if parent.ndim != 1:
            raise ValueError(
                f"`parent` must be 1-D, got shape {tuple(parent.shape)}; call `.flatten()`."
            )
        check_dtype("parent", parent, torch.int64)
        before, T = parent.detach().cpu(), parent.shape[0]
        place = torch.arange(T)
        wrong = (before < -1) | (before >= place)
        if wrong.any():
            k = int(wrong.nonzero()[0])
            raise ValueError(
                f"`parent[{k}]` must be in -1..{k - 1}, a token before it in the row, "
                f"got {int(before[k])}; pack parents before children."
            )
        n_children = torch.bincount(before + 1, minlength=T + 1)
        # token k goes on with the run of k - 1 where it is the only child of k - 1
        starts = (before != place - 1) | (n_children[:-1] > 1)
        starts[:1] = True
        bounds = [*starts.nonzero().flatten().tolist(), T]
        return cls._of_runs(bounds, before[starts].tolist(), T).to(parent.device)

    @classmethod
    def _of_runs(cls, bounds: list[int], parents: list[int], T: int) -> "Tree":
        """Close every run where the first token comes that does not descend from it."""
        spans = list(itertools.pairwise(bounds)) if T else []
        ends, first = [T] * len(spans), [0] * len(spans)
        path: list[int] = []
        for i, ((start, _), above) in enumerate(zip(spans, parents, strict=True)):
            while path and spans[path[-1]][1] - 1 != above:
                ends[path.pop()] = start
            if path:
                head, stop = spans[path[-1]]
                first[i] = first[path[-1]] + stop - head
            elif above != -1:
                raise ValueError(
                    f"`parent[{start}]` must be token {start - 1}, one of its ancestors or -1, "
                    f"got {above}, whose subtree has ended; pack each subtree in one stretch."
                )
            path.append(i)
        if not spans:
            nothing = torch.zeros(0, dtype=torch.int64)
            return cls(nothing, nothing, ())
        length = torch.tensor([stop - start for start, stop in spans])
        offset = torch.tensor(first) - torch.tensor(bounds[:-1])
        position = torch.arange(T) + offset.repeat_interleave(length)
        runs = tuple(Run(*span, end) for span, end in zip(spans, ends, strict=True))
        return cls(torch.tensor(ends).repeat_interleave(length), position, runs)

    @classmethod
    def chain(cls, lengths: Sequence[int]) -> "Tree":
        """Plain packing: sequences of these lengths side by side, nothing shared.

        Raises:
            ValueError: If a length is below 0; one of 0 is no sequence.

        Example:
            >>> Tree.chain([2, 1]).end.tolist()
            [2, 2, 3]
        """
        if any(length < 0 for length in lengths):
            raise ValueError(f"`lengths` must be at least 0, got {list(lengths)}.")
        kept = [length for length in lengths if length > 0]
        bounds = [0, *itertools.accumulate(kept)]
        return cls._of_runs(bounds, [-1] * len(kept), bounds[-1])

    def to(self, device: torch.device | str) -> "Tree":
        """The same tree with its tensors on `device`; itself where they are there already."""
        if self.end.device == torch.device(device):
            return self
        return replace(self, end=self.end.to(device), position=self.position.to(device))


def tree_mask(tree: Tree, window: int | None = None) -> Bool[Tensor, "T T"]:
    """Whether query q (row) sees key k (column); allocates [T, T], so for oracles and small rows.

    Args:
        tree: The packed row.
        window: Keys a query sees of its own sequence, itself among them; None for all.
    """
    place = torch.arange(tree.T, device=tree.end.device)
    seen = (place <= place[:, None]) & (place[:, None] < tree.end)
    if window is not None:
        seen &= tree.position[:, None] - tree.position < window
    return seen


class Rule(NamedTuple):
    """What a query of `tree_attention` sees of its ancestors, and how logits are made."""

    end: Tensor
    position: Tensor
    scale: float
    softcap: float | None
    window: int | None
