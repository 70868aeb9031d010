"""Pairs to packed rows under a token budget: every prefix once per row, and back to input order.

T packed tokens, S scored tokens and R hidden rows that predict, of one row.

    prompt -> first answer -> its end            one row, depth first: tree, ids, parent
                           -> another end        scored token s: `target[s]`, predicted by the
           -> second answer                      hidden row `source[rows[s]]`, `output_index[s]`

The trie. A sequence is what a model reads to score a pair: the prompt, then the completion without
its last token. Sequences are sorted by their ids; one that is the beginning of another (a
duplicate, too) is read off that other one. What is left are the leaves of a trie in depth-first
order, and the trie is one number per leaf: how many tokens it shares with the leaf before it.

A fork cuts the run of tokens above it, and a short run wastes a tile of the attention. So a run
that several leaves share has at least `min_shared` tokens or holds the end of their common
prompt; a shorter one is repeated in each branch, where a longer run may begin with it.

The rows. A budget cuts a trie between leaves, and each part repeats the ancestors that it needs.
There is no padding: a row is as long as its tokens.
"""

import struct
import sys
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from sharpen_kernels.tree import Tree

from .pairs import Pair, token_starts


class Leaf(NamedTuple):
    """One sequence of a trie.

    Attributes:
        pair: A pair that this is the sequence of.
        length: Its tokens: those of the prompt and the completion, less one.
        shared: How many of them it shares with the leaf before; 0 where a new tree begins.
        scored: The pairs whose sequence it begins with, shortest first; `pair` is the last.
    """

    pair: int
    length: int
    shared: int
    scored: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class PackedRow:
    """Some tries side by side, and where their scored tokens are.

    Attributes:
        ids: Token ids.
        tree: End of subtree, position and runs of the tokens.
        parent: The token before each in its sequence, -1 at a root.
        source: The tokens whose hidden rows predict something, ascending.
        rows: Which of `source` predicts each scored token; those of a completion are together.
        target: The id of each scored token.
        output_index: Where each scored token stands in input order; stays on the CPU.
    """

    ids: Int64[Tensor, " T"]
    tree: Tree
    parent: Int64[Tensor, " T"]
    source: Int64[Tensor, " R"]
    rows: Int64[Tensor, " S"]
    target: Int64[Tensor, " S"]
    output_index: Int64[Tensor, " S"]

    def to(self, device: torch.device) -> "PackedRow":
        """The same row on `device`; `output_index` stays where it is."""
        moved = {name: x.to(device) for name, x in vars(self).items() if name != "output_index"}
        return replace(self, **moved)


@dataclass(frozen=True, eq=False)
class Plan:
    """The rows that score every completion token of `pairs` once; a row is built when asked for.

    Attributes:
        pairs: What was planned; not copied, so not to be changed.
        leaves: Their tries.
        parts: The stretches of `leaves` in each row; the first leaf of a stretch shares nothing.
        starts: Where the tokens of each completion start in input order, then their number.
        naive: Tokens read if every pair is read alone.
        packed: Tokens of all rows.
    """

    pairs: Sequence[Pair]
    leaves: list[Leaf]
    parts: list[list[range]]
    starts: list[int]
    naive: int
    packed: int

    @property
    def shares(self) -> bool:
        """Whether two pairs have a run of tokens in common that a tree reads once."""
        return any(leaf.shared > 0 or len(leaf.scored) > 1 for leaf in self.leaves)

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[PackedRow]:
        return map(self._row, self.parts)

    def __getitem__(self, index: int) -> PackedRow:
        return self._row(self.parts[index])

    def _row(self, parts: list[range]) -> PackedRow:
        ids, parent, row, target, output = [], [], [], [], []
        for part in parts:
            path: list[int] = []
            for n in part:
                leaf = self.leaves[n]
                prompt, completion = self.pairs[leaf.pair]
                # a part begins with an empty path, so it repeats what its first leaf shares
                del path[leaf.shared :]
                first = len(ids)
                ids += (prompt + completion[:-1])[len(path) :]
                own = range(first, len(ids))
                parent += [path[-1] if path else -1, *own[:-1]]
                path += own
                for i in leaf.scored:
                    prompt, completion = self.pairs[i]
                    row += path[len(prompt) - 1 : len(prompt) - 1 + len(completion)]
                    target += completion
                    output += range(self.starts[i], self.starts[i + 1])
        parent_T = _tensor(parent)
        source_R, rows_S = _tensor(row).unique(return_inverse=True)
        return PackedRow(
            ids=_tensor(ids),
            tree=Tree.of(parent_T),
            parent=parent_T,
            source=source_R,
            rows=rows_S,
            target=_tensor(target),
            output_index=_tensor(output),
        )


