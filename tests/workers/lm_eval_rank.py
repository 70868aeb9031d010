"""One of the processes that share an evaluation: `lm_eval_rank.py MODEL TASKS OUT TASK...`."""

import json
import sys
from pathlib import Path

import torch

from helpers.lm_eval_runs import evaluated, model_of, numbers


def main(model: str, folder: str, out: str, *tasks: str) -> None:
    """Evaluate this rank's share; the first rank writes the metrics of all and its own answers."""
    torch.set_num_threads(1)
    lm = model_of("sharpen", Path(model))
    # `hf` splits over the ranks of GPUs alone; this is what it sets there
    lm._rank, lm._world_size = lm.accelerator.process_index, lm.accelerator.num_processes
    found = evaluated(lm, Path(folder), tasks)
    if lm.rank == 0:
        results = {task: found["results"][task] for task in tasks}
        answers = {task: numbers(found, task) for task in tasks}
        Path(out).write_text(json.dumps({"results": results, "answers": answers}, default=float))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
