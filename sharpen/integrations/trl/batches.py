"""Prompts as a trainer hands them to rewards, to the token ids that the policy was given.

TRL tells a reward function the text or messages of a prompt, not its ids, so they are made here as
TRL makes them: messages by the chat template with `add_generation_prompt`, text by the tokenizer
with its special tokens. Ids that come with the call are taken as they are.

A padded batch with labels, as trainers build it, to prompts and completions, and back.

B sequences, L padded length, S labels that are scored.

A row holds padding on either side of one run of tokens. What stands before its first scored label
is its prompt, what follows up to the last one its completion; labels in between may be left out.

Completions end to end to groups of one prompt, and group statistics of their rewards.

N completions, P groups.

Reference log-probs that come with the data of a DPOTrainer, instead of a reference model.

TRL's collator carries the columns `ref_chosen_logps` and `ref_rejected_logps` (nats, summed over a
completion) into each batch, and TRL 1.15 and 1.16 read them there only where
`precompute_ref_logps` is set, which its own option sets and then fails on data that has the columns
already. So it is set here, on the finished trainer: an attribute that TRL names without underscore.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from sharpen.errors import InputError

# of a rollout's extra fields, or of the data
NAMES = ("prompt_ids", "prompt_token_ids")


# text, messages, and what a tokenizer or template takes
def prompt_tokens(
    prompts: Sequence[Any], tokenizer: Any, template_options: Mapping[str, Any]
) -> list[list[int]]:
    """Token ids of each prompt.

    Args:
        prompts: Text, or lists of messages with "role" and "content".
        tokenizer: The trainer's `processing_class`.
        template_options: What the trainer's template is called with beside the messages.

    Raises:
        InputError: If there is no tokenizer, a prompt is neither, or a message holds an image.
    """
    if tokenizer is None:
        raise InputError(
            "prompts need a tokenizer, got none; pass `tokenizer=`, or the reward as a callback."
        )
    if all(isinstance(prompt, str) for prompt in prompts):
        return [list(ids) for ids in tokenizer(text=list(prompts))["input_ids"]]
    for prompt in prompts:
        _check_messages(prompt)
    found = tokenizer.apply_chat_template(
        conversation=list(prompts),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **template_options,
    )
    return [list(ids) for ids in found["input_ids"]]


def _check_messages(prompt: Any) -> None:
    is_messages = isinstance(prompt, list) and all(
        isinstance(message, Mapping) and "role" in message for message in prompt
    )
    if not is_messages:
        raise InputError(
            f"`prompts` must all be text or all lists of messages, got {type(prompt).__name__}."
        )
    for message in prompt:
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        if any(part.get("type") not in (None, "text") for part in parts):
            raise InputError("`prompts` must be text alone, got a message with an image or more.")


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


# added to a group's deviation, as TRL does for its advantages
EPSILON = 1e-4


# prompts are texts, messages or ids
def group_sizes(prompts: Sequence[Any]) -> list[int]:
    """How many equal prompts follow one another, each time.

    Example:
        >>> group_sizes(["a", "a", "b", "a"])
        [2, 1, 1]
    """
    return [len(list(run)) for _, run in groupby(prompts)]


def cut(values: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    """`values` in groups of these sizes.

    Example:
        >>> cut([1, 2, 3], [2, 1])
        [[1, 2], [3]]
    """
    rest = iter(values)
    return [[next(rest) for _ in range(size)] for size in sizes]


def normalised(
    reward: Float32[Tensor, " N"], groups: Int64[Tensor, " bounds"]
) -> Float32[Tensor, " N"]:
    """Rewards less their group's mean, over its deviation (of a sample: over n - 1).

    Those that are not finite stay as they are and count in no group. A group of one is 0.

    Args:
        reward: Of all groups end to end.
        groups: Where each group starts, then N.

    Example:
        >>> normalised(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 2, 3]))
        tensor([-0.7071,  0.7071,  0.0000])
    """
    return torch.cat([_standard(part) for part in reward.split(groups.diff().tolist())])


def group_deviation(reward: Float32[Tensor, " N"], groups: Int64[Tensor, " bounds"]) -> float:
    """The mean over groups of their deviation; what a group-relative loss can learn from."""
    parts = [part[part.isfinite()] for part in reward.split(groups.diff().tolist())]
    stds = [part.std().item() for part in parts if len(part) > 1]
    return sum(stds) / len(stds) if stds else 0.0


def _standard(reward: Tensor) -> Tensor:
    finite = reward[reward.isfinite()]
    if len(finite) == 0:
        return reward
    std = finite.std() if len(finite) > 1 else torch.tensor(0.0)
    return (reward - finite.mean()) / (std + EPSILON)


COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


def use_reference_columns(trainer: Any, *, optional: bool = False) -> bool:
    """Let a finished `DPOTrainer` read its reference from the columns of its data.

    A reference model that the trainer holds is let go: its memory is free for the first step. In
    evaluation the same columns are read, so every evaluation set must have them.

    Args:
        trainer: A `trl.DPOTrainer` after its construction.
        optional: Do nothing where no set has the columns.

    Returns:
        Whether the columns are used.

    Raises:
        InputError: If a set lacks a column, or the reference is not fixed (`sync_ref_model`).
    """
    sets = {"train_dataset": trainer.train_dataset}
    own = trainer.eval_dataset
    sets |= own if isinstance(own, dict) else {"eval_dataset": own}
    names = {name: _names(data) for name, data in sets.items() if data is not None}
    # the trainer has computed them itself
    if trainer.precompute_ref_logps and optional:
        return False
    if optional and not any(set(COLUMNS) & found for found in names.values()):
        return False
    for name, found in names.items():
        missing = [column for column in COLUMNS if column not in found]
        if missing:
            raise InputError(
                f"`{name}` must have the columns {' and '.join(COLUMNS)}, got none called "
                f"{missing[0]}; add both to every set, or to none."
            )
    if trainer.args.sync_ref_model:
        raise InputError(
            "`sync_ref_model` must be False with reference columns, got True: they are of one "
            "fixed model."
        )
    trainer.precompute_ref_logps = True
    trainer.ref_model = None
    return True


def _names(data: Any) -> set[str]:
    return set(data.column_names or next(iter(data)))
