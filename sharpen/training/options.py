"""How to fit: our few options, and any further field of `transformers.TrainingArguments`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sharpen.errors import InputError, check_fields

from .distributed import check_device

if TYPE_CHECKING:
    from transformers import TrainingArguments

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
    "label_names": "nothing",
    "use_cpu": "--device",
}
# what would be ignored in silence, or break a promise
NO_TEST = "there is nothing to evaluate on; judge the model with `sharpen bon`"
NO_WAY = "several processes run DDP, or FSDP (`fsdp=true`)"
REFUSED = {
    "auto_find_batch_size": "a step is made of whole prompts; `--max-tokens` bounds its memory",
    "debug": "it looks into forwards that are not there",
    "deepspeed": NO_WAY,
    "eval_on_start": NO_TEST,
    "eval_strategy": NO_TEST,
    "ignore_data_skip": "a resumed run must see what an unbroken one sees",
    "label_smoothing_factor": "the losses here have no labels",
    "load_best_model_at_end": NO_TEST,
    "neftune_noise_alpha": "a log-ratio must not be noise",
    "parallelism_config": NO_WAY,
    "push_to_hub": "nothing is uploaded; push `model/` when it is there",
    "resume_from_checkpoint": "the same command goes on from its own last checkpoint",
    "save_only_model": "a resumed run needs the optimizer",
    "torch_compile": "shared prompts change what a forward does",
    "train_sampling_strategy": "groups of completions have no single length",
    "use_liger_kernel": "the losses here make no logits already",
}
AT_LEAST = {"gradient_accumulation_steps": 1, "dataloader_num_workers": 0}


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
        """Check the ranges."""
        rules = [
            ("lr", 0 < self.lr < float("inf"), "above 0 and finite"),
            ("epochs", 0 < self.epochs < float("inf"), "above 0 and finite"),
            ("batch", self.batch >= 1, "at least 1"),
            ("lora_rank", self.lora_rank >= 0, "at least 0"),
            ("save_every", self.save_every >= 1, "at least 1"),
        ]
        check_fields(self, rules)


def more_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """Fields of `transformers.TrainingArguments` from NAME=VALUE, values in JSON or plain text.

    Raises:
        InputError: If one is not NAME=VALUE, has no such field, or one that a loop sets itself or
            cannot do.

    Example:
        >>> more_arguments(["bf16=true", "weight_decay=0.1", "lr_scheduler_type=cosine"])
        {'bf16': True, 'weight_decay': 0.1, 'lr_scheduler_type': 'cosine'}
    """
    from transformers import TrainingArguments

    known = {f.name: f.default for f in fields(TrainingArguments)}
    found: dict[str, Any] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator or name not in known:
            raise InputError(
                f"`trainer` must be NAME=VALUE with a field of transformers.TrainingArguments, "
                f"got {pair!r}."
            )
        if name in OURS:
            raise InputError(f"`trainer` must not set {name}, which {OURS[name]} sets.")
        if name in REFUSED:
            raise InputError(f"`trainer` must not set {name}: {REFUSED[name]}.")
        if name in found:
            raise InputError(f"`trainer` must set {name} once, got {pair!r} too.")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        found[name] = _checked(name, value, known[name])
    return found


# Any: fields of all types
def _checked(name: str, value: Any, default: Any) -> Any:
    """A switch for a switch, a number for a number, in its range."""
    is_switch, is_number = isinstance(value, bool), type(value) in (int, float)
    if isinstance(default, bool) and not is_switch:
        raise InputError(f"`trainer` must set {name} to true or false, got {value!r}.")
    if type(default) in (int, float) and not is_number:
        raise InputError(f"`trainer` must set {name} to a number, got {value!r}.")
    if name in AT_LEAST and value < AT_LEAST[name]:
        raise InputError(f"`trainer` must set {name} to {AT_LEAST[name]} or more, got {value}.")
    return value


def trainer_arguments(options: FitOptions, folder: Path, *, is_cpu: bool) -> "TrainingArguments":
    """What a Trainer is told; nothing is written.

    Raises:
        InputError: If transformers refuses them, or what they name is not installed.
    """
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
        _try(args)
        check_device(args)
    except InputError:
        raise
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise refused_arguments(error) from error
    if args.save_total_limit == 1:
        raise InputError(
            "`trainer` must leave save_total_limit at 2 or more, got 1: a kill while the only "
            "checkpoint is written would lose it."
        )
    # one process, one device: DataParallel would cut groups apart
    args._n_gpu = min(args.n_gpu, 1)
    return args


def _try(args: "TrainingArguments") -> None:
    """Make what a Trainer makes when it begins, so that it fails before anything is drawn."""
    from transformers import Trainer, get_scheduler
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    for callback in get_reporting_integration_callbacks(args.report_to):
        callback()
    kind, given = Trainer.get_optimizer_cls_and_kwargs(args)
    # others want a model, and may keep to it
    if kind.__module__.startswith("torch."):
        optimizer = kind([nn.Parameter(torch.zeros(1))], **given)
        more = args.lr_scheduler_kwargs
        assert not isinstance(more, str), "parsed by TrainingArguments"
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 1, scheduler_specific_kwargs=more)


def refused_arguments(error: Exception) -> InputError:
    """What transformers says of its arguments, in one line."""
    reason = " ".join(str(error).split())
    return InputError(f"`trainer`: transformers refuses these arguments ({reason}).")
