"""What goes into the scorer: prompts with completions to checked (prompt, completion) pairs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sharpen.errors import InputError
from sharpen.limits import ModelLimits

if TYPE_CHECKING:
    import transformers

Pair = tuple[list[int], list[int]]


def pair_up(
    limits: ModelLimits,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
) -> list[Pair]:
    """One pair per completion, all prompts end to end.

    Raises:
        InputError: If there is not one list of completions per prompt, or the model cannot read a
            pair.
    """
    check_groups(prompts, completions)
    pairs = []
    for p, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        limits.check(f"prompts[{p}]", prompt)
        for g, completion in enumerate(group):
            # what scores the last token is read before it
            unread = min(1, len(completion))
            limits.check(f"completions[{p}][{g}]", prompt, completion, unread=unread)
            pairs.append((list(prompt), list(completion)))
    return pairs


def check_groups(prompts: Sequence[object], completions: Sequence[object]) -> None:
    """Refuse anything but one list of completions per prompt.

    Raises:
        InputError: If there are more or fewer.
    """
    if len(prompts) != len(completions):
        raise InputError(
            f"`completions` must hold one list for each of {len(prompts)} prompts, "
            f"got {len(completions)}; give an empty list to a prompt that has none."
        )


def encode_text(
    tokenizer: "transformers.PreTrainedTokenizerBase",
    prompts: Sequence[str],
    completions: Sequence[Sequence[str]],
    *,
    add_eos: bool,
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Token ids of prompts, with special tokens, and of completions, without.

    Raises:
        InputError: If an EOS is wanted and the tokenizer has none.
    """
    end = []
    if add_eos:
        if not isinstance(tokenizer.eos_token_id, int):
            raise InputError(
                "`add_eos` needs a tokenizer with one EOS token, got "
                f"{tokenizer.eos_token_id!r}; set its `eos_token`."
            )
        end = [tokenizer.eos_token_id]
    prompt_ids = [list(tokenizer.encode(text)) for text in prompts]
    completion_ids = [
        [list(tokenizer.encode(text, add_special_tokens=False)) + end for text in group]
        for group in completions
    ]
    return prompt_ids, completion_ids
