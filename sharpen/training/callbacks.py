"""What a run leaves behind while it trains: losses, sealed checkpoints, a progress bar."""

import math
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sharpen.records import write_rows, write_text

from .saving import flush

SEAL = "complete"
LOGGED = ("step", "epoch", "loss", "grad_norm", "learning_rate")


class LossLog(TrainerCallback):
    """Keeps a JSON lines file equal to the run's history: one row a logged step.

    The history is part of a checkpoint, so a resumed run writes the file of one that never stopped.
    A mean loss ends where a checkpoint is: what was gathered for it is not part of that.
    """

    def __init__(self, path: Path):
        self.path = path

    # as `on_log`
    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Log whenever a checkpoint follows."""
        control.should_log = control.should_log or control.should_save

    # Any: the hooks of transformers pass whatever they have
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
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


class Seal(TrainerCallback):
    """Marks a checkpoint once all of its files are there, which only then is resumed from."""

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Add the mark; every process has written its part by then."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero and args.output_dir is not None:
            folder = _folder(Path(args.output_dir), state.global_step)
            flush(folder)
            write_text(folder / SEAL, "")


class Bar(TrainerCallback):
    """One line on stderr, with the last loss."""

    def __init__(self):
        self.bar: tqdm | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Open it where the run goes on."""
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="train", unit="step"
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """One step on."""
        if self.bar is not None:
            self.bar.update(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Show the loss."""
        if self.bar is not None and "loss" in state.log_history[-1]:
            self.bar.set_postfix(loss=f"{state.log_history[-1]['loss']:.4g}")

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Close it."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


# of a history: mostly numbers
def _number(value: Any) -> Any:
    """A value as JSON has it: no number for NaN and infinity, which a run that diverges meets."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def last_sealed(folder: Path) -> Path | None:
    """The last checkpoint in `folder` whose files are all there; None if there is none."""
    sealed = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{SEAL}")]
    return max(sealed, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _folder(out: Path, step: int) -> Path:
    return out / f"{PREFIX_CHECKPOINT_DIR}-{step}"
