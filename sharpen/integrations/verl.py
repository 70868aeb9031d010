"""verl: a reward function. `reward.custom_reward_function.path=pkg://sharpen.integrations.verl`.

verl hands a reward function text alone and not the prompt: the prompt must be a column of
`extra_info`, and both are tokenised again. `verl_manager` gets the token ids themselves, and is the
better way. Written against verl 0.9.1 (contract read in its wheel; run: docs/hosts/verl.md).
"""

import asyncio
import weakref
from typing import Any

from sharpen.errors import InputError
from sharpen.records import PromptRecord, check_prompt, check_text
from sharpen.sampling.base import render
from sharpen.scoring import Scorer

from .reward_model import MicroBatches, Rate, Rating, rate_by, scorer_of, settled, shared

# a batch belongs to one event loop
_batches: "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Rating, MicroBatches]]"
_batches = weakref.WeakKeyDictionary()


# **options are `reward_kwargs` of the host's configuration, and what verl adds of its own
async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any = None,
    extra_info: dict[str, Any] | None = None,
    *,
    prompt_key: str = "prompt",
    add_eos: bool = True,
    reward_router_address: str | None = None,
    reward_model_tokenizer: Any = None,
    **options: Any,
) -> dict[str, float]:
    """The self-reward of one response, rated together with the others that are asked for now.

    Args:
        data_source: Not looked at.
        solution_str: The response, special tokens left out, as verl decodes it.
        ground_truth: Not looked at.
        extra_info: Holds the prompt: text, or messages for the chat template.
        prompt_key: Under this name.
        add_eos: Rate the end of the response too; verl's text does not say whether it was cut.
        reward_router_address: Not looked at; verl adds it where a reward model is served.
        reward_model_tokenizer: As above.
        **options: Fields of `Rating`, such as `model` and `reward`.

    Returns:
        `score`, as verl wants it, and `self_reward`, for its metrics.

    Raises:
        InputError: If the prompt is not there, an option is bad, or the response has no reward and
            `unscorable_reward` is not given: verl then ends the run.
    """
    rating = Rating.of(options)
    scorer, rate = shared(rating, lambda: _open(rating))
    if not isinstance(extra_info, dict) or prompt_key not in extra_info:
        raise InputError(
            f"`extra_info` must hold the prompt under {prompt_key!r}; add the column to the data, "
            "name another by `prompt_key`, or use sharpen.integrations.verl_manager."
        )
    place = f"extra_info[{prompt_key!r}]"
    prompt = check_prompt(place, {"prompt": _plain(extra_info[prompt_key])})
    tokenizer = scorer.tokenizer
    prompt_ids = render(PromptRecord(place, place, prompt), tokenizer).ids
    text = check_text("solution_str", "solution_str", solution_str)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if add_eos and tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    loop = asyncio.get_running_loop()
    batches = _batches.setdefault(loop, {})
    if rating not in batches:
        batches[rating] = MicroBatches(rate, wait_s=rating.wait_ms / 1000)
    rated = await batches[rating].reward(prompt_ids, ids)
    reward = settled(rated, rating.unscorable_reward)
    return {"score": reward, "self_reward": reward}


def _open(rating: Rating) -> tuple[Scorer, Rate]:
    if not rating.model:
        raise InputError("`model` must be given for text: its tokenizer makes the ids.")
    scorer = scorer_of(rating)
    return scorer, rate_by(rating, scorer)


def _plain(prompt: Any) -> Any:
    """Messages as a list: parquet gives them as an array."""
    return prompt.tolist() if hasattr(prompt, "tolist") else prompt
