"""TRL's trainers with prompts computed once: for GRPO, RLOO, DPO and KTO.

Each is TRL's own trainer, with the same arguments, metrics and losses; only the head that its
models are given is `fused_head`'s. Log-probs, entropies and gradients are those of TRL's head to
the model's own rounding. What is shared is what a forward sees: completions of one prompt in one
micro-batch, and, for old and reference log-probs, in the whole generation batch.
"""

import inspect
from typing import Any

from transformers import ProcessorMixin

from sharpen.errors import InputError

from .fused_head import host, put_head


# a class of a package that may not be there
def trainer_class(name: str) -> Any:
    """TRL's trainer `name`; where TRL is not there, a class that says so when it is called."""
    try:
        return getattr(host(), name)
    except InputError as error:
        message = str(error)

    class Missing:
        # as the trainer
        def __init__(self, *args: Any, **kwargs: Any):
            raise InputError(message)

    return Missing


# a name each, as a base class must be one
_GRPO, _RLOO = trainer_class("GRPOTrainer"), trainer_class("RLOOTrainer")
_DPO, _KTO = trainer_class("DPOTrainer"), trainer_class("KTOTrainer")

# of GRPO and RLOO in TRL 1.15 and 1.16: private, and held on to by a test and at construction
PER_TOKEN = "_get_per_token_logps_and_entropies"
TAKES = ("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size")
# of a data set for DPO
COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
OTHER_TRL = "take TRL 1.15 or 1.16, a newer sharpen, or TRL's own trainer"


class SharedPrefixMixin:
    """Gives a trainer of TRL's the shared head; put it before the trainer among the bases.

    Args:
        *args: As the trainer takes them.
        max_tokens: Tokens of one packed row.
        **kwargs: As the trainer takes them.

    Raises:
        InputError: For sharded models (FSDP, DeepSpeed), Liger kernels and vision processors, and
            for a TRL whose trainers are built otherwise.
    """

    shared_outputs: tuple[str, ...] = ("log_probs", "entropy")

    def __init__(self, *args: Any, max_tokens: int = 16384, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # attributes of the trainer that this is mixed into
        trainer: Any = self
        _check_supported(trainer)
        temperature = getattr(trainer, "temperature", 1.0)
        models = [(trainer.accelerator.unwrap_model(trainer.model), self.shared_outputs)]
        reference = getattr(trainer, "ref_model", None)
        if reference is not None:
            models.append((trainer.accelerator.unwrap_model(reference), ("log_probs",)))
        heads = []
        for model, outputs in models:
            base = model.get_base_model() if hasattr(model, "peft_config") else model
            heads.append(put_head(base, temperature, False, outputs, max_tokens))
        self._policy_head = heads[0]

    # as `transformers.Trainer.compute_loss`
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own loss.

        Raises:
            InputError: If TRL computed it without the head that it was given.
        """
        own: Any = super()
        before = self._policy_head.n
        found = own.compute_loss(*args, **kwargs)
        if self._policy_head.n == before:
            raise InputError(
                f"{type(self).__name__} is for trainers that call their model with "
                f"`fused_lm_head=True`, got TRL {host().__version__}, whose trainer did not; "
                f"{OTHER_TRL}."
            )
        return found


class _WholeGroups:
    """Of GRPO and RLOO: log-probs without gradients of a whole generation batch in one call."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        own: Any = getattr(super(), PER_TOKEN, None)
        names = [] if own is None else list(inspect.signature(own).parameters)
        if names[: len(TAKES)] != list(TAKES):
            got = f"one that takes {', '.join(names)}" if names else "none"
            raise InputError(
                f"{type(self).__name__} needs TRL's method {PER_TOKEN}({', '.join(TAKES)}, ...), "
                f"got {got} in TRL {host().__version__}; {OTHER_TRL}."
            )

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
        """TRL's own, of the whole batch."""
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


def use_reference_columns(trainer: Any, *, optional: bool = False) -> bool:
    """Let a finished `DPOTrainer` read its reference log-probs from the columns of its data.

    TRL's collator carries the columns `ref_chosen_logps` and `ref_rejected_logps` (nats, summed
    over a completion) into each batch, and TRL 1.15 and 1.16 read them there only where
    `precompute_ref_logps` is set, which its own option sets and then fails on data that has the
    columns already. So it is set here, on the finished trainer: an attribute that TRL names without
    underscore.

    A reference model that the trainer holds is let go: its memory is free for the first step. In
    evaluation the same columns are read, so every evaluation set must have them.

    Args:
        trainer: A `trl.DPOTrainer` after its construction.
        optional: Do nothing where no set has the columns.

    Returns:
        Whether the columns are used.

    Raises:
        InputError: If a set lacks a column, or the reference is not fixed (`sync_ref_model`).
    """
    sets = {"train_dataset": trainer.train_dataset}
    own = trainer.eval_dataset
    sets |= own if isinstance(own, dict) else {"eval_dataset": own}
    names = {name: _column_names(data) for name, data in sets.items() if data is not None}
    # the trainer has computed them itself
    if trainer.precompute_ref_logps and optional:
        return False
    if optional and not any(set(COLUMNS) & found for found in names.values()):
        return False
    for name, found in names.items():
        missing = [column for column in COLUMNS if column not in found]
        if missing:
            raise InputError(
                f"`{name}` must have the columns {' and '.join(COLUMNS)}, got none called "
                f"{missing[0]}; add both to every set, or to none."
            )
    if trainer.args.sync_ref_model:
        raise InputError(
            "`sync_ref_model` must be False with reference columns, got True: they are of one "
            "fixed model."
        )
    trainer.precompute_ref_logps = True
    trainer.ref_model = None
    return True


def _column_names(data: Any) -> set[str]:
    """Of a data set, or of rows."""
    return set(data.column_names or next(iter(data)))


def _check_supported(trainer: Any) -> None:
    """Reject what the shared head cannot do."""
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
