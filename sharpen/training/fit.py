"""Fit a model to groups of completions, so that a killed run goes on to the same weights.

Writes into a folder: `checkpoints/` (the last two), `losses.jsonl`, and at the end `model/`, which
is there whole or not at all.
"""

import importlib.util
import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sharpen.errors import InputError

from .groups import Group
from .objectives import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

MODEL, LOSSES, CHECKPOINTS = "model", "losses.jsonl", "checkpoints"
# what a loop decides by itself
OURS = {
    "output_dir": "--out",
    "learning_rate": "--lr",
    "num_train_epochs": "--epochs",
    "per_device_train_batch_size": "--batch",
    "save_steps": "--save-every",
    "seed": "--seed",
    "remove_unused_columns": "nothing",
    "save_strategy": "--save-every",
}


@dataclass(frozen=True)
class FitOptions:
    """How to fit.

    Attributes:
        lr: Peak learning rate of AdamW; falls linearly to 0.
        epochs: Passes over all groups.
        batch: Prompts a step, each with all of its completions.
        lora_rank: Rank of LoRA adapters on all linear layers; 0 trains every weight.
        save_every: Steps between checkpoints.
        seed: Order of the groups, and initial adapters.
        max_tokens: Most tokens in one graph; see `GroupTrainer`.
        more: Further fields of `transformers.TrainingArguments`.
    """

    lr: float = 1e-4
    epochs: float = 1.0
    batch: int = 8
    lora_rank: int = 0
    save_every: int = 100
    seed: int = 0
    max_tokens: int = 16384
    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what cannot be fitted.

        Raises:
            InputError: If a value is out of its range.
        """
        rules = [
            ("lr", 0 < self.lr < float("inf"), "above 0 and finite"),
            ("epochs", 0 < self.epochs < float("inf"), "above 0 and finite"),
            ("batch", self.batch >= 1, "at least 1"),
            ("lora_rank", self.lora_rank >= 0, "at least 0"),
            ("save_every", self.save_every >= 1, "at least 1"),
        ]
        for name, holds, wanted in rules:
            if not holds:
                raise InputError(f"`{name}` must be {wanted}, got {getattr(self, name)}.")


def require_train(*, lora: bool = False) -> None:
    """Refuse to begin without what training needs beside transformers.

    Raises:
        InputError: If accelerate, or peft where it is needed, is not installed.
    """
    for name in ("accelerate", "peft") if lora else ("accelerate",):
        if importlib.util.find_spec(name) is None:
            raise InputError(f'training needs {name}; pip install "sharpen[train]".')


def more_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """Fields of `transformers.TrainingArguments` from NAME=VALUE, values in JSON or plain text.

    Raises:
        InputError: If one is not NAME=VALUE, has no such field, or one that a loop sets itself.

    Example:
        >>> more_arguments(["bf16=true", "weight_decay=0.1", "lr_scheduler_type=cosine"])
        {'bf16': True, 'weight_decay': 0.1, 'lr_scheduler_type': 'cosine'}
    """
    from transformers import TrainingArguments

    known = {f.name for f in fields(TrainingArguments)}
    found = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator or name not in known:
            raise InputError(
                f"`trainer` must be NAME=VALUE with a field of transformers.TrainingArguments, "
                f"got {pair!r}."
            )
        if name in OURS:
            raise InputError(f"`trainer` must not set {name}, which {OURS[name]} sets.")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


def fit(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    groups: Sequence[Group],
    objective: Objective,
    options: FitOptions,
    out: Path,
) -> None:
    """Train `model`, in place, and save it as `out/model`; nothing where that is there already.

    Dropout is turned off: a log-ratio to the base model must not be noise. On a CPU a run that was
    killed and begun again ends with the same bits as one that was not.

    Args:
        model: Its weights are changed; with LoRA they end merged.
        tokenizer: Saved beside the model.
        groups: What to fit.
        objective: Loss of a batch.
        options: How.
        out: Folder of this run alone.

    Raises:
        InputError: If an extra is missing, there is no group, or the arguments are refused.
    """
    if (out / MODEL).exists():
        return
    require_train(lora=options.lora_rank > 0)
    from .callbacks import Bar, LossLog, Seal, last_sealed
    from .trainer import GroupTrainer

    args = _arguments(options, out / CHECKPOINTS, is_cpu=model.device.type == "cpu")
    trained: Any = _with_lora(model, options) if options.lora_rank else model
    _drop_dropout(trained)
    trainer = GroupTrainer(
        trained, groups, objective, args,
        max_tokens=options.max_tokens, callbacks=[LossLog(out / LOSSES), Seal(), Bar()],
    )  # fmt: skip
    _only_our_bar(trainer)
    sealed = last_sealed(out / CHECKPOINTS)
    trainer.train(resume_from_checkpoint=None if sealed is None else str(sealed))
    whole = trained.merge_and_unload() if options.lora_rank else model
    save_whole(whole.eval(), tokenizer, out / MODEL)


def save_whole(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None", folder: Path
) -> None:
    """Save a model and its tokenizer as `folder`, which is there whole or not at all."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    if tokenizer is not None:
        tokenizer.save_pretrained(part)
    os.replace(part, folder)


def _arguments(options: FitOptions, folder: Path, *, is_cpu: bool) -> "TrainingArguments":
    from transformers import TrainingArguments

    given: dict[str, Any] = {
        "output_dir": str(folder),
        "learning_rate": options.lr,
        "num_train_epochs": options.epochs,
        "per_device_train_batch_size": options.batch,
        "save_strategy": "steps",
        "save_steps": options.save_every,
        # the one before the last is whole, whatever happens to the last
        "save_total_limit": 2,
        "seed": options.seed,
        "logging_steps": 10,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "remove_unused_columns": False,
        "label_names": [],
        "dataloader_pin_memory": False,
        "use_cpu": is_cpu,
    }
    try:
        args = TrainingArguments(**given | dict(options.more))
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"`trainer`: transformers refuses these arguments ({reason}).") from error
    # one process, one device: DataParallel would cut groups apart
    args._n_gpu = min(args.n_gpu, 1)
    return args


def _with_lora(model: "PreTrainedModel", options: FitOptions) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(options.seed)
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=2 * options.lora_rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft asks transformers under a name that is on its way out
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config)


def _drop_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # attention takes its rate as a number
        for name in ("attention_dropout", "dropout"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)


def _only_our_bar(trainer: Any) -> None:
    """The Trainer's own bars print dictionaries to stdout, which is for results."""
    from transformers import PrinterCallback, ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
