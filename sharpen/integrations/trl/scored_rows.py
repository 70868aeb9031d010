"""A padded batch with labels, as trainers build it, to prompts and completions, and back.

B sequences, L padded length, S labels that are scored.

A row holds padding on either side of one run of tokens. What stands before its first scored label
is its prompt, what follows up to the last one its completion; labels in between may be left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from sharpen.errors import InputError

IGNORED = -100


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """What a scorer is given, and where its answers go.

    Attributes:
        prompts: Token ids before the first scored label of each row that has one.
        completions: Token ids from there to the last scored label; one a prompt.
        asked: Which completion tokens are scored labels, all completions end to end.
        place: Where each scored label stands in the labels [B, L - 1] that were shifted left by
            one, flattened, in the order of the tokens.
    """

    prompts: list[list[int]]
    completions: list[list[list[int]]]
    asked: Bool[Tensor, " tokens"]
    place: Int64[Tensor, " S"]


def scored_rows(
    ids: Int64[Tensor, "B L"],
    mask: Tensor | None,
    labels: Int64[Tensor, "B L"],
) -> ScoredRows:
    """The rows of a batch whose labels are its own ids, or -100 where none is scored.

    The first column predicts nothing and is predicted by nothing, as in every causal loss.

    Args:
        ids: Token ids, padded on the left, the right or both.
        mask: 1 on tokens, 0 on padding; None for no padding.
        labels: `ids`, or -100.

    Raises:
        InputError: If shapes disagree, padding stands between tokens, a label is another id or
            stands on padding, or the first token of a row that begins late is scored.
    """
    mask = torch.ones_like(ids) if mask is None else mask
    if not ids.shape == mask.shape == labels.shape or ids.ndim != 2:
        raise InputError(
            f"`input_ids`, `attention_mask` and `labels` must be of one shape [B, L], got "
            f"{tuple(ids.shape)}, {tuple(mask.shape)} and {tuple(labels.shape)}."
        )
    is_token_BL = mask.bool()
    is_asked_BL = labels != IGNORED
    is_asked_BL[:, :1] = False
    _check(ids, is_token_BL, labels, is_asked_BL)
    L = ids.shape[1]
    prompts, completions, asked, place = [], [], [], []
    tokens, kept = is_token_BL.tolist(), is_asked_BL.tolist()
    for b, row in enumerate(ids.tolist()):
        columns = [t for t, ask in enumerate(kept[b]) if ask]
        if not columns:
            continue
        begin, first, last = tokens[b].index(True), columns[0], columns[-1]
        if first == begin:
            raise InputError(
                f"`labels`[{b}] must begin after the first token of its row, got a scored label at "
                f"column {first}, which nothing predicts; begin the prompt with BOS or EOS."
            )
        prompts.append(row[begin:first])
        completions.append([row[first : last + 1]])
        asked += kept[b][first : last + 1]
        place += [b * (L - 1) + t - 1 for t in columns]
    return ScoredRows(
        prompts,
        completions,
        torch.tensor(asked, dtype=torch.bool),
        torch.tensor(place, dtype=torch.int64),
    )


def scattered(rows: ScoredRows, values: Tensor, shape: Sequence[int]) -> Tensor:
    """Values of all completion tokens [tokens] as [B, L - 1], 0 where none is scored.

    Differentiable, and of the dtype and device of `values`.
    """
    B, L = shape
    asked_S = values[rows.asked.to(values.device)]
    place_S = rows.place.to(values.device)
    return values.new_zeros(B * (L - 1)).index_put((place_S,), asked_S).view(B, L - 1)


def _check(ids: Tensor, is_token: Tensor, labels: Tensor, is_asked: Tensor) -> None:
    edges_BL = is_token.long().diff(dim=1, prepend=is_token.new_zeros(len(ids), 1).long())
    if bool((edges_BL == 1).sum(dim=1).gt(1).any()):
        raise InputError(
            "`attention_mask` must mark one run of tokens a row, got padding between tokens; "
            "remove it, or leave the tokens there and their labels at -100."
        )
    if bool((is_asked & ~is_token).any()):
        raise InputError(
            "`labels` must be -100 on padding, got a scored label where `attention_mask` is 0."
        )
    if bool((is_asked & (labels != ids)).any()):
        raise InputError(
            "`labels` must be the ids of `input_ids` or -100, got other ids; they cannot be scored "
            "as a continuation."
        )
