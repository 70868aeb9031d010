"""A tree's attention cut into rectangles of queries and keys, for a processor that likes those.

Every query has exactly one own part, with keys of its own run (or of a block of small subtrees),
and one cross part for every run above that its window still reaches.  Rectangles are slices of
the row: no index, no copy.  Leaves of one length are one batch.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

# both chosen by timing completions of 3 to 100 tokens and tries of 50 answers
SMALL = 128  # tokens of a masked block that subtrees too small for calls of their own share
SHORT = 16  # a leaf from here on has its own call
BAND = 128  # queries of a block along a window's edge; chosen


class Rule(NamedTuple):
    """What a query sees of its ancestors, and how logits are made."""

    end: Tensor
    position: Tensor
    scale: float
    softcap: float | None
    window: int | None


class Part(NamedTuple):
    """Queries row ... row + n_rows - 1 on keys col ... col + n_cols - 1, and copies further on.

    Copy i of `n` lies i * `step` rows and i * `col_step` keys behind. Of the rectangle, `kind`
    says what counts: all ("full"), the lower triangle ("causal"), 0 <= delta + i - j < window
    ("band": row i, column j) or what the tree says ("tree").
    """

    row: int
    n_rows: int
    col: int
    n_cols: int
    kind: str
    delta: int = 0
    n: int = 1
    step: int = 0
    col_step: int = 0
    is_own: bool = True


class Plan(NamedTuple):
    """Own parts cover each query once; cross parts are merged into them, in this order."""

    own: tuple[Part, ...]
    cross: tuple[Part, ...]

    @property
    def is_one_call(self) -> bool:
        """Whether one part is the whole row, in order."""
        return len(self.own) == 1 and not self.cross

    @property
    def own_is_square(self) -> bool:
        """Whether each key, too, is in one own part only."""
        return all((p.row, p.n_rows) == (p.col, p.n_cols) for p in self.own)

    @property
    def mixes(self) -> bool:
        """Whether a part holds queries and keys that are nothing to each other."""
        return any(part.kind == "tree" for part in self.own)


class _Node(NamedTuple):
    """A run, the position of its first token, and the last position of its subtree."""

    start: int
    stop: int
    end: int
    first: int
    last: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def is_leaf(self) -> bool:
        return self.stop == self.end

    def is_small(self, small: int) -> bool:
        """Whether the subtree is too small for calls of its own."""
        return self.end - self.start <= small and not (self.is_leaf and self.length >= SHORT)


def plan_of(table: Tensor, window: int | None, small: int = SMALL) -> Plan:
    """The plan of the runs in `table` [runs, 3]; kept, for the layers that follow ask again.

    Args:
        table: Start, stop and end of every run, on the CPU.
        window: Keys a query sees of its own sequence, itself among them; None for all.
        small: Tokens of a masked block; 0 for no block, and so no part that mixes branches.
    """
    return _plan(tuple(table.flatten().tolist()), window, small)


@functools.lru_cache(maxsize=32)
def _plan(flat: tuple[int, ...], window: int | None, small: int) -> Plan:
    nodes = _nodes(list(zip(flat[::3], flat[1::3], flat[2::3], strict=True)))
    width = nodes[-1].end if window is None else window
    own, alone = _own_parts(nodes, width, small)
    cross = [part for i in alone for part in _cross_parts(nodes, i, width)]
    return Plan(tuple(own), tuple(cross))


def _nodes(runs: list[tuple[int, int, int]]) -> list[_Node]:
    first, last, parent = [0] * len(runs), [0] * len(runs), [-1] * len(runs)
    path: list[int] = []
    for i, (start, stop, _) in enumerate(runs):
        while path and runs[path[-1]][2] <= start:
            path.pop()
        if path:
            parent[i] = path[-1]
            first[i] = last[path[-1]] + 1
        last[i] = first[i] + stop - start - 1
        path.append(i)
    for i in reversed(range(len(runs))):
        if parent[i] >= 0:
            last[parent[i]] = max(last[parent[i]], last[i])
    return [_Node(*runs[i], first[i], last[i]) for i in range(len(runs))]


def _own_parts(nodes: list[_Node], width: int, small: int) -> tuple[list[Part], list[int]]:
    """The own parts, and the nodes whose descendants have not seen them yet."""
    parts: list[Part] = []
    alone: list[int] = []
    i = 0
    while i < len(nodes):
        node, j = nodes[i], _block(nodes, i, small)
        if j > i + 1:
            size = max(x.end for x in nodes[i:j]) - node.start
            parts.append(Part(node.start, size, node.start, size, "tree"))
        else:
            j = i + 1
            while node.is_leaf and j < len(nodes) and _are_twins(node, nodes[j]):
                j += 1
            square = Part(node.start, node.length, node.start, node.length, "band")
            parts.extend(_trim(square._replace(n=j - i, step=node.length), width, node.length))
            if not node.is_leaf:
                alone.append(i)
        i = j
    return parts, alone


def _block(nodes: list[_Node], i: int, small: int) -> int:
    """The node behind the block of small subtrees that starts with node i; i if there is none."""
    j = i
    if nodes[i].is_leaf and i + 1 < len(nodes) and _are_twins(nodes[i], nodes[i + 1]):
        return i  # a batch wastes nothing
    while j < len(nodes) and nodes[j].is_small(small):
        if nodes[j].end - nodes[i].start > small:
            break
        end = nodes[j].end
        while j < len(nodes) and nodes[j].start < end:
            j += 1
    return j


def _are_twins(a: _Node, b: _Node) -> bool:
    return b.is_leaf and (a.length, a.first) == (b.length, b.first)


def _cross_parts(nodes: list[_Node], i: int, width: int) -> Iterator[Part]:
    """Node i's keys, before all that descends from it."""
    above = nodes[i]
    if above.last - above.first < width:
        yield Part(
            above.stop, above.end - above.stop, above.start, above.length, "full", is_own=False
        )
        return
    j = i + 1
    while j < len(nodes) and nodes[j].start < above.end:
        node, n = nodes[j], 1
        while node.is_leaf and j + n < len(nodes) and nodes[j + n].start < above.end:
            if not _are_twins(node, nodes[j + n]):
                break
            n += 1
        part = Part(node.start, node.length, above.start, above.length, "band", is_own=False)
        delta = node.first - above.first
        yield from _trim(part._replace(delta=delta, n=n, step=node.length), width, 0)
        j += n


def _trim(part: Part, width: int, col_step: int) -> Iterator[Part]:
    """A rectangle of two chains without the blocks that the window or the order hides."""
    part = part._replace(col_step=col_step)
    # the last query that still sees the last key
    n_rows = min(part.n_rows, width + part.n_cols - 1 - part.delta)
    if part.delta + part.n_rows - 1 < width:
        yield part._replace(kind="full" if part.delta >= part.n_cols else "causal")
        return
    for row in range(0, n_rows, BAND):
        height = min(BAND, n_rows - row)
        low = max(0, part.delta + row - width + 1)
        high = min(part.n_cols, part.delta + row + height)
        delta = part.delta + row - low
        size = high - low
        sees_all = delta >= size - 1 and delta + height - 1 < width
        yield part._replace(
            row=part.row + row,
            n_rows=height,
            col=part.col + low,
            n_cols=size,
            delta=delta,
            kind="full" if sees_all else "band",
        )
