"""Prompts as a trainer hands them to rewards, to the token ids that the policy was given.

TRL tells a reward function the text or messages of a prompt, not its ids, so they are made here as
TRL makes them: messages by the chat template with `add_generation_prompt`, text by the tokenizer
with its special tokens. Ids that come with the call are taken as they are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

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
