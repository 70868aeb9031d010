"""What a task is: examples to prompt with, the answer that a completion claims, and the truth.

A task knows nothing of models, samplers or scores. Prompts come in two forms: plain text for
models without a chat template (and for the model that ships with the task), messages for the
others.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

Message = dict[str, str]
PromptForm = str | list[Message]


@dataclass(frozen=True)
class Example:
    """One problem of a task: a stable id and whatever the task needs to grade it."""

    id: str
    problem: Any


@runtime_checkable
class Task(Protocol):
    """A set of problems with a strict checker."""

    name: str
    splits: tuple[str, ...]
    description: str

    def examples(self, split: str) -> list[Example]:
        """All examples of a split, in a fixed order.

        Raises:
            InputError: If the split does not exist.
        """
        ...

    def prompt(self, example: Example, *, shots: int = 0, chat: bool = False) -> PromptForm:
        """The prompt of `example`: text, or messages if `chat`, after `shots` worked examples."""
        ...

    def answer(self, example: Example, completion: str) -> str | None:
        """The final answer that `completion` claims, in a canonical form; None if it has none.

        Never looks at the truth: majority votes count these.
        """
        ...

    def is_correct(self, example: Example, completion: str) -> bool:
        """Whether `completion` solves `example`."""
        ...
