"""Text of a request to token ids and back, with the tokenizer of the model or without one.

`Texts.split` finds where the prompt ends in a text that should begin with it. A host whose prompts
are too long cuts them on the left, and sends the whole prompt beside a text that begins with the
rest. So a text that does not begin with the prompt may begin with an end of it: the longest one
that it begins with. Where a prompt repeats itself, a response that repeats it again counts as
prompt. An end shorter than `MIN_KEPT` says nothing.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sharpen.records import PromptRecord, check_prompt, template_fields
from sharpen.sampling.base import render
from sharpen.text import REPLACEMENT, TextCodec

from .errors import HTTPError, bad_field, check_unicode

if TYPE_CHECKING:
    import transformers

# characters; chosen. No run leaves so little of a prompt, and a new line ends many
MIN_KEPT = 32
# what a decoder writes for each byte of a character that was cut through, of at most four
MAX_REPLACED = 3
# tokens around the place that lengths of texts point to, as a cut character has other lengths
NEAR = 4

# code of the error for a text that the context cannot hold
TOO_LONG = "too_long"


class Texts:
    """Reads prompts and completions in every form that a request may have them.

    Args:
        tokenizer: Of the model; None if it has none, and then only token ids can be read.
        max_chars: Characters of a text that may be tokenised, which takes seconds where they are
            millions; None for any.
        generation_config: Of the model; it may name further ends of a completion.
    """

    def __init__(
        self,
        tokenizer: "transformers.PreTrainedTokenizerBase | None",
        max_chars: int | None = None,
        generation_config: "transformers.GenerationConfig | None" = None,
    ):
        self._codec = None if tokenizer is None else TextCodec(tokenizer, generation_config)
        self._max_chars = max_chars
        self._token_texts: dict[int, str] = {}

    @property
    def codec(self) -> TextCodec:
        """Text to ids and back; 422 if the model has no tokenizer."""
        if self._codec is None:
            raise HTTPError(
                422, "this model has no tokenizer here; send token ids.", code="no_tokenizer"
            )
        return self._codec

    # ids of a request are whatever it holds, until the model's limits have seen them
    def ids(self, value: object, field: str, *, special: bool) -> list[Any]:
        """Token ids of text, or the ids themselves, which are not checked yet; 422 for all else."""
        if isinstance(value, list):
            return value
        if isinstance(value, str):
            self._check_text(value, field)
            return self.codec.prompt_ids(value) if special else self.codec.encode(value)
        raise bad_field(field, "text or a list of token ids", value)

    # as above
    def completion_ids(
        self, prompt: str | list[int], value: object, field: str, *, add_eos: bool = False
    ) -> list[Any]:
        """Token ids of a text behind its prompt, with its end if `add_eos`; or the ids given."""
        if not isinstance(value, str):
            return self.ids(value, field, special=False)
        self._check_text(value, field)
        return self.codec.completion_ids(prompt, [value], is_ended=add_eos)[0]

    # as above
    def prompt_ids(
        self, value: object, *, special: bool, template: dict[str, Any] | None = None
    ) -> list[Any]:
        """Token ids of a prompt: text, ids, or messages, which the chat template renders."""
        if isinstance(value, list) and value and isinstance(value[0], dict):
            prompt = check_prompt("the request", {"prompt": value})
            assert not isinstance(prompt, str)
            n_chars = sum(len(message["content"] or "") for message in prompt)
            self._check_length("prompt", n_chars)
            fields = template_fields("the request", template or {})
            record = PromptRecord("the request", "", prompt, fields)
            return list(render(record, self.codec.tokenizer).ids)
        return self.ids(value, "prompt", special=special)

    def _check_text(self, value: str, field: str) -> None:
        self._check_length(field, len(value))
        check_unicode(value, field)

    def _check_length(self, field: str, n: int) -> None:
        if self._max_chars is not None and n > self._max_chars:
            raise HTTPError(
                422,
                f"`{field}` must have at most {self._max_chars} characters, got {n}; the model's "
                "context could not hold it.",
                param=field,
                code=TOO_LONG,
            )

    def split(self, query: str, prompt: str, field: str) -> tuple[list[int], list[int]]:
        """Ids of the prompt, and of what follows it in `query`; special tokens stand in the text.

        A query that was decoded from ids may spell its prompt as the tokenizer does, so that
        spelling counts as well; and it may begin with the end of a prompt that was too long. One
        that begins with none of these is rejected with 422.
        """
        query = self.codec.without_padding(query)
        # of a longer prompt a query that fits the model can hold the end alone
        tail = prompt if self._max_chars is None else prompt[-self._max_chars :]
        prompt_ids = self.ids(tail, "prompts", special=False)
        openings = (tail, self.decoded(prompt_ids))
        for opening in openings if tail == prompt else ():
            if query.startswith(opening):
                return prompt_ids, self.completion_ids(opening, query[len(opening) :], field)
        n = max(kept_end(opening, query) for opening in openings)
        if n:
            kept, response = query[:n], query[n:]
            kept_of_prompt = kept_ids(prompt_ids, kept, self.decoded)
            return (
                kept_of_prompt or self.ids(kept, field, special=False),
                self.completion_ids(kept, response, field),
            )
        raise HTTPError(
            422,
            f"`{field}` must begin with its prompt {prompt[:40]!r}, or with {MIN_KEPT} characters "
            f"or more of the end of it, got {query[:40]!r}; send prompt and query as one tokenizer "
            "spells them.",
            param=field,
            code="bad_field",
        )

    def split_last(self, whole: str, field: str) -> tuple[list[int], list[int]]:
        """Ids up to the last turn of the assistant, and of it; a text with none splits early.

        Without a chat template, or without what it writes before an answer, everything after the
        first token is the completion.
        """
        whole, marker = self.codec.without_padding(whole), self.before_answer
        if marker and marker in whole:
            before, _, after = whole.rpartition(marker)
            prompt_ids = self.ids(before + marker, field, special=False)
            return prompt_ids, self.completion_ids(before + marker, after, field)
        ids = self.ids(whole, field, special=False)
        return ids[:1], ids[1:]

    @property
    def before_answer(self) -> str:
        """What the chat template writes between a question and its answer; "" without one."""
        return "" if self._codec is None else self._codec.ends.opening

    def decoded(self, ids: list[int]) -> str:
        """Text of token ids, special tokens and spaces as they are; "" without a tokenizer."""
        return "" if self._codec is None else self._codec.decode(ids, keep_special=True)

    def token_text(self, token: int) -> str:
        """Text of one token inside a text, with the space it may begin with."""
        if self._codec is None:
            return f"token_id:{token}"
        if token not in self._token_texts:
            # alone, a SentencePiece token loses its space
            before = self.decoded(self._anchor)
            joined = self.decoded([*self._anchor, token])
            inside = joined.startswith(before) and bool(self._anchor)
            self._token_texts[token] = joined[len(before) :] if inside else self.decoded([token])
        return self._token_texts[token]

    @cached_property
    def _anchor(self) -> list[int]:
        return self.codec.encode("a")[-1:]


def kept_end(opening: str, text: str) -> int:
    """Characters of `text` that are an end of `opening`: the longest, or 0 if it is too short.

    Example:
        >>> kept_end("Question: what is the sum of 17 and 25? Answer: ",
        ...          "what is the sum of 17 and 25? Answer: 42")
        38
        >>> kept_end("Question: 17 + 25? Answer: ", "Answer: 42")
        0
    """
    n_replaced = len(text) - len(text.lstrip(REPLACEMENT))
    skip = n_replaced if n_replaced <= MAX_REPLACED else 0
    n = _overlap(opening, text[skip:])
    return n + skip if n else 0


def kept_ids(ids: Sequence[int], kept: str, decode: Callable[[list[int]], str]) -> list[int] | None:
    """The last of `ids` that are decoded to `kept`, as the host cut them; None if none are."""
    n = len(ids)
    at = bisect_left(range(n + 1), len(kept), key=lambda k: len(decode(list(ids[n - k :]))))
    for k in sorted(range(max(1, at - NEAR), min(n, at + NEAR) + 1), key=lambda k: abs(k - at)):
        last = list(ids[n - k :])
        if decode(last) == kept:
            return last
    return None


def _overlap(left: str, right: str) -> int:
    """Length of the longest end of `left` that `right` begins with; 0 if it is too short."""
    at = left.find(right[:MIN_KEPT], max(0, len(left) - len(right)))
    if len(right) < MIN_KEPT or at < 0:
        return 0
    # Knuth, Morris and Pratt: one place after another takes minutes where texts repeat
    joined = [*right[: len(left) - at], None, *left[at:]]
    borders, n = [0], 0
    for character in joined[1:]:
        while n and character != joined[n]:
            n = borders[n - 1]
        n += character == joined[n]
        borders.append(n)
    return n if n >= MIN_KEPT else 0