def plan(
    pairs: Sequence[Pair],
    max_tokens: int,
    *,
    boundary: int | None = None,
    min_shared: int = 8,
) -> Plan:
    """Rows of at most `max_tokens` tokens that score every completion token of `pairs` once.

    The rows follow from the ids and the budget; permuting `pairs` permutes `output_index` alone.
    The first row is the longest there is. An empty completion has nothing to score and is in no
    row.

    Args:
        pairs: Prompt and completion ids; the prompt has at least one.
        max_tokens: Budget of one row. A sequence above it gets a row of its own.
        boundary: Sequences of up to so many tokens and longer ones never share a row.
        min_shared: Tokens that two sequences must have in common to share them, beyond the fork
            before, at least 1; completions of one prompt share the prompt whatever its length,
            and a sequence that begins another one is read off it. The default was chosen,
            not measured.

    Example:
        >>> (row,) = plan([([1, 2], [3, 4]), ([1, 2], [5])], max_tokens=100)
        >>> row.ids.tolist(), row.source.tolist(), row.target.tolist()
        ([1, 2, 3], [1, 2], [5, 3, 4])
        >>> row.rows.tolist(), row.output_index.tolist()
        ([0, 0, 1], [2, 0, 1])
    """
    lengths = [len(prompt) + len(c) - 1 if c else 0 for prompt, c in pairs]
    limit = max(lengths, default=0) if boundary is None else boundary
    long = [i for i, length in enumerate(lengths) if length > limit]
    short = [i for i, length in enumerate(lengths) if 0 < length <= limit]
    leaves: list[Leaf] = []
    rows: list[list[range]] = []
    sizes: dict[range, int] = {}
    for chosen in (long, short):
        first = len(leaves)
        leaves += build_trie(pairs, chosen, min_shared=min_shared)
        parts = _parts(leaves, first, max_tokens)
        rows += _fill(parts, max_tokens)
        sizes |= parts
    rows.sort(key=lambda row: -sum(sizes[part] for part in row))
    return Plan(pairs, leaves, rows, token_starts(pairs), sum(lengths), sum(sizes.values()))


def _tensor(x: list[int]) -> Int64[Tensor, " _"]:
    # torch.tensor(x) reads a list about ten times slower
    return torch.from_numpy(np.fromiter(x, np.int64, len(x)))


def _parts(leaves: list[Leaf], first: int, max_tokens: int) -> dict[range, int]:
    """Stretches of the leaves from `first` on that fit a row each, and their tokens."""
    bounds = [n for n in range(first, len(leaves)) if leaves[n].shared == 0]
    sizes: dict[range, int] = {}
    for start, stop in pairwise([*bounds, len(leaves)]):
        size = sum(leaf.length - leaf.shared for leaf in leaves[start:stop])
        if size <= max_tokens or stop - start == 1:
            sizes[range(start, stop)] = size
        else:
            sizes |= _split(leaves, range(start, stop), max_tokens)
    return sizes


def _split(leaves: list[Leaf], whole: range, max_tokens: int) -> dict[range, int]:
    """One trie in parts that fit, repeating as few tokens as possible, then in as few parts.

    Dynamic programming over the first leaf of the last part: which leaves that can be, for a last
    leaf, is a window that only moves forward, so its best is kept in a monotone queue.
    """
    # tokens of the whole trie up to and with each leaf
    tokens = list(accumulate(leaves[n].length - leaves[n].shared for n in whole))

    def size(a: int, b: int) -> int:
        """Tokens of the part of leaves a ... b - 1."""
        return leaves[whole[a]].length + tokens[b - 1] - tokens[a]

    best = [(0, 0)]  # (tokens repeated, parts) of the first leaves, up to each
    came = [0]
    queue: deque[tuple[tuple[int, int], int]] = deque()
    for b in range(1, len(whole) + 1):
        repeated, parts = best[b - 1]
        cost = (repeated + (leaves[whole[b - 1]].shared if b > 1 else 0), parts + 1)
        while queue and queue[-1][0] > cost:
            queue.pop()
        queue.append((cost, b - 1))
        while queue[0][1] < b - 1 and size(queue[0][1], b) > max_tokens:
            queue.popleft()
        best.append(queue[0][0])
        came.append(queue[0][1])
    cuts = [len(whole)]
    while cuts[-1] > 0:
        cuts.append(came[cuts[-1]])
    cuts.reverse()
    return {whole[a:b]: size(a, b) for a, b in pairwise(cuts)}


