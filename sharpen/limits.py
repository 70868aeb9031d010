"""What token ids a model accepts: the bounds that a bad input breaks, checked in one place."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch

from .errors import InputError

if TYPE_CHECKING:
    import transformers

# where configurations keep the length of the context; GPT-2's `n_positions` answers to the first
LENGTH_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len")


@dataclass(frozen=True)
class ModelLimits:
    """What a model accepts.

    Attributes:
        vocab_size: Rows of the input embedding; ids are 0 ... vocab_size - 1.
        max_length: Tokens of prompt and completion together; None if the model has no limit.
    """

    vocab_size: int
    max_length: int | None

    @classmethod
    def of(cls, model: "transformers.PreTrainedModel") -> "ModelLimits":
        """The limits of `model`, from its input embedding and its configuration."""
        weight = model.get_input_embeddings().weight
        assert isinstance(weight, torch.Tensor)
        config = model.config.get_text_config()
        lengths = (getattr(config, field, None) for field in LENGTH_FIELDS)
        # some unlimited models say -1
        length = next((n for n in lengths if isinstance(n, int) and n > 0), None)
        return cls(vocab_size=weight.shape[0], max_length=length)

    def check(
        self,
        name: str,
        prompt_ids: Sequence[object],
        completion_ids: Sequence[object] = (),
        *,
        unread: int = 0,
    ) -> None:
        """Refuse a prompt and completion that the model cannot read.

        Args:
            name: What the message begins with: "prompts[3]", or "samples.jsonl:12".
            prompt_ids: Token ids of the prompt.
            completion_ids: Token ids of the completion; may be empty.
            unread: How many of them, at the end, are predicted and never read: they need no place
                in the context.

        Raises:
            InputError: If the prompt is empty, an id is not an integer of the vocabulary, or both
                together are longer than the context.
        """
        if len(prompt_ids) == 0:
            raise InputError(
                f"{name}: the prompt must hold at least one token, got none; "
                "begin it with the tokenizer's BOS or EOS token."
            )
        self._check_ids(name, "prompt", prompt_ids)
        self._check_ids(name, "completion", completion_ids)
        total = len(prompt_ids) + len(completion_ids)
        if self.max_length is not None and total - unread > self.max_length:
            raise InputError(
                f"{name}: prompt and completion must fit the model's context of "
                f"{self.max_length} tokens, got {len(prompt_ids)} + {len(completion_ids)} = "
                f"{total}; shorten one or leave the record out."
            )

    def _check_ids(self, name: str, part: str, ids: Sequence[object]) -> None:
        if all(map(_is_id, set(map(type, ids)))) and (not ids or self._holds(ids)):
            return
        for position, token in enumerate(ids):
            if not _is_id(type(token)):
                raise InputError(
                    f"{name}: token ids must be integers, got {token!r} at position {position} "
                    f"of the {part}; tokenise text first."
                )
            if not self._holds([token]):
                raise InputError(
                    f"{name}: token ids must be in [0, {self.vocab_size}), got {token} at "
                    f"position {position} of the {part}; use the tokenizer of this model."
                )

    # checked to be integers by then
    def _holds(self, ids: Sequence[Any]) -> bool:
        return min(ids) >= 0 and max(ids) < self.vocab_size


def _is_id(kind: type) -> bool:
    return issubclass(kind, Integral) and kind is not bool
