"""TRL's trainers with prompts computed once: for GRPO, RLOO, DPO and KTO.

Each is TRL's own trainer, with the same arguments, metrics and losses; only the head that its
models are given is `fused_head`'s. Log-probs, entropies and gradients are those of TRL's head to
the model's own rounding. What is shared is what a forward sees: completions of one prompt in one
micro-batch, and, for old and reference log-probs, in the whole generation batch.
"""

from typing import Any

from transformers import ProcessorMixin

from sharpen.errors import InputError

from ._host import trainer_class
from .fused_head import add_fused_lm_head
from .reference_columns import use_reference_columns

# a name each, as a base class must be one
_GRPO, _RLOO = trainer_class("GRPOTrainer"), trainer_class("RLOOTrainer")
_DPO, _KTO = trainer_class("DPOTrainer"), trainer_class("KTOTrainer")


class SharedPrefixMixin:
    """Gives a trainer of TRL's the shared head; put it before the trainer among the bases.

    Args:
        *args: As the trainer takes them.
        max_tokens: Tokens of one packed row.
        **kwargs: As the trainer takes them.

    Raises:
        InputError: For sharded models (FSDP, DeepSpeed), Liger kernels and vision processors.
    """

    shared_outputs: tuple[str, ...] = ("log_probs", "entropy")

    def __init__(self, *args: Any, max_tokens: int = 16384, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # attributes of the trainer that this is mixed into
        trainer: Any = self
        _refuse(trainer)
        temperature = getattr(trainer, "temperature", 1.0)
        models = [(trainer.accelerator.unwrap_model(trainer.model), self.shared_outputs)]
        reference = getattr(trainer, "ref_model", None)
        if reference is not None:
            models.append((trainer.accelerator.unwrap_model(reference), ("log_probs",)))
        for model, outputs in models:
            base = model.get_base_model() if hasattr(model, "peft_config") else model
            add_fused_lm_head(base, temperature, outputs=outputs, max_tokens=max_tokens)


class _WholeGroups:
    """Of GRPO and RLOO: log-probs without gradients of a whole generation batch in one call."""

    # TRL cuts the batch into chunks of rows, and so would cut groups; `max_tokens` bounds memory
    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Any,
        attention_mask: Any,
        logits_to_keep: int,
        batch_size: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        own: Any = super()
        batch = model, input_ids, attention_mask, logits_to_keep, None
        return own._get_per_token_logps_and_entropies(*batch, *args, **kwargs)


class SharedPrefixGRPOTrainer(SharedPrefixMixin, _WholeGroups, _GRPO):
    """`trl.GRPOTrainer`, prompts computed once."""


class SharedPrefixRLOOTrainer(SharedPrefixMixin, _WholeGroups, _RLOO):
    """`trl.RLOOTrainer`, prompts computed once."""


class SharedPrefixDPOTrainer(SharedPrefixMixin, _DPO):
    """`trl.DPOTrainer`, prompts computed once, reference log-probs taken from columns if there.

    See `use_reference_columns` for the columns.
    """

    shared_outputs = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")

    def __init__(self, *args: Any, max_tokens: int = 16384, **kwargs: Any):
        super().__init__(*args, max_tokens=max_tokens, **kwargs)
        use_reference_columns(self, optional=True)


class SharedPrefixKTOTrainer(SharedPrefixMixin, _KTO):
    """`trl.KTOTrainer`, prompts computed once."""

    shared_outputs = ("log_probs", "entropy", "mean_logits")


def _refuse(trainer: Any) -> None:
    name, args = type(trainer).__name__, trainer.args
    sharded = [x for x in ("is_fsdp_enabled", "is_deepspeed_enabled") if getattr(trainer, x, False)]
    if sharded:
        raise InputError(
            f"{name} must have whole parameters in every process, got a sharded model "
            f"(`{sharded[0]}`); use one process, DDP, or TRL's own trainer."
        )
    if getattr(args, "use_liger_kernel", False):
        raise InputError(f"`use_liger_kernel` must be False for {name}, got True; leave it out.")
    if getattr(args, "cast_lm_head_to_fp32", False):
        raise InputError(
            f"`cast_lm_head_to_fp32` must be False for {name}, got True; leave it out: the shared "
            "head never rounds logits, whatever the dtype of its weight."
        )
    if isinstance(trainer.processing_class, ProcessorMixin):
        raise InputError(
            f"{name} must be given a tokenizer, got {type(trainer.processing_class).__name__}; "
            "images need TRL's own trainer."
        )
