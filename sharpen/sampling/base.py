"""What a sampler is, and what it is given: prompts in, N completions of each out, with log-probs.

    records -> render -> Prompt -> Sampler.sample(prompts, SamplingConfig) -> Samples

Protocol   `Prompt`, `SamplingConfig`, `Samples`, `Sampler`
Prompts    `render`: messages through the chat template, text with special tokens, as token ids
Batches    `plan_batches`: samples of prompts of one length under a token budget; `joined` puts the
           parts of a prompt together again

A batch never pads: all its prompts are of one length. The plan is a function of the whole list of
prompts and the settings, never of what is already done, so a restart runs the same batches and
gives the same bits.
"""

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from sharpen.errors import InputError, check_fields
from sharpen.records import PromptRecord
from sharpen.text import TextCodec

# "stop": the model ended it; "length": cut at max_new_tokens; "nan": the model's logits were;
# "cut": a server ended it for a reason of its own
FinishReason = Literal["stop", "length", "nan", "cut"]


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready to be continued.

    Attributes:
        id: Unique in its run; the samples depend on it, on the seed, and on nothing around it.
        text: As the model reads it, chat template applied.
        ids: Its token ids, or empty where only the sampler's server can tokenise.
        place: Where it came from, for error messages.
    """

    id: str
    text: str
    ids: tuple[int, ...]
    place: str


@dataclass(frozen=True)
class SamplingConfig:
    """How to draw.

    Attributes:
        n: Completions per prompt.
        temperature: 0 means greedy; 1 is the model's own distribution.
        top_p: Draw from the smallest set of tokens with at least this mass.
        max_new_tokens: Completions are cut here, and then never win a selection.
        seed: With the prompt's id and the sample's index, fixes every draw.
        first: Index of the first sample. The n from there on are drawn: the same ones as the last
            n of first + n.

    Raises:
        InputError: If a value is out of its range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        rules = [
            ("n", self.n >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0 and finite"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("first", self.first >= 0, "at least 0"),
        ]
        check_fields(self, rules)


@dataclass(frozen=True)
class Samples:
    """The N completions of one prompt, in the order of their sample index.

    Attributes:
        prompt_id: Of their prompt.
        completions: Text, without the end-of-sequence token.
        completion_ids: Token ids, with the end-of-sequence token where the model ended. An empty
            list, of no completions, where only the sampler's server can tokenise.
        logprobs: Raw log-probability of each of these tokens in nats: of the model itself, at
            temperature 1 and without top-p, whatever the draw used.
        finish_reasons: One for each completion.
    """

    prompt_id: str
    completions: list[str]
    completion_ids: list[list[int]]
    logprobs: list[list[float]]
    finish_reasons: list[FinishReason]


@runtime_checkable
class Sampler(Protocol):
    """Draws completions. transformers models, vLLM and HTTP servers look alike from here."""

    def sample(
        self, prompts: Sequence[Prompt], config: SamplingConfig, *, done: Collection[str] = ()
    ) -> Iterator[list[Samples]]:
        """Completions of every prompt whose id is not in `done`, as they are finished.

        Each yielded list holds whole prompts. Leaving out prompts through `done` does not
        change the bits of the others: `prompts` is always the whole list.
        """
        ...


def has_chat_template(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether there is a tokenizer that can render messages."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(record: PromptRecord, tokenizer: PreTrainedTokenizerBase | None) -> Prompt:
    """One prompt as text and ids; without a tokenizer as text alone.

    Text gets what the tokenizer puts in front of one (such as a BOS), unless it begins with it, and
    never what it puts behind (an EOS); messages get exactly what the chat template writes, up to
    where the assistant begins, or to the end of what the assistant has said already.

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
        ids = TextCodec(tokenizer).prompt_ids(record.prompt)
        return Prompt(record.id, record.prompt, tuple(ids), record.place)
    if not has_chat_template(tokenizer):
        raise InputError(
            f"{record.place}: `prompt` holds messages, but the model's tokenizer has no chat "
            "template; give text, or use a model with one."
        )
    # an answer that is begun is continued
    is_begun = record.prompt[-1]["role"] == "assistant"
    try:
        text = str(
            tokenizer.apply_chat_template(
                record.prompt,
                tokenize=False,
                add_generation_prompt=not is_begun,
                continue_final_message=is_begun,
                **record.template,
            )
        )
    except Exception as error:  # templates are programs of the model's author; any error is theirs
        raise InputError(
            f"{record.place}: the chat template refuses these messages ({error})."
        ) from error
    ids = TextCodec(tokenizer).encode(text)
    return Prompt(record.id, text, tuple(ids), record.place)


def render_all(
    records: Iterable[PromptRecord], tokenizer: PreTrainedTokenizerBase | None
) -> list[Prompt]:
    """`render` for each record."""
    return [render(record, tokenizer) for record in records]


@dataclass(frozen=True)
class Share:
    """Samples start..stop-1 of prompt number `prompt`."""

    prompt: int
    start: int
    stop: int


def plan_batches(
    lengths: Sequence[int], n: int, max_new_tokens: int, max_tokens: int, *, shared: bool = False
) -> list[list[Share]]:
    """Cut all samples into batches that hold at most `max_tokens` tokens each.

    Prompts go by length, then by input order. A prompt whose n samples fit in one batch is
    never split; one that does not fit is cut into near-equal parts. A single sample longer
    than the budget is a batch of its own.

    Args:
        lengths: Tokens of each prompt.
        n: Samples per prompt.
        max_new_tokens: Most tokens a sample can add.
        max_tokens: Budget: rows x (prompt + max_new_tokens), or if `shared`
            prompts + rows x max_new_tokens.
        shared: Whether a batch holds a prompt once for all its rows.
    """
    batches: list[list[Share]] = []
    left = 0
    length_now = -1
    for prompt in sorted(range(len(lengths)), key=lambda p: lengths[p]):
        once, each = lengths[prompt], max_new_tokens
        if not shared:
            once, each = 0, each + once
        cost = once + n * each
        if cost > max_tokens:
            parts = -(-n // max(1, (max_tokens - once) // each))
            cuts = [n * i // parts for i in range(parts + 1)]
            batches += [[Share(prompt, a, b)] for a, b in itertools.pairwise(cuts)]
            length_now = -1
            continue
        if lengths[prompt] != length_now or left < cost:
            batches.append([])
            length_now, left = lengths[prompt], max_tokens
        batches[-1].append(Share(prompt, 0, n))
        left -= cost
    return batches


def joined(parts: Sequence[Samples]) -> Samples:
    """Samples of one prompt, of the first part's type, from parts in the order of their indices.

    Example:
        >>> one, other = (Samples("p", [t], [[1]], [[-0.5]], ["stop"]) for t in "ab")
        >>> joined([one, other]).completions
        ['a', 'b']
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    lists = [f.name for f in fields(first) if isinstance(getattr(first, f.name), list)]
    return replace(
        first, **{name: [x for part in parts for x in getattr(part, name)] for name in lists}
    )
