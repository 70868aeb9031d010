"""Whose probabilities a self-reward is made of: the policy's, the reference's or the base's.

policy     the live model, as it is at this step
reference  what the trainer's KL term compares with: the adapter "ref", the model without
           adapters, or the trainer's `ref_model`
base       the policy before its first step: without adapters, or a frozen copy
a model    of one's own, loaded or by path: frozen
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from sharpen.errors import InputError
from sharpen.scoring import Scorer

from .bare_forward import bare_forward

ROLES = ("policy", "reference", "base")


class Judge:
    """Hands out the scorer of one of these models.

    Args:
        under: A role, or a model of one's own: loaded, a path or a hub id.
        max_tokens: Of the scorer.
    """

    # a transformers or peft model, or a name
    def __init__(self, under: Any, max_tokens: int):
        self.role = under if isinstance(under, str) and under in ROLES else None
        self.max_tokens = max_tokens
        self._own: Any = None if self.role else under
        # a model, once there is one
        self._base: Any = None
        self._scorer: Scorer | None = None

    # the trainer's model
    def keep(self, policy: Any) -> None:
        """Remember the base, while the policy still is it."""
        if self.role == "base" and self._base is None and not _has_adapters(policy):
            self._base = _frozen_copy(policy)

    # models, and where training stands
    @contextmanager
    def scorer(self, policy: Any, reference: Any, step: int) -> Iterator[Scorer]:
        """The scorer, with the adapters that it needs.

        Args:
            policy: The trainer's model, None where no trainer is known.
            reference: Its reference model, None where it has none.
            step: Optimizer steps taken.

        Raises:
            InputError: If the model that was asked for is not there, or is sharded.
        """
        if self.role is None:
            yield self._of(self._own)
            return
        if policy is None:
            raise InputError(
                f"`under`={self.role!r} needs the trainer's model, got none; pass the reward as "
                "`callbacks=[reward]` too, or name a model by its path."
            )
        if self.role == "policy":
            yield self._of(policy)
        elif _has_adapters(policy):
            with _without_training(policy, reference_adapter=self.role == "reference"):
                yield self._of(policy)
        elif self.role == "reference":
            if reference is None:
                raise InputError(
                    "`under`='reference' needs a reference model, got a trainer without one; set "
                    "its `beta` above 0, or take 'base'."
                )
            yield self._of(reference)
        else:
            if self._base is None and step > 0:
                raise InputError(
                    f"`under`='base' must be kept before the first step, got step {step}; pass the "
                    "reward as `callbacks=[reward]` too, or name the base by its path."
                )
            self.keep(policy)
            base: Any = self._base
            yield self._of(base.to(policy.device))

    def _of(self, model: Any) -> Scorer:
        if not isinstance(model, (str, Path)):
            model = _unwrapped(model)
            _refuse_sharded(model)
        if self._scorer is None or (self._scorer.model is not model and model is not self._own):
            self._scorer = Scorer(model, max_tokens=self.max_tokens)
            with bare_forward(self._scorer.model):
                # found now, and kept
                _ = self._scorer.route
        return self._scorer


def _has_adapters(model: Any) -> bool:
    return hasattr(_unwrapped(model), "peft_config")


def _without_training(model: Any, *, reference_adapter: bool):
    """The policy as it was: its reference adapter, or no adapter."""
    model = _unwrapped(model)
    if reference_adapter and "ref" in model.peft_config:
        return _under_adapter(model, "ref")
    return model.disable_adapter()


@contextmanager
def _under_adapter(model: Any, name: str) -> Iterator[None]:
    active = model.active_adapter
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter(active)


def _unwrapped(model: Any) -> Any:
    """The model inside DDP."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _frozen_copy(model: Any) -> Any:
    # a trainer may have replaced forwards by closures over the model itself
    found = copy.deepcopy(_unwrapped(model))
    for part in found.modules():
        for name in ("forward", "_original_forward"):
            vars(part).pop(name, None)
    return found.requires_grad_(False).eval()


def _refuse_sharded(model: nn.Module) -> None:
    if any(hasattr(p, "ds_id") or hasattr(p, "placements") for p in model.parameters()):
        raise InputError(
            "`under` must be a model whose parameters are whole in this process, got a sharded "
            "one (FSDP, DeepSpeed ZeRO-3); name a model by its path, or serve the scorer."
        )
