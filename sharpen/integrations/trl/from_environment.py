"""A `SelfReward` that needs no code: named in a configuration file, set up by its environment.

    # trl grpo --config run.yaml
    reward_funcs: [sharpen.integrations.trl.self_reward]
    env:
      SHARPEN_REWARD: mean_logprob

| variable | holds | default |
|---|---|---|
| SHARPEN_REWARD | the reward | logprob |
| SHARPEN_REWARD_UNDER | policy, reference, base, or a path or hub id | policy |
| SHARPEN_REWARD_NORMALIZE | 1: by group | 0 |
| SHARPEN_REWARD_ANSWER | dotted path of a function from text to its answer | none |
| SHARPEN_REWARD_MAX_TOKENS | tokens of one forward | 16384 |

They are read at the first call. The trainer is asked for its model by way of `log_metric`; where
the object is passed as a callback too, that is not needed.
"""

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import TrainerCallback

from sharpen.errors import InputError

from .reward import SelfReward

PREFIX = "SHARPEN_REWARD"


def reward_from(environment: Mapping[str, str]) -> SelfReward:
    """The reward that the variables describe.

    Raises:
        InputError: If one of them is not as above, or has another name.
    """
    known = {"": "logprob", "_UNDER": "policy", "_NORMALIZE": "0", "_ANSWER": "", "_MAX_TOKENS": ""}
    names = {PREFIX + ending for ending in known}
    unknown = [name for name in environment if name.startswith(PREFIX) and name not in names]
    if unknown:
        raise InputError(f"variables must be of {', '.join(sorted(names))}, got {unknown[0]}.")
    reward, under, normalize, answer, max_tokens = (
        environment.get(PREFIX + ending, default) for ending, default in known.items()
    )
    if normalize not in ("0", "1"):
        raise InputError(f"{PREFIX}_NORMALIZE must be 0 or 1, got {normalize!r}.")
    if max_tokens and not max_tokens.isdecimal():
        raise InputError(f"{PREFIX}_MAX_TOKENS must be a number above 0, got {max_tokens!r}.")
    return SelfReward(
        reward,
        under=under,
        normalize=normalize == "1",
        answer=_imported(answer) if answer else None,
        max_tokens=int(max_tokens or 16384),
    )


class EnvironmentReward(TrainerCallback):
    """`SelfReward`, made of the environment when it is first needed."""

    __name__ = "self_reward"

    def __init__(self):
        self._made: SelfReward | None = None

    @property
    def reward(self) -> SelfReward:
        """What it stands for."""
        if self._made is None:
            self._made = reward_from(os.environ)
        return self._made

    # as TrainerCallback
    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """See `SelfReward`."""
        self.reward.on_init_end(args, state, control, **given)

    # as TrainerCallback
    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """See `SelfReward`."""
        self.reward.on_train_begin(args, state, control, **given)

    # as SelfReward
    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **given: Any,
    ) -> list[float | None]:
        """See `SelfReward`."""
        return self.reward(prompts, completions, completion_ids, **given)


self_reward = EnvironmentReward()


# what it returns for a text is its own affair
def _imported(path: str) -> Callable[[str], Any]:
    module, _, name = path.rpartition(".")
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"{PREFIX}_ANSWER must be the dotted path of a function, got {path!r} ({error})."
        ) from error
    if not callable(found):
        raise InputError(f"{PREFIX}_ANSWER must name a function, got {path!r}, which is none.")
    return found
