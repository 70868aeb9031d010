"""Many-choice tasks of text, and a tokenizer that makes each letter a token."""

import functools
import random
import string
from typing import NamedTuple

import transformers

from bench._sharing import D, V, llama

BATCH = 8


@functools.cache
def _layer_parameters() -> int:
    return sum(p.numel() for p in llama().model.layers.parameters())


class Task(NamedTuple):
    """Questions after a preamble of `shots` tokens, each with choices; sizes in tokens."""

    name: str
    shots: int
    questions: int
    context: int
    choices: int
    C: int

    def __str__(self) -> str:
        sizes = f"questions={self.questions} context={self.context} choices={self.choices}"
        return f"shots={self.shots} {sizes} C={self.C}"

    @property
    def max_tokens(self) -> int:
        """What `hf` reads in one batch."""
        return BATCH * (self.shots + self.context + self.C - 1)

    @property
    def flops(self) -> float:
        """Forward, of the layers on every token once and of the head on those that predict."""
        ends = self.choices * (self.C - 1)
        tokens = self.shots + self.questions * (self.context + ends)
        return 2.0 * (_layer_parameters() * tokens + D * V * self.questions * (1 + ends))

    def pairs(self) -> list[tuple[str, str]]:
        """Context and continuation of every request."""
        draw = random.Random(0)

        def text(n: int) -> str:
            return "".join(draw.choices(string.ascii_letters, k=n))

        shots = text(self.shots)
        contexts = [shots + text(self.context) for _ in range(self.questions)]
        return [(context, text(self.C)) for context in contexts for _ in range(self.choices)]


TASKS = [Task("choices", 0, 8, 600, 8, 24), Task("shots", 600, 16, 40, 4, 8)]
CHECKED = [Task("choices", 0, 2, 20, 3, 4), Task("shots", 20, 3, 5, 2, 2)]


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A token a letter."""
    from tokenizers import Tokenizer, models

    names = ["<pad>", "<s>", "</s>", *string.ascii_letters]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
