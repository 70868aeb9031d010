"""Which sequences share which beginnings: a token trie, flattened to its leaves.

A sequence is what a model reads to score a pair: the prompt, then the completion without its last
token. Sequences are sorted by their ids; one that is the beginning of another (a duplicate, too)
is read off that other one. What is left are the leaves of a trie in depth-first order, and the
trie is one number per leaf: how many tokens it shares with the leaf before it.

A fork cuts the run of tokens above it, and a short run wastes a tile of the attention. So a run
that several leaves share has at least `min_shared` tokens or holds the end of their common
prompt; a shorter one is repeated in each branch, where a longer run may begin with it.

The leaves, their order and their cuts follow from the ids alone, not from the order of the pairs.
"""

import struct
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from .pairs import Pair


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
    for stem, members in _families(pairs, chosen):
        riders: list[int] = []
        for k, (tail, *_, i) in enumerate(members):
            riders.append(i)
            if k + 1 < len(members) and members[k + 1][0].startswith(tail):
                continue
            if stem == before[0]:
                common.append(len(stem) // 4 + _agree(before[1], tail))
            else:
                common.append(_agree(before[0], stem))
            scored.append(riders)
            riders, before = [], (stem, tail)
    own = [pairs[riders[-1]] for riders in scored]
    order, shared = _cut(common, [len(prompt) for prompt, _ in own], min_shared)
    lengths = [len(prompt) + len(completion) - 1 for prompt, completion in own]
    return [
        Leaf(scored[k][-1], lengths[k], overlap, tuple(scored[k]))
        for k, overlap in zip(order, shared, strict=True)
    ]


def _families(
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
    families: dict[bytes, list[tuple[bytes, int, int, int]]] = {s: [] for s in stem_of.values()}
    for i in chosen:
        prompt, completion = pairs[i]
        key = seen[id(prompt)][1]
        stem = stem_of[key]
        tail = key[len(stem) :] + _key(completion[:-1])
        families[stem].append((tail, len(prompt), completion[-1], i))
    for stem, members in families.items():
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
            depth, parts = fork, _split(leaves, joins, fork)
        elif together:
            depth, parts = start, _split(leaves, joins, fork)
        else:
            # a prompt that ends in too short a run leaves it with its own completions
            depth, parts = start, _sort_out(leaves, joins, ending)
        # the last part first: a stack
        for n, (part, inner) in reversed(list(enumerate(parts))):
            stack.append((part, inner, depth, depth if n else overlap))
    return order, shared


def _split(leaves: list[int], joins: list[int], fork: int) -> list[tuple[list[int], list[int]]]:
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
