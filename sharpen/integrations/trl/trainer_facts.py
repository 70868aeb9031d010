"""What a reward function has to know of the trainer that calls it.

A callback is told the model, the tokenizer and the arguments: that is the way to be preferred. A
reward named in a configuration file is no callback; TRL then still hands it `log_metric`, a method
of the trainer, and the trainer is asked by that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sharpen.errors import InputError


@dataclass
class Facts:
    """Of a trainer, None where it is not known.

    Attributes:
        model: What is trained.
        tokenizer: Its `processing_class`.
        args: Its arguments.
        trainer: Itself, where it can be asked.
        state: How far it is.
    """

    # a trainer's own attributes, whatever they hold
    model: Any = None
    tokenizer: Any = None
    args: Any = None
    trainer: Any = None
    state: Any = field(default=None, repr=False)

    # what callbacks are given
    def meet(self, args: Any, given: Mapping[str, Any]) -> None:
        """Take over what a callback is told."""
        self.args = args
        self.model = given.get("model") or self.model
        self.tokenizer = given.get("processing_class") or self.tokenizer

    # what reward functions are given
    def seen(self, given: Mapping[str, Any]) -> "Facts":
        """These facts, and what a call of the reward function lets one find out."""
        trainer = getattr(given.get("log_metric"), "__self__", None)
        trainer = trainer if hasattr(trainer, "accelerator") else None
        return Facts(
            model=self.model or getattr(trainer, "model", None),
            tokenizer=self.tokenizer or getattr(trainer, "processing_class", None),
            args=self.args or getattr(trainer, "args", None),
            trainer=trainer,
            state=given.get("trainer_state"),
        )

    @property
    def ref_model(self) -> Any:
        """The reference model, where the trainer can be asked and has one."""
        return getattr(self.trainer, "ref_model", None)

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return getattr(self.state, "global_step", 0) or 0

    @property
    def template(self) -> dict[str, Any]:
        """What TRL calls the chat template with, beside the messages."""
        found = dict(getattr(self.args, "chat_template_kwargs", None) or {})
        for name in ("chat_template", "tools"):
            value = getattr(self.trainer, name, None)
            if value:
                found[name] = value
        return found

    def check_rendered_here(self) -> None:
        """Refuse a trainer that renders prompts in a way that is not known here.

        Raises:
            InputError: If it has environments, whose tools go into each prompt.
        """
        if getattr(self.trainer, "environments", None):
            raise InputError(
                "`prompts` of environments are rendered with tools of their own; let the rollout "
                "hand over `prompt_token_ids`."
            )

    def check_whole(self, sizes: Sequence[int]) -> None:
        """Refuse groups that are cut between processes, where a reward looks at the group.

        Raises:
            InputError: If there are several processes and a group is not whole.
        """
        n = getattr(self.args, "num_generations", None)
        if getattr(self.args, "world_size", 1) > 1 and n and any(size % n for size in sizes):
            raise InputError(
                f"a reward of groups must see all {n} completions of a prompt in one process, got "
                f"{min(sizes)}; make `per_device_train_batch_size` a multiple of "
                "`num_generations`."
            )
