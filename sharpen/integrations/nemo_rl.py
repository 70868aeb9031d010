"""NeMo-RL: an environment whose reward is the model's own probability of the response.

    from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY
    from nemo_rl.distributed.virtual_cluster import PY_EXECUTABLES
    from nemo_rl.environments.utils import register_env
    name = "sharpen.integrations.nemo_rl.SelfRewardEnvironment"
    ACTOR_ENVIRONMENT_REGISTRY[name] = PY_EXECUTABLES.SYSTEM
    register_env("self_reward", name)

and `env: {self_reward: {model: ..., reward: logprob}}` in the configuration. NeMo-RL hands an
environment roles and text, the prompt with its chat template applied, so both are tokenised again.
The contract was read (NVIDIA-NeMo/RL, nemo_rl/environments/interfaces.py, 2026-08); nothing here
was run inside NeMo-RL.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch

from sharpen.errors import InputError, require
from sharpen.server.unscorable import UnscorableReward
from sharpen.text import TextCodec

from .reward_model import Rate, Rating, RewardModel, rate_rows


# a tokenizer, and messages as NeMo-RL has them
def rate_logs(
    tokenizer: Any,
    rate: Rate,
    logs: Sequence[Sequence[dict[str, Any]]],
    *,
    add_eos: bool = True,
    unscorable_reward: float | None = None,
) -> list[float]:
    """Rewards of conversations of one turn: what the assistant says after all that is before.

    Args:
        tokenizer: Of the model that rates.
        rate: See `reward_model.rate_by`.
        logs: Messages with `role` and `content`; the prompt as the model read it.
        add_eos: Rate the end of the response too; the text does not say whether it was cut.
        unscorable_reward: Of a response that has no reward.

    Raises:
        InputError: If a conversation does not end with its only message of the assistant, or a
            response has no reward and there is none to give it.
    """
    codec = TextCodec(tokenizer)
    texts: list[str] = []
    completions: list[list[int]] = []
    for row, log in enumerate(logs):
        roles = [message["role"] for message in log]
        if roles.count("assistant") != 1 or roles[-1] != "assistant" or len(roles) < 2:
            raise InputError(
                f"message_log_batch[{row}] must be a prompt and one response, got roles "
                f"{', '.join(roles) or 'none'}; this environment is for one turn."
            )
        texts.append("".join(str(message["content"]) for message in log[:-1]))
        answer = codec.without_padding(str(log[-1]["content"]))
        completions += codec.completion_ids(texts[-1], [answer], is_ended=add_eos)
    # the template has written special tokens already; the rows of a prompt need its ids once
    ids_of = {text: codec.encode(text) for text in dict.fromkeys(texts)}
    prompts = [ids_of[text] for text in texts]
    return rate_rows(rate, prompts, completions, UnscorableReward(unscorable_reward))


@functools.cache
def _environment() -> Any:
    message = (
        "NeMo-RL is not installed here; it is run from its own repository, "
        "github.com/NVIDIA-NeMo/RL, with sharpen added to its environment."
    )
    interfaces = require("nemo_rl.environments.interfaces", message)
    ray = require("ray", message)

    class SelfRewardEnvironment(interfaces.EnvironmentInterface):
        """One turn; the reward of each response by a frozen model's own probabilities."""

        def __init__(self, cfg: dict[str, Any]):
            # not shared: `shutdown` lets it go
            self.reward_model: RewardModel | None = RewardModel(Rating.of(cfg))

        def step(self, message_log_batch: Any, metadata: Any) -> Any:
            """Rate a batch; every episode ends here.

            Raises:
                InputError: As `rate_logs`, and after `shutdown`.
            """
            model = self.reward_model
            if model is None:
                raise InputError("this environment was shut down; make another one.")
            otherwise = model.rating.unscorable_reward
            rewards = torch.tensor(
                rate_logs(
                    model.tokenizer, model.rate, message_log_batch, unscorable_reward=otherwise
                )
            )
            return interfaces.EnvironmentReturn(
                observations=[{"role": "environment", "content": ""} for _ in metadata],
                metadata=metadata,
                next_stop_strings=[None] * len(metadata),
                rewards=rewards,
                terminateds=torch.ones_like(rewards),
                answers=None,
            )

        def global_post_process_and_metrics(self, batch: Any) -> tuple[Any, dict[str, float]]:
            """Leave the batch as it is; tell the mean reward."""
            return batch, {"self_reward/mean": float(batch["rewards"].float().mean())}

        def shutdown(self) -> None:
            """Let the model go; NeMo-RL calls this where a run or an evaluation ends."""
            self.reward_model = None

    return ray.remote(SelfRewardEnvironment)


def __getattr__(name: str) -> Any:
    # made when NeMo-RL asks for it by name: without NeMo-RL there is no class to derive from
    if name == "SelfRewardEnvironment":
        return _environment()
    raise AttributeError(name)
