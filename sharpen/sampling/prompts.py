"""Prompts as a model reads them: chat template for messages, token ids for both forms."""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from sharpen.errors import InputError
from sharpen.records import PromptRecord

from .protocol import Prompt


def has_chat_template(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether there is a tokenizer that can render messages."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(record: PromptRecord, tokenizer: PreTrainedTokenizerBase | None) -> Prompt:
    """One prompt as text and ids; without a tokenizer as text alone.

    Text gets the tokenizer's special tokens (such as a leading BOS); messages get exactly what
    the chat template writes, up to where the assistant begins.

    Raises:
        InputError: If it holds messages and there is no tokenizer, or one without a chat template,
            or the template refuses them.
    """
    if tokenizer is None:
        if not isinstance(record.prompt, str):
            raise InputError(
                f"{record.place}: `prompt` holds messages, and there is no tokenizer to render "
                "them; give text, or `--model` with a chat template."
            )
        return Prompt(record.id, record.prompt, (), record.place)
    if isinstance(record.prompt, str):
        ids = tokenizer(record.prompt)["input_ids"]
        return Prompt(record.id, record.prompt, tuple(ids), record.place)
    if not has_chat_template(tokenizer):
        raise InputError(
            f"{record.place}: `prompt` holds messages, but the model's tokenizer has no chat "
            "template; give text, or use a model with one."
        )
    try:
        text = str(
            tokenizer.apply_chat_template(record.prompt, tokenize=False, add_generation_prompt=True)
        )
    except Exception as error:  # templates are programs of the model's author; any error is theirs
        raise InputError(
            f"{record.place}: the chat template refuses these messages ({error})."
        ) from error
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Prompt(record.id, text, tuple(ids), record.place)


def render_all(
    records: Iterable[PromptRecord], tokenizer: PreTrainedTokenizerBase | None
) -> list[Prompt]:
    """`render` for each record."""
    return [render(record, tokenizer) for record in records]
