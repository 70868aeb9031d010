"""Fits of two processes that hold a part of each weight (FSDP2), and of one that holds all.

torchrun --nproc_per_node 2 training_shards.py OUT: each process saves what it saw of every
case, OUT/CASE.RANK.pt. accelerate shards on accelerators alone, so it is told that it runs on some;
all that it does then is its own.
"""

import os
import sys
import warnings
from pathlib import Path

import accelerate.state
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from sharpen.errors import InputError
from sharpen.training import options
from workers.training_two_ranks import CASES as OF_TWO
from workers.training_two_ranks import KEPT, Case, keep, losses, start, trainer_of, weights

FSDP = {"fsdp": True, "fsdp_config": {}}
CASES = OF_TWO | {
    # a budget that some groups pass and others do not
    "some-bounded": Case(batch=2, accumulated=3, max_tokens=14),
    "tied": Case(family="llama-tied"),
    "gpt2": Case(family="gpt2-tied", max_tokens=40),
    "phi": Case(family="phi-bias", max_tokens=40),
    "gemma2": Case(family="gemma2-softcap"),
    "opaque": Case(opaque=True),
    "opaque-bounded": Case(opaque=True, max_tokens=12),
    "checkpointed": Case(max_tokens=40, more={"gradient_checkpointing": True}),
    "checkpointed-by-fsdp": Case(
        max_tokens=40, more={"fsdp_config": {"activation_checkpointing": True}}
    ),
    "clipped": Case(more={"max_grad_norm": 1.0}),
    # its prompts are shared by a cache, which would be two forwards
    "lfm2": Case(family="lfm2"),
    "lfm2-bounded": Case(family="lfm2", max_tokens=40),
}


def shard_on_cpus():
    """Let accelerate take CPUs for what it shards on."""
    begin = accelerate.state.AcceleratorState.__init__

    def begin_sharded(state, *args, fsdp_plugin=None, **kwargs):
        begin(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is None:
            return
        if state._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(state._mixed_precision)
        state.fsdp_plugin = fsdp_plugin
        state.distributed_type = DistributedType.FSDP
        accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    accelerate.state.AcceleratorState.__init__ = begin_sharded
    options.check_device = lambda args: None


def noting(function, notes, note):
    """`function`, which adds `note(*its arguments)` to `notes` when called."""

    def noted(*args):
        notes.append(note(*args))
        return function(*args)

    return noted


def fit(case, folder, *, model=None, **changes):
    """The trainer, and what a process sees of its fit."""
    trainer = trainer_of(case, folder, 2, model=model, **FSDP | case.more | changes)
    ran, filled, seen = [], [], []
    trainer._run = noting(trainer._run, ran, lambda *_: torch.is_grad_enabled())
    trainer.lockstep.filler = noting(trainer.lockstep.filler, filled, lambda *_: 1)
    trainer.objective = noting(trainer.objective, seen, lambda *given: given)
    trainer.train()
    logprob, batch = seen[0]
    parts = [p for p in trainer.model.parameters() if hasattr(p, "full_tensor")]
    return trainer, {
        "weights": weights(trainer.model),
        "losses": losses(trainer),
        "ran": ran,
        "filled": len(filled),
        "n_parts": len(parts),
        "n_weights": len(list(trainer.model.parameters())),
        "held": sum(p.to_local().numel() for p in parts),
        "first": (logprob.detach(), batch.prompts, batch.completions),
        "shares": trainer.lockstep.shares_prompts,
    }


def broken(case, rank):
    """The model that a case begins with; without weights but in the first process."""
    model = start(case)
    if rank > 0:
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(float("nan"))
    return model


class Stop(TrainerCallback):
    """Ends a run after one update, as if it was killed once the checkpoint was there."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def resumed(case, folder):
    """A fit that is stopped at its first checkpoint and taken up by another trainer."""
    keep = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
    first = trainer_of(case, folder, 2, **FSDP | keep)
    first.add_callback(Stop())
    first.train()
    second = trainer_of(case, folder, 2, **FSDP | keep)
    second.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    straight, found = fit(case, folder / "straight", **keep)
    straight.save_model(str(folder / "model"))
    return {
        "weights": weights(second.model),
        "straight": found["weights"],
        "steps": [first.state.global_step, second.state.global_step],
    }


def dropped(folder):
    """What a bounded step says of dropout."""
    case = CASES["bounded"]
    model = start(case)
    model.lm_head = torch.nn.Sequential(torch.nn.Dropout(0.1), model.lm_head)
    try:
        fit(case, folder, model=model)
    except InputError as error:
        return str(error)


def refused(rank, folder):
    """What two processes raise where only the first has a reason."""
    model = start(CASES["whole"])
    if rank == 0:
        model.config.is_decoder = False
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
        mask = model.model.forward
        model.model.forward = lambda *a, **k: _backwards(mask, *a, **k)
    try:
        trainer_of(CASES["whole"], folder, 2, model=model, **FSDP)
    except InputError as error:
        return str(error)


def _backwards(forward, *args, **kwargs):
    out = forward(*args, **kwargs)
    out.last_hidden_state = out.last_hidden_state + out.last_hidden_state.mean(1, keepdim=True)
    return out


def main(out):
    """Every case."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    shard_on_cpus()
    out = Path(out)
    rank = int(os.environ["RANK"])

    def save(name, found):
        torch.save(found, out / f"{name}.{rank}.pt")

    for name, case in CASES.items():
        save(name, fit(case, out / name)[1])
    save("bf16", fit(Case(max_tokens=40), out / "bf16", bf16=True)[1])
    lora = Case(lora=True, max_tokens=40)
    half = start(lora, torch.bfloat16)
    save("lora-half", fit(lora, out / "lora-half", model=half, bf16=True)[1])
    efficient = FSDP | {"fsdp_config": {"cpu_ram_efficient_loading": True}}
    case = CASES["whole"]
    start(case)
    save("efficient", fit(case, out / "efficient", model=broken(case, rank), **efficient)[1])
    save("resumed", resumed(case, out / "resumed"))
    for name, changes in KEPT.items():
        for killed in (True, False):
            keep(out / name, 2, killed=killed, more=FSDP, **changes)
    save("dropped", dropped(out / "dropped"))
    save("refused", refused(rank, out / "refused"))
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
