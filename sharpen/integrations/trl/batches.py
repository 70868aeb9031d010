"""What a trainer hands to a reward function: token ids, log-probs that its sampler kept, groups.

    completion_tokens, given_prompt_tokens    ids that come with the call are taken as they are
    prompt_tokens                             the others are made as TRL makes them: messages by the
                                              chat template with `add_generation_prompt`, text by
                                              the tokenizer with its special tokens
    sampler_logprobs                          where they are all that a reward needs, no forward is
    group_sizes, cut                          equal prompts that follow one another
    normalised, group_deviation               rewards within their group

N completions, P groups.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from sharpen.errors import InputError

# of a rollout's extra fields, or of the data
PROMPT_IDS = ("prompt_ids", "prompt_token_ids")
# of a rollout's extra fields
LOGPROBS = ("completion_logprobs", "sampler_logprobs", "logprobs")
# added to a group's deviation, as TRL does for its advantages
EPSILON = 1e-4


def completion_tokens(completion_ids: Sequence[Sequence[int]] | None, N: int) -> list[list[int]]:
    """Token ids of each completion; they must come along."""
    if completion_ids is None:
        raise InputError(
            "`completion_ids` must come with the completions, got none; text that is tokenised "
            "again need not be the tokens that were sampled."
        )
    if len(completion_ids) != N:
        raise InputError(
            f"`completion_ids` must hold one list for each of {N} prompts, "
            f"got {len(completion_ids)}."
        )
    return [list(ids) for ids in completion_ids]


# whatever a trainer passes
def given_prompt_tokens(given: Mapping[str, Any], N: int) -> list[list[int]] | None:
    """Token ids of each prompt, where they came along: lists, or arrays and tensors."""
    for name in PROMPT_IDS:
        rows = given.get(name)
        # the truth of a tensor is an error, and an empty column says nothing
        if rows is None or len(rows) == 0:
            continue
        if len(rows) != N:
            raise InputError(
                f"`{name}` must hold one list for each of {N} completions, got {len(rows)}."
            )
        return [row.tolist() if hasattr(row, "tolist") else list(row) for row in rows]
    return None


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
    """Reject what is not messages of text."""
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


# whatever else a trainer passes to a reward
def sampler_logprobs(
    given: Mapping[str, Any], completion_ids: Sequence[Sequence[int]]
) -> list[list[float]] | None:
    """Nats of each token of each completion, NaN where the sampler has none; None if not given.

    Args:
        given: What the reward function was called with; the first of `LOGPROBS` counts.
        completion_ids: Token ids of each completion.

    Raises:
        InputError: If there is not one number for each token.

    Example:
        >>> sampler_logprobs({"completion_logprobs": [[-0.5, None]]}, [[7, 2]])
        [[-0.5, nan]]
    """
    name = next((name for name in LOGPROBS if given.get(name) is not None), None)
    if name is None:
        return None
    rows = given[name]
    if len(rows) != len(completion_ids):
        raise InputError(
            f"`{name}` must hold one list for each of {len(completion_ids)} completions, "
            f"got {len(rows)}."
        )
    found = []
    for i, (row, ids) in enumerate(zip(rows, completion_ids, strict=True)):
        row = [] if row is None else row
        numbers = all(x is None or isinstance(x, (int, float)) for x in row)
        if len(row) != len(ids) or not numbers:
            raise InputError(
                f"`{name}`[{i}] must hold one number or None for each of {len(ids)} tokens, got "
                f"{len(row) if numbers else 'lists'}; hand over those of the sampled tokens."
            )
        found.append([math.nan if x is None else float(x) for x in row])
    return found


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
    """Finite rewards of one group less their mean, over their deviation."""
    finite = reward[reward.isfinite()]
    if len(finite) == 0:
        return reward
    std = finite.std() if len(finite) > 1 else torch.tensor(0.0)
    return (reward - finite.mean()) / (std + EPSILON)
