"""TRL's own DPOTrainer on a file of pairs: prints the ids it reads and the loss of each step.

python trl_dpo.py PAIRS OUT STEPS LR BETA BATCH
"""

import json
import sys

import torch
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback
from trl import DPOConfig, DPOTrainer

from sharpen.models import load_model, load_tokenizer


def main(pairs, out, steps, lr, beta, batch):
    """Fit the shipped model as anybody would who has TRL and the file, nothing else."""
    torch.set_num_threads(1)
    with open(pairs, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    args = DPOConfig(
        output_dir=out,
        max_steps=int(steps),
        learning_rate=float(lr),
        beta=float(beta),
        per_device_train_batch_size=int(batch),
        seed=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        dataloader_pin_memory=False,
    )
    columns = ("prompt", "chosen", "rejected")
    trainer = DPOTrainer(
        model=load_model("game24", device="cpu"),
        args=args,
        train_dataset=Dataset.from_list([{name: row[name] for name in columns} for row in rows]),
        processing_class=load_tokenizer("game24"),
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.train()
    found = {
        "ids": [
            [row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
            for row in trainer.train_dataset
        ],
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
