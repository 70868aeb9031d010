"""Text to token ids and back: the one seam between what people write and what a model reads.

    prompt ids       what the tokenizer puts before a text (BOS), once, and the text; never what it
                     puts behind one (EOS): the completion follows there
    completion ids   the text as a continuation of its prompt: what the whole has after the prompt.
                     Encoded alone, a SentencePiece text gets a space in front that is not there
    completion text  what the decoded whole has after the decoded prompt. Decoded alone, a
                     SentencePiece text loses a space in front that is there

A model continues the ids of its prompt, so these never change. Where the tokenizer merges the end
of a prompt and the start of its completion into one token, the completion is encoded by itself, in
the way that spells it, and counted in `TextCodec.n_merged`: a model that was trained on whole texts
finds such a start improbable. Prompts that end with a space are the usual cause.
"""

import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from sharpen.errors import InputError

from .ends import Ends

if TYPE_CHECKING:
    import transformers

logger = logging.getLogger(__name__)

# what a decoder writes for the bytes of a character that is not whole
REPLACEMENT = "\ufffd"
# texts that a completion is tried behind: what stands first in a text is not spelled as inside it
ANCHORS = ("\n", ".", "a", "0")
# bytes that a character has at most
MAX_BYTES = 4
# tokens at the end of a prompt that decide how what follows is decoded
CONTEXT = 16
# characters of a prompt that are encoded again with each of its completions; chosen
MAX_CONTEXT_CHARS = 4096


