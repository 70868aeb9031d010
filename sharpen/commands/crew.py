"""A training command in several processes: the first runs it, the others fit along.

    torchrun --nproc_per_node 8 -m sharpen sft ...

    first     draw, rate, choose  ->  fit  ->  summary
    others    wait                ->  fit  ->  wait for another fit, or for the end

Prompts, samples and files are the first one's affair; the others get what is fitted from it.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sharpen.errors import SharpenError
from sharpen.models import load_model
from sharpen.training.fit import fit
from sharpen.training.groups import Group
from sharpen.training.objectives import Objective
from sharpen.training.options import FitOptions

# drawing may take long
WAIT = timedelta(days=30)


@dataclass(frozen=True)
class Task:
    """A fit.

    Attributes:
        out: The folder that it is kept in.
        start: The folder of the model to begin with; None for the base.
        dtype: Of that model.
        groups: What is fitted.
        objective: Loss of a batch.
        options: How.
    """

    out: Path
    start: Path | None
    dtype: torch.dtype
    groups: list[Group]
    objective: Objective
    options: FitOptions


class Crew:
    """The processes that a launcher started; one of itself without it.

    To be made by all of them, once `TrainingArguments` have joined them.
    """

    def __init__(self):
        self.n = dist.get_world_size() if dist.is_initialized() else 1
        self.is_first = self.n == 1 or dist.get_rank() == 0
        self._is_fitting = False
        # of its own, since it waits longer than a gradient may take (Any: typed as a number, too)
        self._group: Any = dist.new_group(backend="gloo", timeout=WAIT) if self.n > 1 else None

    def fit(
        self, task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        """Fit in all processes; the first calls it."""
        self._send(task)
        self._is_fitting = True
        fit(model, tokenizer, task.groups, task.objective, task.options, task.out)
        self._is_fitting = False

    @contextmanager
    def led(self) -> Iterator[None]:
        """While open, the others wait; in the end they are let go. For the first."""
        try:
            yield
        finally:
            # in the middle of a fit they listen to nothing else
            if not self._is_fitting:
                self._send(None)

    def follow(
        self, load_base: Callable[[torch.dtype], PreTrainedModel], *, trust_remote_code: bool
    ) -> None:
        """Fit what the first process sends until it lets go. For the others.

        Args:
            load_base: Loads, as that type, the model of fits that name no other.
            trust_remote_code: Run model code that comes with those that are named.
        """
        logging.getLogger("sharpen").setLevel(logging.ERROR)
        while (task := self._received()) is not None:
            model = load_base(task.dtype) if task.start is None else load_model(
                task.start, device="cpu", dtype=task.dtype, trust_remote_code=trust_remote_code
            )  # fmt: skip
            try:
                fit(model, None, task.groups, task.objective, task.options, task.out)
            except SharpenError as error:
                # the first process has met it too, and says so
                raise SystemExit(2) from error

    def _send(self, task: Task | None) -> None:
        if self._group is not None:
            dist.broadcast_object_list([task], group=self._group)

    def _received(self) -> Task | None:
        found: list[Task | None] = [None]
        dist.broadcast_object_list(found, group=self._group)
        return found[0]
