"""ms-swift: a reward class for `swift rlhf --rlhf_type grpo --external_plugins plugin.py`.

    from swift.rewards import orms
    from sharpen.integrations.ms_swift import self_reward
    orms["sharpen"] = self_reward(model="Qwen/Qwen2.5-0.5B-Instruct", reward="mean_logprob")

Written against ms-swift 4.6.0, whose contract was read in its wheel.
"""

import importlib
from collections.abc import Sequence
from typing import Any

from sharpen.errors import InputError
from sharpen.records import PromptRecord, check_prompt
from sharpen.sampling.prompts import render
from sharpen.scoring import Scorer

from .rating import Rating, rate_by, rate_each, scorer_of, shared


# **options are fields of `Rating`: a host's configuration
def self_reward(**options: Any) -> type:
    """A reward class under ms-swift's contract: `orms[name](args=args)`, then calls.

    Raises:
        InputError: If an option is bad, or ms-swift is not installed.
    """
    try:
        orm: type = importlib.import_module("swift.rewards.orm").ORM
    except ImportError as error:
        raise InputError("ms-swift is not installed here: `pip install ms-swift`.") from error
    rating = Rating.of(options)

    class SelfReward(orm):
        """Rates responses by the model's own probabilities, completions of a prompt together."""

        def __call__(
            self,
            completions: Sequence[str],
            messages: Sequence[Sequence[dict[str, str]]] = (),
            response_token_ids: Sequence[Any] = (),
            **_columns: Any,
        ) -> list[float]:
            scorer, rate = shared(rating, lambda: _open(rating))
            return rate_rows(scorer.tokenizer, rate, completions, messages, response_token_ids)

    return SelfReward


def rate_rows(
    tokenizer: Any,
    rate: Any,
    completions: Sequence[str],
    messages: Sequence[Sequence[dict[str, str]]],
    response_token_ids: Sequence[Any] = (),
) -> list[float]:
    """Rewards of rows that hold text, with token ids where the rollout kept them.

    The prompt is what stands before the last message, under the tokenizer's own chat template:
    ms-swift's templates may write other special tokens.

    Args:
        tokenizer: Of the model that rates.
        rate: See `rating.rate_by`.
        completions: Text of each row's response.
        messages: Of each row, the response last.
        response_token_ids: Of each row, a list for each of its turns, or nothing.

    Raises:
        InputError: If a row has no messages.
    """
    if len(messages) != len(completions):
        raise InputError(
            f"`messages` must hold one conversation a completion, {len(completions)}, got "
            f"{len(messages)}."
        )
    prompts, ids = [], []
    for row, conversation in enumerate(messages):
        place = f"messages[{row}]"
        prompt = check_prompt(place, {"prompt": list(conversation[:-1])})
        prompts.append(render(PromptRecord(place, place, prompt), tokenizer).ids)
        kept = response_token_ids[row] if row < len(response_token_ids) else None
        if kept:
            # turns, or the ids of a single one
            last = kept[-1] if isinstance(kept[-1], (list, tuple)) else kept
            ids.append(list(last))
        else:
            ids.append(tokenizer(completions[row], add_special_tokens=False)["input_ids"])
    return rate_each(rate, prompts, ids)


def _open(rating: Rating) -> tuple[Scorer, Any]:
    if not rating.model:
        raise InputError("`model` must be given for text: its tokenizer makes the ids.")
    scorer = scorer_of(rating)
    return scorer, rate_by(rating, scorer)