class TextCodec:
    """Reads and writes text for one tokenizer.

    Args:
        tokenizer: Of the model; fast or slow.
        generation_config: Of the model, where it is at hand: it may name further ends.

    Attributes:
        n_merged: Completions whose start the tokenizer would have merged with their prompt's end.
    """

    def __init__(
        self,
        tokenizer: "transformers.PreTrainedTokenizerBase",
        generation_config: "transformers.GenerationConfig | None" = None,
    ):
        self.tokenizer = tokenizer
        self._generation_config = generation_config
        self.n_merged = 0
        self._has_warned = False

    @cached_property
    def ends(self) -> Ends:
        """The tokens that end a completion."""
        return Ends.of(self.tokenizer, self._generation_config)

    def prompt_ids(self, text: str) -> list[int]:
        """Token ids of a prompt: with what the tokenizer puts in front of a text, once.

        A text that begins with it already, as a rendered chat template does, gets no second one.
        """
        ids = self.encode(text)
        prefix = self._prefix
        return ids if ids[: len(prefix)] == prefix else [*prefix, *ids]

    def completion_ids(
        self,
        prompt: str | Sequence[int],
        completions: Sequence[str],
        *,
        is_ended: bool | Sequence[bool] = False,
    ) -> list[list[int]]:
        """Token ids of completions, each as a continuation of its prompt.

        Args:
            prompt: Text, with the chat template applied, or its token ids.
            completions: Texts; special tokens in them are read as such.
            is_ended: Whether each gets the token that ends it, where it has none yet: all of them,
                or one by one.
        """
        text = prompt if isinstance(prompt, str) else self.decode(prompt, keep_special=True)
        end = self.ends.after(text)
        flags = [is_ended] * len(completions) if isinstance(is_ended, bool) else is_ended
        text = self._end_of(text)
        context = self.encode(text)
        found, n_merged = [], 0
        for completion in completions:
            whole = self.encode(text + completion)
            if whole[: len(context)] == context:
                found.append(whole[len(context) :])
            else:
                n_merged += 1
                found.append(self._encode_apart(text, completion))
        self.n_merged += n_merged
        return [
            [*ids, end] if flag and end is not None and ids[-1:] != [end] else ids
            for ids, flag in zip(found, flags, strict=True)
        ]

    def check_has_end(self) -> None:
        """Reject a tokenizer without a token that ends a completion.

        Raises:
            InputError: If neither it nor its chat template names one.
        """
        if self.ends.eos is None and self.ends.turn_end is None:
            raise InputError(
                "`add_eos` needs a tokenizer with one EOS token, got "
                f"{self.tokenizer.eos_token_id!r}; set its `eos_token`."
            )

    def warn_merged(self) -> None:
        """Say once, in the log, how many completions there were that merge with their prompt."""
        if self.n_merged and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%d completions begin inside a token that their prompt's end is part of; they are "
                "encoded behind the prompt as it stands, which the model may find improbable. End "
                "prompts before a space, or give token ids.",
                self.n_merged,
            )

    def completion_texts(
        self, prompt_ids: Sequence[int], completions: Sequence[Sequence[int]]
    ) -> list[str]:
        """Texts of completions, without special tokens: of the whole, what follows the prompt.

        A character whose bytes begin in the prompt belongs to the completion.
        """
        context, before = self._context(prompt_ids)
        texts = []
        for ids in completions:
            whole = self.decode([*context, *ids])
            texts.append(whole[len(before) :] if whole.startswith(before) else self.decode(ids))
        return texts

    def without_padding(self, text: str) -> str:
        """A text as a trainer decodes it, without the runs of padding around it.

        Where padding is the token that ends a completion, the first one behind the text stays.
        """
        pad = self.tokenizer.pad_token
        if not isinstance(pad, str) or not pad:
            return text
        is_end = self.tokenizer.pad_token_id in self.ends.stops
        while not is_end and text.startswith(pad):
            text = text[len(pad) :]
        while text.endswith(pad * 2 if is_end else pad):
            text = text[: -len(pad)]
        return text

    def character_ends(self, ids: Sequence[int]) -> list[int]:
        """Where each token ends in the decoded text, special tokens kept, in characters.

        A token that ends inside a character ends before it.
        """
        found: list[int] = []
        start = read = n_read = 0
        for k in range(1, len(ids) + 1):
            before = self.decode(ids[start:read], keep_special=True)
            text = self.decode(ids[start:k], keep_special=True)
            whole = text.rstrip(REPLACEMENT)
            found.append(n_read + max(0, len(whole) - len(before)))
            # what follows is decoded behind a few tokens of what is whole
            if whole == text:
                start, read, n_read = max(0, k - CONTEXT), k, found[-1]
        return found

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with nothing put around it; special tokens in it are read."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """Text of token ids, with the spaces that they spell."""
        return str(
            self.tokenizer.decode(
                list(ids),
                skip_special_tokens=not keep_special,
                clean_up_tokenization_spaces=False,
            )
        )

    def _context(self, prompt_ids: Sequence[int]) -> tuple[list[int], str]:
        """The end of a prompt that a completion is decoded behind, and its text."""
        n = CONTEXT
        while True:
            context = list(prompt_ids[-n:])
            before = self.decode(context)
            # it must say something, and begin where a character does: of a run of byte tokens that
            # begins inside one, some decoders give no character at all
            is_whole = bool(before) and not before.startswith(REPLACEMENT)
            if is_whole or n >= len(prompt_ids):
                return context, before.rstrip(REPLACEMENT)
            n = n + 1 if before and n < CONTEXT + MAX_BYTES else 4 * n

    @cached_property
    def _prefix(self) -> list[int]:
        """What the tokenizer puts before every text."""
        body, whole = self.encode("a"), list(self.tokenizer.encode("a"))
        starts = range(len(whole) - len(body) + 1)
        return next((whole[:k] for k in starts if whole[k : k + len(body)] == body), [])

    def _end_of(self, text: str) -> str:
        """The text, or of a long one an end that begins where a line or a word does."""
        if len(text) <= MAX_CONTEXT_CHARS:
            return text
        for mark in ("\n", " "):
            at = text.rfind(mark, 0, len(text) - MAX_CONTEXT_CHARS // 2)
            if len(text) - at <= MAX_CONTEXT_CHARS:
                return text[at:]
        return text

    def _encode_apart(self, text: str, completion: str) -> list[int]:
        """Token ids that spell `completion` behind those of `text`, which stay as they are."""
        context, plain = self.encode(text), self._without_special(completion)
        candidates = [*self._behind_anchors(completion), self.encode(completion)]
        for ids in candidates:
            if self.completion_texts(context, [ids]) == [plain]:
                return ids
        # a tokenizer that changes its text (spaces between words, lower case) spells few exactly
        return candidates[-1]

    def _behind_anchors(self, completion: str) -> Iterator[list[int]]:
        for anchor in ANCHORS:
            before, whole = self.encode(anchor), self.encode(anchor + completion)
            if whole[: len(before)] == before:
                yield whole[len(before) :]

    def _without_special(self, text: str) -> str:
        for special in self.tokenizer.all_special_tokens:
            text = text.replace(special, "")
        return text
