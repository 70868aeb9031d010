"""ms-swift: a reward class for `swift rlhf --rlhf_type grpo --external_plugins plugin.py`.

    from swift.rewards import orms
    from sharpen.integrations.ms_swift import self_reward
    orms["sharpen"] = self_reward(model="Qwen/Qwen2.5-0.5B-Instruct", reward="mean_logprob")

Written against ms-swift 4.6.0, whose contract was read in its wheel.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sharpen.errors import InputError, require
from sharpen.server.unscorable import UnscorableReward
from sharpen.text import TextCodec

from . import reward_model
from .reward_model import Rating, conversation_ids, shared_reward_model

# columns of a row that hold more than text
MEDIA = ("images", "videos", "audios")


# **options are fields of `Rating`: a host's configuration
def self_reward(**options: Any) -> type:
    """A reward class under ms-swift's contract: `orms[name](args=args)`, then calls.

    Raises:
        InputError: If an option is bad, or ms-swift is not installed.
    """
    message = "ms-swift is not installed here: `pip install ms-swift`."
    orm: type = require("swift.rewards.orm", message).ORM
    rating = Rating.of(options)

    class SelfReward(orm):
        """Rates responses by the model's own probabilities, completions of a prompt together."""

        def __call__(
            self,
            completions: Sequence[str],
            messages: Sequence[Sequence[dict[str, str]]] = (),
            response_token_ids: Sequence[Any] = (),
            **columns: Any,
        ) -> list[float]:
            reject_media(columns)
            model = shared_reward_model(rating)
            return rate_rows(
                model.tokenizer,
                model.rate,
                completions,
                messages,
                response_token_ids,
                unscorable_reward=rating.unscorable_reward,
            )

    return SelfReward


# columns are whatever the data holds
def reject_media(columns: Mapping[str, Any]) -> None:
    """Reject rows whose prompts are more than text.

    Raises:
        InputError: If a row has an image, a video or audio.
    """
    for name in MEDIA:
        values = columns.get(name)
        for row, value in enumerate(() if values is None else values):
            # a list of them, or a single one
            if value is not None and (not hasattr(value, "__len__") or len(value)):
                raise InputError(
                    f"`{name}`[{row}] must be empty, got {type(value).__name__}: prompts are rated "
                    "as text alone; take another reward for such rows."
                )


def rate_rows(
    tokenizer: Any,
    rate: Any,
    completions: Sequence[str],
    messages: Sequence[Sequence[dict[str, str]]],
    response_token_ids: Sequence[Any] = (),
    *,
    unscorable_reward: float | None = None,
) -> list[float]:
    """Rewards of rows that hold text, with token ids where the rollout kept them.

    The prompt is what stands before the last message, under the tokenizer's own chat template:
    ms-swift's templates may write other special tokens.

    Args:
        tokenizer: Of the model that rates.
        rate: See `reward_model.rate_by`.
        completions: Text of each row's response.
        messages: Of each row, the response last.
        response_token_ids: Of each row, a list for each of its turns, or the ids of a single one,
            or nothing; arrays do as well.
        unscorable_reward: Of a response that has no reward. ms-swift would take None, but where no
            other function rates the response it counts as 0, above every log-prob.

    Raises:
        InputError: If a row has no messages, or no reward and there is nothing in its place.
    """
    if len(messages) != len(completions):
        raise InputError(
            f"`messages` must hold one conversation a completion, {len(completions)}, got "
            f"{len(messages)}."
        )
    codec = TextCodec(tokenizer)
    prompts, ids = [], []
    for row, conversation in enumerate(messages):
        place = f"messages[{row}]"
        prompts.append(conversation_ids(tokenizer, place, list(conversation[:-1])))
        kept = response_token_ids[row] if row < len(response_token_ids) else None
        last = _last_turn(kept)
        text = codec.without_padding(completions[row])
        ids.append(last or codec.completion_ids(prompts[-1], [text])[0])
    return reward_model.rate_rows(rate, prompts, ids, UnscorableReward(unscorable_reward))


# lists, arrays or None
def _last_turn(kept: Any) -> list[int]:
    """Token ids of the last turn of a row, or of its only one; none if there are none."""
    if kept is None or len(kept) == 0:
        return []
    kept = kept.tolist() if hasattr(kept, "tolist") else kept
    last = kept[-1]
    turn = last if hasattr(last, "__len__") and getattr(last, "ndim", 1) else kept
    return [int(token) for token in turn]
