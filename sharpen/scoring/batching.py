"""Pairs to right-padded batches under a token budget, and what batches return to input order.

S scored tokens, B sequences and L padded length of one batch, R rows that predict.

A sequence is the prompt followed by the completion without its last token: hidden row t
predicts token t + 1, so the last token is predicted and never read. Each row is padded on the
right with its own last id: a causal model never sees it from the tokens that count, and a model
whose embedding of some id is NaN keeps the NaN to the rows that use that id.

The plan depends on the lengths and the budget alone, and every scored token carries its index in
input order, so the inverse is exact whatever the plan.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from .pairs import Pair, token_starts


@dataclass(frozen=True, eq=False)
class Batch:
    """Some sequences, padded, and where their scored tokens are.

    Attributes:
        ids: Token ids, each row filled up with its own last id.
        mask: 1 on tokens, 0 on padding.
        rows: Which row of the hidden states, flattened to [B * L, D], predicts each scored token.
        target: The id of each scored token.
        output_index: Where each scored token stands in input order.
    """

    ids: Int64[Tensor, "B L"]
    mask: Int64[Tensor, "B L"]
    rows: Int64[Tensor, " S"]
    target: Int64[Tensor, " S"]
    output_index: Int64[Tensor, " S"]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; `output_index` stays where it is."""
        moved = {name: x.to(device) for name, x in vars(self).items() if name != "output_index"}
        return replace(self, **moved)


class PredictorBatch(NamedTuple):
    """What one forward predicts some scored tokens from: hidden rows, or logits."""

    rows: Tensor  # [R, D] or [R, V]
    row_index: Tensor | None  # [S] the row that predicts each token; None: row s token s
    target: Tensor  # [S]
    output_index: Tensor  # [S] on the CPU: where each token stands in input order


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
    pairs: Sequence[Pair],
    max_tokens: int,
    *,
    chosen: Sequence[int] | None = None,
    boundary: int | None = None,
) -> Iterator[Batch]:
    """The batches that score every completion token of `pairs` once, on the CPU.

    An empty completion has nothing to score and is in no batch.

    Args:
        pairs: Prompt and completion ids.
        max_tokens: Budget of one batch, in padded tokens.
        chosen: Indices of the pairs to take, ascending; None for all.
        boundary: Sequences of up to so many tokens and longer ones never share a batch.
    """
    starts = token_starts(pairs)
    taken = range(len(pairs)) if chosen is None else chosen
    lengths = [len(pairs[i][0]) + len(pairs[i][1]) - 1 if pairs[i][1] else 0 for i in taken]
    for group in plan_batches(lengths, max_tokens, boundary=boundary):
        members = [taken[k] for k in group]
        yield _pad([pairs[i] for i in members], [starts[i] for i in members])


def inverse_of(places: Sequence[Int64[Tensor, " _"]]) -> Int64[Tensor, " S"]:
    """The index that puts the scored tokens of all batches, end to end, into input order."""
    if not places:
        return torch.zeros(0, dtype=torch.int64)
    output_S = torch.cat(list(places))
    inverse_S = torch.empty_like(output_S)
    inverse_S[output_S] = torch.arange(len(output_S))
    return inverse_S


def _pad(pairs: list[Pair], starts: list[int]) -> Batch:
    L = max(len(prompt) + len(completion) - 1 for prompt, completion in pairs)
    ids, mask, rows, target, output = [], [], [], [], []
    for b, ((prompt, completion), start) in enumerate(zip(pairs, starts, strict=True)):
        sequence = prompt + completion[:-1]
        padding = L - len(sequence)
        ids.append(sequence + [sequence[-1]] * padding)
        mask.append([1] * len(sequence) + [0] * padding)
        first = b * L + len(prompt) - 1
        rows.extend(range(first, first + len(completion)))
        target.extend(completion)
        output.extend(range(start, start + len(completion)))
    return Batch(*(torch.tensor(x, dtype=torch.int64) for x in (ids, mask, rows, target, output)))
