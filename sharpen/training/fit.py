"""Fit a model to groups of completions, so that a killed run goes on to the same weights.

Writes into a folder: `checkpoints/` (the last two), `losses.jsonl`, and at the end `model/`, which
is there whole or not at all. Of several processes the first writes, but for its own part of a
checkpoint that each keeps.
"""

import copy
import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sharpen.errors import InputError, TrainingError

from .groups import Group
from .noise import without_noise
from .objectives import Objective
from .options import FitOptions, refused_arguments, trainer_arguments
from .processes import is_for_cpu, of_the_first
from .saving import save_whole

if TYPE_CHECKING:
    from transformers import (
        GenerationConfig,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

MODEL, LOSSES, CHECKPOINTS = "model", "losses.jsonl", "checkpoints"


def require_train(*, lora: bool = False) -> None:
    """Refuse to begin without what training needs beside transformers.

    Raises:
        InputError: If accelerate, or peft where it is needed, is not installed.
    """
    for name in ("accelerate", "peft") if lora else ("accelerate",):
        if importlib.util.find_spec(name) is None:
            raise InputError(f'training needs {name}; pip install "sharpen[train]".')


def fit(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    groups: Sequence[Group],
    objective: Objective,
    options: FitOptions,
    out: Path,
) -> None:
    """Train `model`, in place, and save it as `out/model`; nothing where that is there already.

    Dropout is off meanwhile: a log-ratio to the base model must not be noise. On a CPU a run that
    was killed and begun again ends with the same bits as one that was not. Started by `accelerate
    launch` or torchrun, all processes call it alike, with one folder that all of them see.

    Args:
        model: Its weights are changed; with LoRA they end merged, with FSDP in parts. Processes of
            a launcher load it on the CPU, and each moves it to its own GPU.
        tokenizer: Saved beside the model.
        groups: What to fit.
        objective: Loss of a batch.
        options: How.
        out: Folder of this run alone.

    Raises:
        InputError: If an extra is missing, there is no group, or the arguments are refused.
        TrainingError: If a weight ends as NaN or infinity; no model is saved.
    """
    if (out / MODEL).exists():
        return
    require_train(lora=options.lora_rank > 0)
    from .callbacks import Bar, LossLog, Seal, last_sealed
    from .trainer import GroupTrainer

    args = trainer_arguments(options, out / CHECKPOINTS, is_cpu=is_for_cpu(model))
    # before FSDP changes the class, and the Trainer the configuration
    kind, config = type(model), copy.deepcopy(model.config)
    trained: Any = _with_lora(model, options) if options.lora_rank else model
    with without_noise(trained):
        try:
            trainer = GroupTrainer(
                trained, groups, objective, args,
                max_tokens=options.max_tokens, callbacks=[LossLog(out / LOSSES), Seal(), Bar()],
            )  # fmt: skip
        except InputError:
            raise
        except (ImportError, KeyError, ValueError) as error:
            raise refused_arguments(error) from error
        _only_our_bar(trainer)
        sealed = last_sealed(out / CHECKPOINTS)
        trainer.train(resume_from_checkpoint=None if sealed is None else str(sealed))
    if trainer.lockstep is None:
        whole = trained.merge_and_unload() if options.lora_rank else model
        of_the_first(partial(_save, whole.eval(), tokenizer, out))
        return
    # all processes must ask; only the first is given it
    state = trainer.accelerator.get_state_dict(trained)
    generation = model.eval().generation_config
    of_the_first(lambda: _save(_gathered(kind, config, generation, options, state), tokenizer, out))


def _save(model: "PreTrainedModel", tokenizer: Any, out: Path) -> None:
    _refuse_diverged(model, out)
    save_whole(model, tokenizer, out / MODEL)


def _refuse_diverged(model: nn.Module, out: Path) -> None:
    broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if broken:
        raise TrainingError(
            f"training diverged: {len(broken)} weights, {broken[0]} first, hold NaN or infinity "
            f"(see {str(out / LOSSES)!r}); lower `--lr`, and take another `--out`."
        )


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


def _gathered(
    kind: "type[PreTrainedModel]",
    config: "PreTrainedConfig",
    generation: "GenerationConfig | None",
    options: FitOptions,
    state: Mapping[str, Any],
) -> "PreTrainedModel":
    """A model of gathered weights, adapters merged."""
    with torch.device("meta"):
        model = kind(config)
        trained: Any = _with_lora(model, options) if options.lora_rank else model
    trained.load_state_dict(state, assign=True)
    model.tie_weights()
    if generation is not None:
        model.generation_config = generation
    return trained.merge_and_unload() if options.lora_rank else model


def _only_our_bar(trainer: Any) -> None:
    """The Trainer's own bars print dictionaries to stdout, which is for results."""
    from transformers import PrinterCallback, ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
