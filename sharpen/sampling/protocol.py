"""What a sampler is: prompts in, N completions each out, with the log-probs of what it drew."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from sharpen.errors import InputError

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
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn.

        Raises:
            InputError: If a value is out of its range.
        """
        rules = [
            ("n", self.n >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0 and finite"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("first", self.first >= 0, "at least 0"),
        ]
        for name, holds, wanted in rules:
            if not holds:
                raise InputError(f"`{name}` must be {wanted}, got {getattr(self, name)}.")


@dataclass(frozen=True)
class Samples:
    """The N completions of one prompt, in the order of their sample index.

    Attributes:
        prompt_id: Whose.
        completions: Text, without the end-of-sequence token.
        completion_ids: Token ids, with the end-of-sequence token where the model ended. An empty
            list, of no completions, where only the sampler's server can tokenise.
        logprobs: Raw log-probability of each of these tokens in nats: of the model itself, at
            temperature 1 and without top-p, whatever the draw used.
        finish_reasons: One a completion.
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
