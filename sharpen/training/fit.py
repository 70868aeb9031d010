"""Fit a model to groups of completions, so that a killed run resumes to the same weights.

`fit` writes a folder that one process or several share:

    checkpoints/     the last two; one that is not marked complete is never resumed from
    losses.jsonl     one row a logged step, the same in a run that was resumed
    model/           at the end, whole or not at all

Below it, in the order of their use: LoRA, training without dropout, callbacks, saving. Of several
processes the first writes, but for its own part of a checkpoint that each keeps. accelerate and
peft come with an extra, so what needs them is imported where it runs.
"""

import copy
import importlib.util
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sharpen.errors import InputError, TrainingError
from sharpen.records import write_rows, write_text

from .distributed import broadcast_from_first, is_for_cpu
from .groups import Group
from .losses import Objective
from .options import FitOptions, refused_arguments, trainer_arguments

if TYPE_CHECKING:
    from transformers import (
        GenerationConfig,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

MODEL, LOSSES, CHECKPOINTS = "model", "losses.jsonl", "checkpoints"
# in a checkpoint whose files are all there
COMPLETE = "complete"
# first in a row of losses.jsonl, in this order
LOGGED = ("step", "epoch", "loss", "grad_norm", "learning_rate")
# of rates that a module, or a configuration it reads in its forward, holds as a plain number
NOISY = ("drop", "jitter")


def require_train(*, lora: bool = False) -> None:
    """Reject training without what it needs beside transformers.

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
    from .trainer import GroupTrainer

    args = trainer_arguments(options, out / CHECKPOINTS, is_cpu=is_for_cpu(model))
    # before FSDP changes the class, and the Trainer the configuration
    model_class, config = type(model), copy.deepcopy(model.config)
    trained: Any = _with_lora(model, options) if options.lora_rank else model
    with dropout_disabled(trained):
        try:
            trainer = GroupTrainer(
                trained,
                groups,
                objective,
                args,
                max_tokens=options.max_tokens,
                callbacks=[LossLog(out / LOSSES), CompleteMarker()],
            )
        except InputError:
            raise
        except (ImportError, KeyError, ValueError) as error:
            raise refused_arguments(error) from error
        # they print dictionaries to stdout, which is for results
        for printer in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(printer)
        trainer.add_callback(Progress())
        checkpoint = last_complete(out / CHECKPOINTS)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.lockstep is None:
        whole = trained.merge_and_unload() if options.lora_rank else model
        broadcast_from_first(partial(_save, whole.eval(), tokenizer, out))
        return
    # all processes must ask; only the first is given it
    state = trainer.accelerator.get_state_dict(trained)
    generation = model.eval().generation_config
    broadcast_from_first(
        lambda: _save(_gathered(model_class, config, generation, options, state), tokenizer, out)
    )


def _with_lora(model: "PreTrainedModel", options: FitOptions) -> nn.Module:
    """`model` with adapters on all linear layers; initial ones are those of the seed."""
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
    model_class: "type[PreTrainedModel]",
    config: "PreTrainedConfig",
    generation: "GenerationConfig | None",
    options: FitOptions,
    state: Mapping[str, Any],
) -> "PreTrainedModel":
    """A model of gathered weights, adapters merged."""
    with torch.device("meta"):
        model = model_class(config)
        trained: Any = _with_lora(model, options) if options.lora_rank else model
    trained.load_state_dict(state, assign=True)
    model.tie_weights()
    if generation is not None:
        model.generation_config = generation
    return trained.merge_and_unload() if options.lora_rank else model


@contextmanager
def dropout_disabled(model: nn.Module) -> Iterator[None]:
    """While open, every rate of dropout and of router jitter in `model` is 0.

    Rates are found by name, in `nn.Dropout` layers, in modules that hold a number, and in
    configurations. They come back in the end, so a saved configuration keeps its own.
    """
    before: list[tuple[Any, str, float]] = []
    for holder in _holders(model):
        is_layer = isinstance(holder, nn.modules.dropout._DropoutNd)
        for name, value in vars(holder).items():
            is_rate = any(word in name for word in NOISY) or (is_layer and name == "p")
            if is_rate and isinstance(value, float) and value != 0:
                before.append((holder, name, value))
    for holder, name, _ in before:
        setattr(holder, name, 0.0)
    try:
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)


# Any: configurations of any class
def _holders(model: nn.Module) -> list[Any]:
    """Modules and their configurations, each once."""
    modules = list(model.modules())
    configs = [vars(module).get("config") for module in modules]
    # a model of several modalities holds one configuration in another
    inner = [value for config in configs if config is not None for value in vars(config).values()]
    every = [*modules, *configs, *(value for value in inner if hasattr(value, "to_diff_dict"))]
    return list({id(holder): holder for holder in every if hasattr(holder, "__dict__")}.values())


class LossLog(TrainerCallback):
    """Keeps a JSON lines file equal to the run's history: one row a logged step.

    The history is part of a checkpoint, so a resumed run writes the file of one that never stopped.
    A mean loss ends where a checkpoint is: what was gathered for it is not part of that.
    """

    def __init__(self, path: Path):
        self.path = path

    # Any: the hooks of transformers pass whatever they have
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log whenever a checkpoint follows."""
        control.should_log = control.should_log or control.should_save

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the whole file anew."""
        if state.is_world_process_zero:
            # a history that was read back has its keys in another order
            rows = [
                {name: _number(row[name]) for name in LOGGED if name in row}
                | {name: _number(row[name]) for name in sorted(row) if name not in LOGGED}
                for row in state.log_history
                if "loss" in row
            ]
            write_rows(self.path, rows)


# of a history: mostly numbers
def _number(value: Any) -> Any:
    """A value as JSON has it: no number for NaN and infinity, which a run that diverges meets."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class CompleteMarker(TrainerCallback):
    """Marks a checkpoint once all of its files are on disk."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the mark; every process has written its part by then."""
        from accelerate import PartialState

        PartialState().wait_for_everyone()
        if state.is_world_process_zero and args.output_dir is not None:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            flush(folder)
            write_text(folder / COMPLETE, "")


def last_complete(folder: Path) -> Path | None:
    """The last checkpoint in `folder` whose files are all there; None if there is none."""
    complete = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class Progress(ProgressCallback):
    """The Trainer's progress bar, on stderr, with the last loss beside it."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open it, with its name."""
        super().on_train_begin(args, state, control, **kwargs)
        # tqdm's own attributes, which it does not type
        bar: Any = self.training_bar
        if bar is not None:
            # a resumed run begins where it stopped, or its first step would count as all of them
            bar.initial = bar.n = bar.last_print_n = self.current_step = state.global_step
            bar.unit = "step"
            bar.set_description("train")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss."""
        if self.training_bar is not None and "loss" in state.log_history[-1]:
            self.training_bar.set_postfix(loss=f"{state.log_history[-1]['loss']:.4g}")


def _save(model: "PreTrainedModel", tokenizer: Any, out: Path) -> None:
    """Save the trained model, unless it has diverged."""
    broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if broken:
        raise TrainingError(
            f"training diverged: {len(broken)} weights, {broken[0]} first, hold NaN or infinity "
            f"(see {str(out / LOSSES)!r}); lower `--lr`, and take another `--out`."
        )
    save_whole(model, tokenizer, out / MODEL)


def save_whole(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None", folder: Path
) -> None:
    """Save a model and its tokenizer as `folder`, which is there whole or not at all."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    if tokenizer is not None:
        tokenizer.save_pretrained(part)
    flush(part)
    os.replace(part, folder)


def flush(folder: Path) -> None:
    """Return when every file of `folder` is on disk: a name must not get there before its bytes."""
    for path in (folder, *folder.rglob("*")):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
