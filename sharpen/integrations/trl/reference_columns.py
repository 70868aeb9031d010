"""Reference log-probs that come with the data of a DPOTrainer, instead of a reference model.

TRL's collator carries the columns `ref_chosen_logps` and `ref_rejected_logps` (nats, summed over a
completion) into each batch, and TRL 1.15 and 1.16 read them there only where
`precompute_ref_logps` is set, which its own option sets and then fails on data that has the columns
already. So it is set here, on the finished trainer: an attribute that TRL names without underscore.
"""

from typing import Any

from sharpen.errors import InputError

COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


def use_reference_columns(trainer: Any, *, optional: bool = False) -> bool:
    """Let a finished `DPOTrainer` read its reference from the columns of its data.

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
    names = {name: _names(data) for name, data in sets.items() if data is not None}
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


def _names(data: Any) -> set[str]:
    return set(data.column_names or next(iter(data)))
