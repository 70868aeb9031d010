"""What ends a completion: the tokens that a model stops at, and the one that stands for its end.

A model has several: the tokenizer's EOS, those of its generation config, and what its chat template
writes behind an answer. A sampler stops at each of them. A completion that is given as text ends
with one: after a rendered conversation the template's, after other text the tokenizer's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import transformers

# a short conversation, rendered to see what the template writes around an answer
QUESTION = [{"role": "user", "content": "?"}]
ANSWER = "Yes, 7."
# what engines call an end that the model chose
NATURAL = ("stop", "eos", "eos_token", "stop_sequence", "end_turn", "complete", "finished")


def is_natural(reason: object) -> bool:
    """Whether a finish reason says that the model ended the completion itself.

    Example:
        >>> [is_natural(reason) for reason in ("stop", "EOS", "eos_token", "length", None)]
        [True, True, True, False, False]
    """
    return isinstance(reason, str) and reason.lower() in NATURAL


@dataclass(frozen=True)
class Ends:
    """The ends of one model.

    Attributes:
        eos: The tokenizer's EOS; None if it has none.
        turn_end: What the chat template writes behind an answer, if that is one special token.
        opening: What the chat template writes before an answer; "" without one.
        stops: Every token that ends a completion.
    """

    eos: int | None
    turn_end: int | None
    opening: str
    stops: tuple[int, ...]

    @classmethod
    def of(
        cls,
        tokenizer: "transformers.PreTrainedTokenizerBase | None",
        generation_config: "transformers.GenerationConfig | None" = None,
    ) -> "Ends":
        """The ends that a tokenizer and the generation config of a model name.

        Args:
            tokenizer: Of the model; None if it has none here.
            generation_config: Of the model; None where only a server has the model.
        """
        declared = None if generation_config is None else generation_config.eos_token_id
        stops = [*declared] if isinstance(declared, (list, tuple)) else [declared]
        eos = getattr(tokenizer, "eos_token_id", None)
        turn_end, opening = None, ""
        if tokenizer is not None and getattr(tokenizer, "chat_template", None):
            turn_end, opening = _turn_end(tokenizer, stops), _opening(tokenizer)
        every = dict.fromkeys([*stops, eos, turn_end])
        return cls(
            eos=eos if isinstance(eos, int) else None,
            turn_end=turn_end,
            opening=opening,
            stops=tuple(token for token in every if isinstance(token, int)),
        )

    def after(self, prompt: str) -> int | None:
        """The token that ends a completion of this prompt, chat template applied; None if none."""
        is_answer = bool(self.opening) and prompt.endswith(self.opening)
        return self.turn_end if is_answer and self.turn_end is not None else self.eos


def _opening(tokenizer: "transformers.PreTrainedTokenizerBase") -> str:
    """What the template writes between a question and its answer."""
    plain = _rendered(tokenizer, QUESTION, add_generation_prompt=False)
    opened = _rendered(tokenizer, QUESTION, add_generation_prompt=True)
    return opened[len(plain) :] if opened.startswith(plain) else ""


def _turn_end(
    tokenizer: "transformers.PreTrainedTokenizerBase", stops: Sequence[object]
) -> int | None:
    """The special token right behind an answer, or behind one that a question follows."""
    answer = [*QUESTION, {"role": "assistant", "content": ANSWER}]
    last = _special_behind(tokenizer, answer)
    if last is not None:
        return last
    # GLM's templates end an answer with what begins the next turn
    following = _special_behind(tokenizer, [*answer, *QUESTION])
    return following if following in stops else None


def _special_behind(
    tokenizer: "transformers.PreTrainedTokenizerBase", messages: list[dict[str, str]]
) -> int | None:
    _, found, behind = _rendered(tokenizer, messages).rpartition(ANSWER)
    if not found:
        return None
    ids = tokenizer.encode(behind.lstrip(), add_special_tokens=False)
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def _rendered(
    tokenizer: "transformers.PreTrainedTokenizerBase",
    messages: list[dict[str, str]],
    **options: Any,
) -> str:
    # a template is a program of the model's author; one that refuses the probe says nothing here
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception:
        return ""
