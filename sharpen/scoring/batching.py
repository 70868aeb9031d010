"""Ragged (prompt, completion) pairs to right-padded batches under a token budget, and back.

S scored tokens, B sequences and L padded length of one batch.

A sequence is the prompt followed by the completion without its last token: hidden row t
predicts token t + 1, so the last token is predicted and never read. Each row is padded on the
right with its own last id: a causal model never sees it from the tokens that count, and a model
whose embedding of some id is NaN keeps the NaN to the rows that use that id.

The plan depends on the lengths and the budget alone, and every scored token carries its place
in input order, so the inverse is exact whatever the plan.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from .pairs import Pair


@dataclass(frozen=True, eq=False)
class Batch:
    """Some sequences, padded, and where their scored tokens are.

    Attributes:
        ids: Token ids, each row filled up with its own last id.
        mask: 1 on tokens, 0 on padding.
        rows: Which row of the hidden states, flattened to [B * L, D], predicts each scored token.
        target: The id of each scored token.
        place: Where each scored token stands in input order.
    """

    ids: Int64[Tensor, "B L"]
    mask: Int64[Tensor, "B L"]
    rows: Int64[Tensor, " S"]
    target: Int64[Tensor, " S"]
    place: Int64[Tensor, " S"]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; `place` stays where it is."""
        return Batch(
            self.ids.to(device),
            self.mask.to(device),
            self.rows.to(device),
            self.target.to(device),
            self.place,
        )


def plan_batches(
    lengths: Sequence[int], max_tokens: int, *, boundary: int | None = None
) -> list[list[int]]:
    """Indices of `lengths` grouped so that rows x longest of a group is at most `max_tokens`.

    Longest first, so that the batch that needs the most memory comes first; ties by index. A
    length above the budget gets a group of its own. A length of 0 is left out.

    Args:
        lengths: Tokens of each sequence.
        max_tokens: Budget of one group, in padded tokens.
        boundary: Lengths up to it and lengths above it never share a group.
    """
    order = sorted((i for i, n in enumerate(lengths) if n > 0), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    for i in order:
        longest = lengths[groups[-1][0]] if groups else 0
        crosses = boundary is not None and lengths[i] <= boundary < longest
        if groups and not crosses and (len(groups[-1]) + 1) * longest <= max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def make_batches(
    pairs: Sequence[Pair], max_tokens: int, *, boundary: int | None = None
) -> Iterator[Batch]:
    """The batches that score every completion token of `pairs` once, on the CPU.

    An empty completion has nothing to score and is in no batch.
    """
    sizes = [len(completion) for _, completion in pairs]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    lengths = [
        len(prompt) + size - 1 if size else 0
        for (prompt, _), size in zip(pairs, sizes, strict=True)
    ]
    for group in plan_batches(lengths, max_tokens, boundary=boundary):
        yield _pad([pairs[i] for i in group], [starts[i] for i in group])


def _pad(pairs: list[Pair], starts: list[int]) -> Batch:
    L = max(len(prompt) + len(completion) - 1 for prompt, completion in pairs)
    ids, mask, rows, target, place = [], [], [], [], []
    for b, ((prompt, completion), start) in enumerate(zip(pairs, starts, strict=True)):
        sequence = prompt + completion[:-1]
        padding = L - len(sequence)
        ids.append(sequence + [sequence[-1]] * padding)
        mask.append([1] * len(sequence) + [0] * padding)
        first = b * L + len(prompt) - 1
        rows.extend(range(first, first + len(completion)))
        target.extend(completion)
        place.extend(range(start, start + len(completion)))
    return Batch(*(torch.tensor(x, dtype=torch.int64) for x in (ids, mask, rows, target, place)))


def inverse_of(places: Sequence[Int64[Tensor, " _"]]) -> Int64[Tensor, " S"]:
    """The index that puts the scored tokens of all batches, end to end, into input order."""
    if not places:
        return torch.zeros(0, dtype=torch.int64)
    place_S = torch.cat(list(places))
    inverse_S = torch.empty_like(place_S)
    inverse_S[place_S] = torch.arange(len(place_S))
    return inverse_S
