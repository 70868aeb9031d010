"""verl: a reward function. `reward.custom_reward_function.path=pkg://sharpen.integrations.verl`.

verl hands a reward function text alone and not the prompt: the prompt must be a column of
`extra_info`, and both are tokenised again. `verl_manager` gets the token ids themselves, and is the
better way. Written against verl 0.9.1 (contract read in its wheel; run: docs/hosts/verl.md).
"""

from typing import Any

from sharpen.errors import InputError
from sharpen.records import check_text

from .reward_model import Rating, conversation_ids, shared_reward_model


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
        data_source: Not read.
        solution_str: The response, special tokens left out, as verl decodes it.
        ground_truth: Not read.
        extra_info: Holds the prompt: text, or messages for the chat template.
        prompt_key: Under this name.
        add_eos: Rate the end of the response too; verl's text does not say whether it was cut.
        reward_router_address: Not read; verl adds it where a reward model is served.
        reward_model_tokenizer: As above.
        **options: Fields of `Rating`, such as `model` and `reward`.

    Returns:
        `score`, as verl wants it, and `self_reward`, for its metrics.

    Raises:
        InputError: If the prompt is not there, an option is bad, or the response has no reward and
            `unscorable_reward` is not given: verl then ends the run.
    """
    model = shared_reward_model(Rating.of(options))
    if not isinstance(extra_info, dict) or prompt_key not in extra_info:
        raise InputError(
            f"`extra_info` must hold the prompt under {prompt_key!r}; add the column to the data, "
            "name another by `prompt_key`, or use sharpen.integrations.verl_manager."
        )
    place = f"extra_info[{prompt_key!r}]"
    prompt_ids = conversation_ids(model.tokenizer, place, extra_info[prompt_key])
    text = check_text("solution_str", "solution_str", solution_str)
    (ids,) = model.codec.completion_ids(prompt_ids, [text], is_ended=add_eos)
    reward = await model.reward(prompt_ids, ids)
    return {"score": reward, "self_reward": reward}
