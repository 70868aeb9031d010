"""verl: a reward manager that rates token ids as they were sampled, in batches by prompt.

    reward.reward_manager.source=importlib
    reward.reward_manager.name=SelfRewardManager
    reward.reward_manager.module.path=pkg://sharpen.integrations.verl_manager
    +reward.reward_kwargs.sharpen.reward=logprob

Without `model` it is the one that training starts from, frozen. verl runs a manager in each of
`reward.num_workers` processes, each with a copy of the model. Written against verl 0.9.1.
"""

import functools
from typing import Any

from sharpen.errors import InputError, require

from .reward_model import Rating, shared_reward_model


def response_ids(batch: Any) -> tuple[list[int], list[int]]:
    """Prompt and response of one sequence, without padding.

    Args:
        batch: `prompts` int64 [P], padded on the left; `responses` int64 [R], padded on the right;
            `attention_mask` [P + R]; where an agent called tools, `response_mask` [R], 0 for words
            that are not the model's own.

    Raises:
        InputError: If a response holds words of a tool: no reward may count them as the model's.
    """
    prompts, responses, mask = batch["prompts"], batch["responses"], batch["attention_mask"].bool()
    n = len(prompts)
    if "response_mask" in batch.keys():  # noqa: SIM118 (a TensorDict has no other `in`)
        own = batch["response_mask"].bool()
        n_foreign = int((mask[n:] & ~own).sum())
        if n_foreign:
            raise InputError(
                f"`response_mask` must be 1 for every token of a response, got {n_foreign} of "
                f"{int(mask[n:].sum())} that are words of tools: a self-reward of several turns is "
                "not supported; take another reward for agents."
            )
    return prompts[mask[:n]].tolist(), responses[mask[n:]].tolist()


@functools.cache
def _manager() -> type:
    base = "verl.experimental.reward_loop.reward_manager.base"
    how = "is not here ({error}): `pip install verl` in the environment of the trainer."
    reward_manager_base: type = require(base, f"{base} {how}").RewardManagerBase

    class SelfRewardManager(reward_manager_base):
        """Rates each response by a model's own probabilities.

        Args:
            config: verl's; `reward.reward_kwargs.sharpen` holds fields of `Rating`.
            tokenizer: Of the policy.
            compute_score: Not called.
            reward_router_address: Not read.
            reward_model_tokenizer: Not read.

        Raises:
            InputError: If an option is bad or the model cannot be loaded.
        """

        def __init__(
            self,
            config: Any,
            tokenizer: Any,
            compute_score: Any = None,
            reward_router_address: str | None = None,
            reward_model_tokenizer: Any = None,
        ):
            super().__init__(config, tokenizer, compute_score)
            given = (config.reward.get("reward_kwargs") or {}).get("sharpen") or {}
            options = {str(name): value for name, value in given.items()}
            if "endpoint" not in options:
                options.setdefault("model", config.actor_rollout_ref.model.path)
            # loaded now: an option that is bad must not wait for the first response
            self.reward_model = shared_reward_model(Rating.of(options)).load()

        async def run_single(self, data: Any) -> dict[str, Any]:
            """The reward of the last sequence of `data`, a verl DataProto.

            Returns:
                `reward_score`, and `reward_extra_info` for verl's metrics.

            Raises:
                InputError: If this response has no reward and `unscorable_reward` is not given:
                    verl then ends the run.
            """
            prompt, response = response_ids(data[-1:][0].batch)
            reward = await self.reward_model.reward(prompt, response)
            extra = {"self_reward": reward, "response_tokens": len(response)}
            return {"reward_score": reward, "reward_extra_info": extra}

    return SelfRewardManager


def __getattr__(name: str) -> Any:
    # made when verl asks for it by name: without verl there is no class to derive from
    if name == "SelfRewardManager":
        return _manager()
    raise AttributeError(name)
