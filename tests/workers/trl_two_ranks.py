"""GRPO of TRL's own and with shared prompts, in as many processes as torchrun starts.

torchrun --nproc_per_node 2 trl_two_ranks.py MODEL OUT: the first prints how far apart their
parameters ended, beside how far they went, and the rewards of every step.
"""

import json
import os
import sys
import warnings

import torch

from helpers.trl_tiny import evens, online
from sharpen.integrations.trl import SelfReward


def main(folder, out):
    """Two steps each; the first process prints."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    ends, rewards = [], []
    for shared in (False, True):
        own = SelfReward(under="base")
        trainer = online(
            "GRPO",
            folder,
            out,
            shared=shared,
            reward=[evens, own],
            callbacks=[own],
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            beta=0.05,
        )
        start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.train()
        ends.append({n: p.detach() - start[n] for n, p in trainer.model.named_parameters()})
        rewards.append([x["reward"] for x in trainer.state.log_history if "reward" in x])
    theirs, ours = ends
    if trainer.accelerator.is_main_process:
        found = {
            "processes": trainer.accelerator.num_processes,
            "moved": sum(x.norm().item() for x in theirs.values()),
            "apart": sum((ours[n] - x).norm().item() for n, x in theirs.items()),
            "rewards": rewards,
        }
        sys.stdout.write("\n" + json.dumps(found) + "\n")
        sys.stdout.flush()
    torch.distributed.barrier()
    # gloo's threads may abort a process that Python takes down around them
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
