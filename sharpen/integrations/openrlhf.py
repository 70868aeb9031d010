"""OpenRLHF's Python-file reward: `--reward.remote_url FILE.py`, a file that has `reward_func`.

    from sharpen.integrations.openrlhf import SelfReward

    reward_func = SelfReward("Qwen/Qwen2.5-0.5B-Instruct", reward="logprob")

or this very file, with the model in the environment variable SHARPEN_MODEL and, if they are wanted,
the reward ("logprob") in SHARPEN_REWARD and what a response without one gets (an error) in
SHARPEN_UNSCORABLE_REWARD. OpenRLHF calls from many threads with one text each; calls
that overlap are scored together, and texts of one prompt share it. Nothing of OpenRLHF is imported.
"""

import functools
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sharpen.errors import InputError
from sharpen.models import ModelLimits
from sharpen.scoring import Scorer
from sharpen.scoring.rewards import REWARDS, options_needed
from sharpen.server.batcher import MicroBatcher
from sharpen.server.state import ServerLimits, ServerState, query_rewards
from sharpen.server.text import Texts
from sharpen.server.unscorable import UnscorableReward, finite_or_none
from sharpen_kernels import TokenStats

if TYPE_CHECKING:
    import transformers

MODEL_VARIABLE = "SHARPEN_MODEL"
REWARD_VARIABLE = "SHARPEN_REWARD"
UNSCORABLE_VARIABLE = "SHARPEN_UNSCORABLE_REWARD"


class SelfReward:
    r"""`reward_func` of OpenRLHF: how probable a model finds each response.

    Args:
        model: As `Scorer` takes it; frozen, and not the policy that OpenRLHF trains.
        reward: A name of `sharpen.scoring.rewards.REWARDS` that needs no answers.
        tokenizer: Default: the one of the path.
        max_tokens: Tokens of one forward.
        wait_seconds: How long a call waits for others to share a batch.
        unscorable_reward: What a response gets that is empty, beyond the model's context, or whose
            log-prob or reward is not finite; default: an error, with which OpenRLHF ends the run.

    Raises:
        InputError: If there is no such model or reward, or `unscorable_reward` is not finite.

    Example:
        >>> reward_func = SelfReward("game24")
        >>> prompt = "Numbers: 4 4 6 8 Target: 24\n"
        >>> found = reward_func([prompt + "8 + 4 = 12 left:"], [prompt], [None])
        >>> found["rewards"].shape, sorted(found["extra_logs"])
        (torch.Size([1]), ['logprob', 'mean_logprob', 'n_tokens'])
    """

    def __init__(
        self,
        model: "transformers.PreTrainedModel | str | Path",
        *,
        reward: str = "logprob",
        tokenizer: "transformers.PreTrainedTokenizerBase | None" = None,
        max_tokens: int = 16384,
        wait_seconds: float = 0.01,
        unscorable_reward: float | None = None,
    ):
        unscorable = UnscorableReward(finite_or_none(unscorable_reward))
        if reward not in REWARDS or options_needed(reward):
            known = ", ".join(name for name in REWARDS if not options_needed(name))
            raise InputError(f"`reward` must be one of {known}, got {reward!r}.")
        scorer = Scorer(model, tokenizer=tokenizer, max_tokens=max_tokens)
        self._state = ServerState(
            name=str(model) if isinstance(model, (str, Path)) else type(model).__name__,
            model=ModelLimits.of(scorer.model),
            limits=ServerLimits(),
            texts=Texts(scorer.tokenizer, generation_config=scorer.model.generation_config),
            reward=reward,
            unscorable=unscorable,
        )
        self._batcher: MicroBatcher[TokenStats] = MicroBatcher(
            scorer.score, max_tokens=max_tokens, wait_seconds=wait_seconds, max_queue=2**20
        )
        self._batcher.start()

    def __call__(
        self,
        queries: Sequence[str],
        prompts: Sequence[str],
        labels: Sequence[Any],
        # what a later version may add
        **kwargs: Any,
    ) -> dict[str, Tensor | dict[str, Tensor]]:
        """Rewards of whole texts that begin with their prompts; from any thread.

        Args:
            queries: Prompt and response, decoded with their special tokens.
            prompts: One a query.
            labels: Not read: the model judges itself.
            **kwargs: Not read.

        Returns:
            "rewards" and "scores", fp32 [N], and "extra_logs": fp32 [N] by name; of a response
            without a reward they are 0, and "unscorable" is 1.

        Raises:
            SharpenError: If a query does not begin with its prompt or an end of it, or has no
                reward and `unscorable_reward` is not given.
        """
        texts = query_rewards(list(queries), list(prompts), self._state)
        request = self._state.parsed(texts.jobs, lambda results: {})
        results = self._batcher.submit(request.jobs).future.result()
        found, columns = texts.rewards(results)
        rewards = torch.tensor(found, dtype=torch.float32)
        logs = {name: torch.tensor(column, dtype=torch.float32) for name, column in columns.items()}
        return {"rewards": rewards, "scores": rewards, "extra_logs": logs}


_LOCK = threading.Lock()


# one a process for equal settings
@functools.cache
def _opened(model: str, reward: str, unscorable_reward: float | None) -> SelfReward:
    return SelfReward(model, reward=reward, unscorable_reward=unscorable_reward)


# as `SelfReward.__call__`
def reward_func(
    queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **kwargs: Any
) -> dict[str, Tensor | dict[str, Tensor]]:
    """`SelfReward` of the model that the environment names, opened at the first call.

    Raises:
        InputError: If SHARPEN_MODEL is not set, SHARPEN_UNSCORABLE_REWARD is no finite number, and
            as `SelfReward`.
    """
    model = os.environ.get(MODEL_VARIABLE)
    if not model:
        raise InputError(
            f"the environment variable {MODEL_VARIABLE} must name the model that rates, got none; "
            "set it, or give OpenRLHF a file of your own with a SelfReward."
        )
    otherwise = _number(os.environ.get(UNSCORABLE_VARIABLE))
    # threads come together at the first call
    with _LOCK:
        function = _opened(model, os.environ.get(REWARD_VARIABLE, "logprob"), otherwise)
    return function(queries, prompts, labels, **kwargs)


def _number(text: str | None) -> float | None:
    if not text:
        return None
    try:
        return finite_or_none(float(text))
    except ValueError as error:
        raise InputError(
            f"the environment variable {UNSCORABLE_VARIABLE} must be a finite number, got {text!r}."
        ) from error
