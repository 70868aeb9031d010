"""FSDP2 beside DDP on the devices that there are: weights after two epochs, in fp32 and bf16.

torchrun --standalone --nproc_per_node N training_shards_device.py: one line a case, and exit
code 1 if a case is off. accelerate shards GPUs; with --cpu it is told to shard CPUs.
"""

import os
import sys
import tempfile
import warnings
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist

from workers.training_shards import FSDP, shard_on_cpus
from workers.training_two_ranks import Case, trainer_of, weights

CASES = {
    "whole": Case(),
    "bounded": Case(max_tokens=12),
    "tied": Case(family="llama-tied"),
    "gemma2": Case(family="gemma2-softcap", max_tokens=40),
    "opaque": Case(opaque=True, max_tokens=40),
    "lfm2": Case(family="lfm2", max_tokens=40),
    "checkpointed-by-fsdp": Case(more={"fsdp_config": {"activation_checkpointing": True}}),
}
# of what DDP moved the weights by; bf16 rounds a weight to 2^-9 of it where it is used
MOST = {"fp32": 1e-3, "bf16": 0.3}


def moved(name, dtype, folder, is_cpu, way):
    """The weights' way from their beginning to their end."""
    case = CASES[name]
    # what is of FSDP's alone is left to it
    more = FSDP | case.more if way == "FSDP" else {"fsdp_config": None}
    device = {"use_cpu": is_cpu, "bf16": dtype == "bf16"}
    trainer = trainer_of(case, folder, int(os.environ["WORLD_SIZE"]), **more | device)
    assert (trainer.lockstep is not None) == (way == "FSDP")
    before = weights(trainer.model).cpu()
    trainer.train()
    return weights(trainer.model).cpu() - before


def main(argv):
    """Every case."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    runs = list(product(CASES, MOST))
    given = Path(tempfile.mkdtemp()), "--cpu" in argv
    # DDP first: accelerate keeps to FSDP once a process has asked for it
    want = {run: moved(*run, *given, "DDP") for run in runs}
    found = {run: moved(*run, *given, "FSDP") for run in runs}
    bad = False
    for name, dtype in runs:
        run = name, dtype
        error = float((found[run] - want[run]).norm() / want[run].norm())
        is_off = not error < MOST[dtype]
        bad = bad or is_off
        if os.environ["RANK"] == "0":
            sys.stdout.write(f"{name} {dtype}: {error:.1e} of the way{' OFF' * is_off}\n")
    sys.stdout.flush()
    dist.barrier()
    os._exit(bad)


if __name__ == "__main__":
    if "--cpu" in sys.argv:
        shard_on_cpus()
    main(sys.argv[1:])
