"""A `transformers.Trainer` whose batches are whole prompt groups and whose loss sees log-probs.

Everything that a Trainer does comes with it: accelerate, checkpoints and resuming, schedules, mixed
precision, LoRA through peft, `report_to`. Log-probs come from a `Scorer`: a prompt is computed once
for its completions and no [tokens, vocabulary] tensor is made.

A step runs in one of three ways:

    one graph      a batch that fits `max_tokens`
    bounded        a larger one: first the slopes of the loss, then completions in batches of
                   `max_tokens`, each forgotten before the next, at the price of one more forward;
                   memory does not grow with the number of completions
    micro-batches  the same under FSDP, where all processes run equally many forwards of the same
                   modules (`scoring/gradients.py`)

Where the batch of any process is too large, all of them run bounded. DDP does not see those
forwards: gradients are averaged once, when the last completion is done.

S scored tokens of a batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from accelerate.utils import AutocastKwargs
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from sharpen.errors import InputError
from sharpen.scoring import Scorer
from sharpen.scoring.batching import inverse_of
from sharpen.scoring.gradients import MicroBatch, UniformMicroBatches, refuse_dropout
from sharpen.scoring.model_access import forward_is
from sharpen.scoring.probe import apply_route, probe_model

from .distributed import (
    asks_for_shards,
    average_gradients,
    broadcast_from_first,
    check_started,
    check_way,
    in_any,
    keep_log_probs,
    most,
)
from .groups import Batch, Group
from .losses import Objective

# Any: what a Trainer passes from its data to its steps
Inputs = dict[str, Any]


class GroupTrainer(Trainer):
    """Trains a model on groups of completions.

    Args:
        model: A causal LM that `Scorer` takes, or a peft model of one.
        groups: Examples; `per_device_train_batch_size` counts them, so it counts prompts.
        objective: Loss of a batch, a mean over it.
        args: Of the Trainer, with `remove_unused_columns=False`.
        max_tokens: Most tokens in one graph.
        callbacks: As `Trainer` takes them.

    Raises:
        InputError: If there is no group, `max_tokens` < 1, the model is not causal or comes in
            parts, or `args` or the launcher asks for more than DDP or FSDP, one GPU a process.
    """

    # a mean over its batch: the Trainer divides it by the accumulated batches
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: "PreTrainedModel | nn.Module",
        groups: Sequence[Group],
        objective: Objective,
        args: TrainingArguments,
        *,
        max_tokens: int = 16384,
        callbacks: list[TrainerCallback] | None = None,
    ):
        if not groups:
            raise InputError("`groups` must hold at least one prompt with completions, got none.")
        check_way(args, model)
        # a peft model answers to everything that the scorer asks of a model
        self.scorer = Scorer(model, max_tokens=max_tokens)  # type: ignore[arg-type]
        self.lockstep = _lockstep(model, max_tokens) if asks_for_shards(args) else None
        self.objective = objective
        config: Any = model.config
        uses_cache = getattr(config, "use_cache", None)
        # PyTorch takes any sequence, and is typed as if it did not
        dataset: Any = list(groups)
        super().__init__(
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=_collate,
            callbacks=callbacks,
        )
        # Trainer turns it off in the configuration, which is saved; here each forward says it
        if uses_cache is not None:
            config.use_cache = uses_cache
        check_started(self.accelerator, args)
        if self.lockstep is not None:
            keep_log_probs(self.accelerator)
            self.shares_prompts = self.lockstep.shares_prompts
        else:
            # probed here: on its device, and not wrapped yet
            way = self.scorer.route.sharing
            # a checkpointed forward returns no cache: sequences go whole
            by_cache = way == "cache" and not args.gradient_checkpointing
            self.shares_prompts = way == "tree" or by_cache

    # as Trainer
    def train(self, *args: Any, **kwargs: Any):
        """See `Trainer.train`."""
        assert self.model is not None
        with _calling(self.model):
            return super().train(*args, **kwargs)

    def training_step(
        self,
        model: nn.Module,
        inputs: Inputs,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Add a batch's gradient; its loss."""
        batch: Batch = inputs["batch"]
        if self.lockstep is not None:
            parts = self.lockstep.micro_batches(batch.prompts, batch.completions)
            if in_any(len(parts) != 1, self.accelerator):
                return self._lockstep_step(model, batch, parts)
            inputs = inputs | {"micro_batch": parts[0]}
            return super().training_step(model, inputs, num_items_in_batch).float()
        is_large = self._graph_tokens(batch) > self.scorer.max_tokens
        if not in_any(is_large, self.accelerator):
            return super().training_step(model, inputs, num_items_in_batch).float()
        return self._bounded_step(model, batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The objective of a batch, through the wrapped model: what wraps it sees a forward."""
        batch: Batch = inputs["batch"]
        if part := inputs.get("micro_batch"):
            found = self._run(model, part)
            logprob_S = found[inverse_of([part.output_index]).to(found.device)]
        else:
            logprobs = partial(self.scorer.logprobs, batch.prompts, batch.completions)
            logprob_S = model(sharpen_call=logprobs)
        loss = self.objective(logprob_S, batch)
        return (loss, {"logprobs": logprob_S}) if return_outputs else loss

    def _bounded_step(self, model: nn.Module, batch: Batch) -> Tensor:
        """Slopes first, then batches of completions by the scorer."""
        model.train()
        loss = _BatchLoss(self, batch)
        # a weight that was cast without a graph must not be met again with one
        with self.accelerator.autocast(AutocastKwargs(cache_enabled=False)):
            self.scorer.backward(batch.prompts, batch.completions, loss)
        n_processes = self.accelerator.num_processes
        if n_processes > 1 and self.accelerator.sync_gradients:
            average_gradients(list(model.parameters()), n_processes)
        return loss.found

    def _lockstep_step(self, model: nn.Module, batch: Batch, parts: list[MicroBatch]) -> Tensor:
        """Slopes first, then as many micro-batches as any process has."""
        assert self.lockstep is not None
        model.train()
        n_more = most(len(parts), self.accelerator) - len(parts)
        fillers = [self.lockstep.filler(batch.prompts[0])] * n_more
        loss = _BatchLoss(self, batch)
        _accumulate(model, partial(self._run, model), parts, fillers, loss)
        return loss.found

    def _run(self, model: nn.Module, part: MicroBatch) -> Tensor:
        """Log-probs of a micro-batch, through the wrapped model."""
        assert self.lockstep is not None
        return model(sharpen_call=partial(self.lockstep.logprob, part, self.args.device))

    def _graph_tokens(self, batch: Batch) -> int:
        """Tokens that one graph of the batch reads."""
        if self.shares_prompts:
            return batch.n_tokens
        again = zip(batch.prompts, batch.completions, strict=True)
        return int(batch.offsets[-1]) + sum(len(prompt) * len(group) for prompt, group in again)

    def floating_point_ops(self, inputs: Inputs) -> int:
        """Of a forward and a backward, 6 a parameter and token, shared prompts once."""
        model: Any = self.model
        return 6 * self._graph_tokens(inputs["batch"]) * model.num_parameters()


def _collate(groups: list[Group]) -> Inputs:
    """Groups to the inputs of a step."""
    return {"batch": Batch.of(groups)}


class _BatchLoss:
    """The loss of a batch as it is differentiated; `found` keeps its value."""

    def __init__(self, trainer: GroupTrainer, batch: Batch):
        self.trainer, self.batch = trainer, batch
        self.found = torch.zeros((), device=trainer.args.device)

    def __call__(self, logprob: Tensor) -> Tensor:
        trainer, scaler = self.trainer, self.trainer.accelerator.scaler
        value = trainer.objective(logprob, self.batch)
        value = value / trainer.current_gradient_accumulation_steps
        self.found = value.detach().float()
        return value if scaler is None else scaler.scale(value)


def _accumulate(
    model: nn.Module,
    run: Callable[[MicroBatch], Tensor],
    parts: Sequence[MicroBatch],
    fillers: Sequence[MicroBatch],
    loss: Callable[[Float[Tensor, " S"]], Tensor],
) -> None:
    """Add the gradient of a loss of the log-probs to `.grad`, one micro-batch in memory at a time.

    Each is run twice: all of them for the slopes of the loss, then one by one for the gradient.

    Args:
        model: Dropout must be off, or slopes would be those of other log-probs.
        run: Log-probs of a micro-batch, through the wrapped model.
        parts: The batch.
        fillers: Run after them, so that all processes run equally many; they change nothing.
        loss: Of the log-probs [S], in input order, to a scalar.
    """
    refuse_dropout(model)
    with torch.no_grad():
        found = [run(part) for part in parts]
        for filler in fillers:
            run(filler)
    inverse_S = inverse_of([part.output_index for part in parts])
    logprob_S = torch.cat(found)[inverse_S.to(found[0].device)].requires_grad_()
    (slope_S,) = torch.autograd.grad(loss(logprob_S), logprob_S)
    for part in parts:
        (run(part) * slope_S[part.output_index.to(slope_S.device)]).sum().backward()
    for filler in fillers:
        (run(filler) * 0.0).sum().backward()


def _lockstep(model: Any, max_tokens: int) -> UniformMicroBatches:
    """How a model that is to be sharded is run; rank 0 alone may have its weights to try it."""
    route, head = broadcast_from_first(lambda: probe_model(model, "auto"))
    apply_route(model, route)
    return UniformMicroBatches(model, route, head, max_tokens)


@contextmanager
def _calling(model: nn.Module) -> Iterator[None]:
    """While open, `model(sharpen_call=f)` is `f()`.

    A forward of the model itself is what DDP, FSDP and autocast hook into.
    """
    own = model.forward

    @wraps(own)
    # whatever the model takes
    def forward(*args: Any, sharpen_call: Callable[[], Tensor] | None = None, **kwargs: Any) -> Any:
        return own(*args, **kwargs) if sharpen_call is None else sharpen_call()

    try:
        with forward_is(model, forward):
            yield
    finally:
        # accelerate may have wrapped it once more
        vars(model).pop("_original_forward", None)
