"""The same fits in one process and in as many as torchrun starts.

torchrun --nproc_per_node 2 training_two_ranks.py OUT: each process saves the weights that it
ends with, OUT/CASE.RANK.pt, and the first also the losses, OUT/CASE.losses.pt.
"""

import dataclasses
import os
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback, TrainingArguments, set_seed

from helpers.families import family
from helpers.tiny import FAMILIES, opaque, tiny
from helpers.tiny_groups import compared, likelihood, options
from sharpen.training.distributed import average_gradients
from sharpen.training.fit import fit as keep_fit
from sharpen.training.groups import Batch
from sharpen.training.losses import Likelihood, Square
from sharpen.training.trainer import GroupTrainer

WHOLE = 16384


@dataclass(frozen=True)
class Case:
    """A fit of six groups.

    Attributes:
        batch: Groups of all processes together, in one step of one process or of each.
        accumulated: Batches an update.
        max_tokens: Of a graph; below that of a batch the step is in bounded memory.
        lora: Whether adapters are trained alone.
        uneven: Whether shares weigh differently, so that only accumulation is the same mean.
        family: Of the tiny model, of `tiny` or `families`.
        opaque: Whether its head can only be read by calling the model.
        more: Arguments of the Trainer.
    """

    batch: int = 6
    accumulated: int = 1
    max_tokens: int = WHOLE
    lora: bool = False
    uneven: bool = False
    family: str = "llama"
    opaque: bool = False
    more: dict = dataclasses.field(default_factory=dict)


def _between():
    """A budget that some batches of one group pass and others do not."""
    sizes = sorted(Batch.of([group]).n_tokens for group in compared())
    assert sizes[0] < sizes[-1]
    return sizes[len(sizes) // 2] - 1


CASES = {
    "whole": Case(),
    "bounded": Case(max_tokens=12),
    "some-bounded": Case(batch=2, accumulated=3, max_tokens=_between()),
    "lora": Case(lora=True),
    "lora-bounded": Case(lora=True, max_tokens=12),
    "uneven": Case(batch=2, uneven=True),
    "uneven-bounded": Case(batch=2, uneven=True, max_tokens=12),
}


def start(case, dtype=torch.float32):
    """The model that a case begins with; adapters are fp32."""
    make = opaque if case.opaque else tiny if case.family in FAMILIES else family
    model = make(case.family)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    model = model.to(dtype)
    if not case.lora:
        return model
    set_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(model, config)


def weights(model):
    """Of all that is trained, end to end, those in parts gathered; all processes must ask."""
    trained = [p.detach() for p in model.parameters() if p.requires_grad]
    return torch.cat([getattr(p, "full_tensor", lambda p=p: p)().flatten() for p in trained])


def groups(case):
    """What is fitted; uneven ones lose a completion each, and their weights differ."""
    if not case.uneven:
        return compared()
    return [
        dataclasses.replace(
            group,
            completion_ids=group.completion_ids[: 1 + p % 3],
            weight=group.weight[: 1 + p % 3],
        )
        for p, group in enumerate(likelihood())
    ]


def trainer_of(case, folder, n_processes, *, model=None, **changes):
    """What fits a case in two epochs."""
    share, more = case.batch // n_processes, {"gradient_accumulation_steps": case.accumulated}
    if case.uneven and n_processes == 1:
        # the mean of the shares' means
        share, more = case.batch // 2, {"gradient_accumulation_steps": 2}
    more |= (
        {"max_grad_norm": 0.0, "save_strategy": "no", "optim": "sgd", "use_cpu": True}
        | case.more
        | changes
    )
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=share,
        num_train_epochs=2,
        learning_rate=1e-2 if case.lora else 1e-4,
        lr_scheduler_type="constant",
        report_to="none",
        logging_steps=1,
        remove_unused_columns=False,
        disable_tqdm=True,
        label_names=[],
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        **more,
    )
    model = start(case) if model is None else model
    objective = Likelihood("token") if case.uneven else Square(1.0)
    return GroupTrainer(model, groups(case), objective, args, max_tokens=case.max_tokens)


def fit(case, folder, n_processes):
    """Two epochs; the trainer, how many steps were bounded, and the weights before."""
    trainer = trainer_of(case, folder, n_processes)
    before = weights(trainer.model)
    bounded = []
    backward = trainer.scorer.backward
    trainer.scorer.backward = lambda *given: (bounded.append(1), backward(*given))[1]
    trainer.train()
    return trainer, len(bounded), before


def losses(trainer):
    """Of each update."""
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


# of what `fit` keeps: the whole model, adapters among them
ENDS = [2, 5]
KEPT = {"kept": {}, "kept-lora": {"lora_rank": 4}}


class KilledError(Exception):
    """Ends a process where a kill would."""


def killed_at(step):
    """A callback that ends a run after so many steps."""

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KilledError

    return Kill


def keep(out, n_processes, *, killed=False, **changes):
    """`fit` into a folder, in two epochs of steps of six groups; killed in its second, or not."""
    # an epsilon that keeps Adam from making much of rounding
    more = {"logging_steps": 1, "adam_epsilon": 1.0} | changes.pop("more", {})
    batch = 6 // n_processes
    chosen = options(lr=1e-3, batch=batch, save_every=1, more=more, **changes)
    with pytest.MonkeyPatch.context() as patch:
        if killed:
            patch.setattr("sharpen.training.fit.Progress", killed_at(2))
        try:
            model = tiny()
            model.generation_config.eos_token_id = ENDS
            keep_fit(model, None, compared(), Square(1.0), chosen, out)
        except KilledError:
            assert killed


def sealed(out, rank):
    """Whether the second process, slow to write its part of a checkpoint, had when it was sealed.

    One answer a checkpoint.
    """
    found, save = [], GroupTrainer._save_rng_state

    def slow(trainer, folder):
        time.sleep(rank * 1.0)
        save(trainer, folder)

    def flush(folder):
        # the model is flushed as well
        if folder.name.startswith("checkpoint-"):
            found.append((folder / "rng_state_1.pth").exists())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GroupTrainer, "_save_rng_state", slow)
        patch.setattr("sharpen.training.fit.flush", flush)
        keep(out, 2)
    return found


def average(rank):
    """Gradients of four parameters: of both processes, of the first alone, of none, frozen."""
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(4)]
    parameters[0].grad = torch.tensor([1.0, 2.0]) + 4 * rank
    if rank == 0:
        parameters[1].grad = torch.tensor([1.0, 2.0])
    parameters[3].requires_grad_(False)
    average_gradients(parameters, 2)
    return [None if p.grad is None else p.grad.tolist() for p in parameters]


def main(out):
    """Every case."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name, case in CASES.items():
        trainer, n_bounded, _ = fit(case, Path(out) / name, 2)
        accelerator = trainer.accelerator
        found = {
            "processes": accelerator.num_processes,
            "wrapped": type(trainer.model_wrapped).__name__,
            "weights": weights(trainer.model),
            "losses": losses(trainer),
            "bounded": n_bounded,
        }
        torch.save(found, Path(out) / f"{name}.{accelerator.process_index}.pt")
    for name, changes in KEPT.items():
        for killed in (True, False):
            keep(Path(out) / name, 2, killed=killed, **changes)
    rank = accelerator.process_index
    found = {"average": average(rank), "sealed": sealed(Path(out) / "sealed", rank)}
    if accelerator.is_main_process:
        torch.save(found, Path(out) / "found.pt")
    dist.barrier()
    # gloo is given up while Python waits for its threads, which may wait for Python: seen in one
    # of ten runs, after all was saved; so nothing is torn down
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
