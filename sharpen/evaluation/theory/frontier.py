"""The tree of prefixes of a best-first search: what is open, what is finished, what can still win.

A heap holds one entry per expanded prefix, for its best child that was not yet taken; children are
sorted once, so a large vocabulary costs one array a prefix and no heap of its own.

B prefixes, V vocabulary. Log-probabilities are nats.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float64
from torch import Tensor

Ids = tuple[int, ...]


@dataclass(frozen=True)
class _Node:
    """An expanded prefix and its children, most probable first."""

    ids: Ids
    tokens: np.ndarray
    logprobs: np.ndarray


@dataclass
class Tree:
    """Prefixes from the empty one on.

    Attributes:
        eos_ids: Tokens that finish a sequence.
        depth: A sequence of so many tokens without EOS is cut.
        gamma: See `SearchConfig`, as the next two.
        above: Or None.
        tolerance: In nats.
        finished_mass: Probability of all finished sequences met.
        cut_mass: Probability of all cut sequences met.
        cut_bound: Largest log-prob of a cut sequence met.
    """

    eos_ids: Ids
    depth: int
    gamma: float
    above: float | None
    tolerance: float
    finished_mass: float = 0.0
    cut_mass: float = 0.0
    cut_bound: float = -math.inf
    _heap: list[tuple[float, int, int]] = field(default_factory=list)
    _nodes: list[_Node] = field(default_factory=list)
    _finished: list[tuple[float, Ids]] = field(default_factory=list)
    # the two best finished log-probs, ascending
    _best_two: tuple[float, float] = (-math.inf, -math.inf)
    # log-prob of each prefix that was handed out
    _out: dict[Ids, float] = field(default_factory=lambda: {(): 0.0})
    # the next prefix of the greedy dive; None once it has ended
    _dive: Ids | None = ()
    _lost: float = -math.inf

    @property
    def level(self) -> float:
        """Log-prob from which on sequences are listed; it only rises."""
        second, best = self._best_two
        asked = math.inf if self.above is None else self.above
        return min(second, best + math.log1p(-self.gamma), asked)

    @property
    def _floor(self) -> float:
        return self.level - self.tolerance

    @property
    def _open(self) -> float:
        """Largest log-prob of a prefix that waits."""
        waiting = -self._heap[0][0] if self._heap else -math.inf
        return waiting if self._dive is None else max(waiting, self._out[self._dive])

    @property
    def bound(self) -> float:
        """No sequence outside `listed` has a larger log-prob."""
        return max(self._open, self._lost, self._floor)

    @property
    def complete(self) -> bool:
        """Whether `listed` holds every sequence from `level` on."""
        return max(self._open, self._lost) <= self._floor

    def listed(self) -> dict[Ids, float]:
        """Log-probs of the finished sequences from `tolerance` below `level` on."""
        return {ids: logprob for logprob, ids in self._finished if logprob >= self._floor}

    def take(self, n: int) -> list[Ids]:
        """Up to `n` prefixes to expand next, best first; none when the search is over.

        They are the caller's until `grow`.
        """
        if n < 1:
            return []
        if self._dive is not None and self._out[self._dive] > self._floor:
            return [self._dive]
        self._dive = None
        taken = []
        while len(taken) < n and self._heap and self._open > self._floor:
            negative, index, rank = heapq.heappop(self._heap)
            node = self._nodes[index]
            ids = (*node.ids, int(node.tokens[rank]))
            self._out[ids] = -negative
            taken.append(ids)
            self._push(index, rank + 1)
        return taken

    def grow(self, prefixes: Sequence[Ids], logprobs: Float64[Tensor, "B V"]) -> None:
        """Take in the next-token log-probs of prefixes that `take` gave."""
        step_BV = logprobs.numpy()
        for ids, step_V in zip(prefixes, step_BV, strict=True):
            start = self._out.pop(ids)
            diving, self._dive = ids == self._dive, None
            if np.isnan(step_V).any():
                # nothing is known of what lies below: it may be as probable as the prefix
                self._lost = max(self._lost, start)
                continue
            # the bound of a prefix holds for its children even where rounding would lift one
            total_V = np.minimum(start + step_V, start)
            self._finish(ids, total_V)
            end = max(total_V[list(self.eos_ids)])
            total_V[list(self.eos_ids)] = -math.inf
            if len(ids) + 1 == self.depth:
                self.cut_mass += float(np.exp(total_V).sum())
                self.cut_bound = max(self.cut_bound, float(total_V.max()))
                continue
            (kept,) = np.nonzero(total_V > self._floor)
            # stable: of equals the smaller id
            order = kept[np.argsort(-total_V[kept], kind="stable")]
            self._nodes.append(_Node(ids, order, total_V[order]))
            if diving and len(order) and total_V[order[0]] > end:
                self._dive = (*ids, int(order[0]))
                self._out[self._dive] = float(total_V[order[0]])
            self._push(len(self._nodes) - 1, 0 if self._dive is None else 1)

    def _push(self, index: int, rank: int) -> None:
        logprob_C = self._nodes[index].logprobs
        if rank < len(logprob_C):
            heapq.heappush(self._heap, (-float(logprob_C[rank]), index, rank))

    def _finish(self, ids: Ids, total: np.ndarray) -> None:
        for eos in self.eos_ids:
            logprob = float(total[eos])
            if logprob == -math.inf:
                continue
            self.finished_mass += math.exp(logprob)
            self._best_two = tuple(sorted((*self._best_two, logprob))[1:])  # pyright: ignore[reportAttributeAccessIssue]
            if logprob >= self._floor:
                self._finished.append((logprob, (*ids, eos)))