def _fill(sizes: dict[range, int], max_tokens: int) -> list[list[range]]:
    """Rows of parts: largest first, each into the row that it fills best."""
    rows: list[list[range]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for part, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0].start)):
        found = bisect_left(free, (size, 0))
        left, row = free.pop(found) if found < len(free) else (max_tokens, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(part)
        if left > size:
            insort(free, (left - size, row))
    return [sorted(row, key=lambda part: part.start) for row in rows]


def build_trie(pairs: Sequence[Pair], chosen: Sequence[int], *, min_shared: int) -> list[Leaf]:
    """The leaves of the trie of some pairs, depth first.

    Args:
        pairs: Prompt and completion ids, in [0, 2**32).
        chosen: Indices of the pairs to take; their completions have at least one token.
        min_shared: Tokens that a shared run must have, at least 1, unless a prompt ends in it.
    """
    scored: list[list[int]] = []
    common: list[int] = []
    before = (b"", b"")
    for stem, members in _prompt_groups(pairs, chosen):
        readers: list[int] = []
        for k, (tail, *_, i) in enumerate(members):
            readers.append(i)
            if k + 1 < len(members) and members[k + 1][0].startswith(tail):
                continue
            if stem == before[0]:
                common.append(len(stem) // 4 + _agree(before[1], tail))
            else:
                common.append(_agree(before[0], stem))
            scored.append(readers)
            readers, before = [], (stem, tail)
    own = [pairs[readers[-1]] for readers in scored]
    order, shared = _cut(common, [len(prompt) for prompt, _ in own], min_shared)
    lengths = [len(prompt) + len(completion) - 1 for prompt, completion in own]
    return [
        Leaf(scored[k][-1], lengths[k], overlap, tuple(scored[k]))
        for k, overlap in zip(order, shared, strict=True)
    ]


def _prompt_groups(
    pairs: Sequence[Pair], chosen: Sequence[int]
) -> Iterator[tuple[bytes, list[tuple[bytes, int, int, int]]]]:
    """Sequences in order of their ids, as (stem, members).

    A stem is a prompt that begins with no other prompt, so sequences of two stems differ before
    either stem ends, and a prompt is compared once and not once per completion. A member is
    (tail, tokens of the prompt, last id of the completion, pair): ties go by content.
    """
    # the list is kept beside its id(), or another list could get the same one
    seen: dict[int, tuple[list[int], bytes]] = {}
    for i in chosen:
        prompt = pairs[i][0]
        if id(prompt) not in seen:
            seen[id(prompt)] = (prompt, _key(prompt))
    stem_of: dict[bytes, bytes] = {}
    stem = None
    for key in sorted({key for _, key in seen.values()}):
        if stem is None or not key.startswith(stem):
            stem = key
        stem_of[key] = stem
    groups: dict[bytes, list[tuple[bytes, int, int, int]]] = {s: [] for s in stem_of.values()}
    for i in chosen:
        prompt, completion = pairs[i]
        key = seen[id(prompt)][1]
        stem = stem_of[key]
        tail = key[len(stem) :] + _key(completion[:-1])
        groups[stem].append((tail, len(prompt), completion[-1], i))
    for stem, members in groups.items():
        yield stem, sorted(members)


def _key(ids: list[int]) -> bytes:
    """Four bytes per id, most significant first: sorts as the ids do."""
    return struct.pack(f">{len(ids)}I", *ids)


def _agree(a: bytes, b: bytes) -> int:
    """How many ids two keys have in common before they differ."""
    n = min(len(a), len(b))
    # one long integer each: the highest bit that differs lies in the first id that does
    differ = int.from_bytes(a[:n], "big") ^ int.from_bytes(b[:n], "big")
    return (8 * n - differ.bit_length()) // 32


def _cut(common: list[int], prompts: list[int], min_shared: int) -> tuple[list[int], list[int]]:
    """Order of the leaves, and what each shares with the one before it in that order.

    Args:
        common: Tokens that leaf k has in common with leaf k - 1.
        prompts: Tokens of the prompt of each leaf.
        min_shared: See `build_trie`.
    """
    order: list[int] = []
    shared: list[int] = []
    # leaves, what each has in common with the one before, where the run of all of them begins,
    # what the first shares with the last leaf before them
    stack = [(list(range(len(common))), common, 0, 0)] if common else []
    while stack:
        leaves, joins, start, overlap = stack.pop()
        if len(leaves) == 1:
            order += leaves
            shared.append(overlap)
            continue
        fork = min(joins[1:])
        ending = [prompts[k] if start < prompts[k] <= fork else 0 for k in leaves]
        together = len(set(ending)) == 1
        if fork - start >= min_shared or (together and ending[0]):
            depth, parts = fork, _branches(leaves, joins, fork)
        elif together:
            depth, parts = start, _branches(leaves, joins, fork)
        else:
            # a prompt that ends in too short a run leaves it with its own completions
            depth, parts = start, _sort_out(leaves, joins, ending)
        # the last part first: a stack
        for n, (part, inner) in reversed(list(enumerate(parts))):
            stack.append((part, inner, depth, depth if n else overlap))
    return order, shared


def _branches(leaves: list[int], joins: list[int], fork: int) -> list[tuple[list[int], list[int]]]:
    """The branches of a fork, each with its leaves and their joins."""
    bounds = [0, *(n for n in range(1, len(joins)) if joins[n] == fork), len(leaves)]
    return [(leaves[a:b], joins[a:b]) for a, b in pairwise(bounds)]


def _sort_out(
    leaves: list[int], joins: list[int], keys: list[int]
) -> list[tuple[list[int], list[int]]]:
    """The leaves of each key, in order, with their joins across what was between them."""
    parts: dict[int, tuple[list[int], list[int]]] = {key: ([], []) for key in sorted(set(keys))}
    lowest = dict.fromkeys(parts, sys.maxsize)
    for leaf, join, own in zip(leaves, joins, keys, strict=True):
        for key in parts:
            lowest[key] = min(lowest[key], join)
        parts[own][0].append(leaf)
        parts[own][1].append(lowest[own])
        lowest[own] = sys.maxsize
    return list(parts.values())
