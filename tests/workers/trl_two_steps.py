"""Two steps of TRL's own trainers on exported files: prints what each read and its losses.

python trl_two_steps.py OUT TRAINER=FILE ...      trainers: sft, tokens, dpo, kto, grpo
"""

import json
import sys

import torch
from datasets import load_dataset
from transformers import PrinterCallback, ProgressCallback
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    SFTConfig,
    SFTTrainer,
)

from sharpen.models import load_model, load_tokenizer

TRAINERS = {
    "sft": (SFTTrainer, SFTConfig, {}),
    "tokens": (SFTTrainer, SFTConfig, {"completion_only_loss": True}),
    "dpo": (DPOTrainer, DPOConfig, {}),
    "kto": (KTOTrainer, KTOConfig, {}),
    "grpo": (GRPOTrainer, GRPOConfig, {"num_generations": 2, "max_completion_length": 8}),
}
COLUMNS = ("input_ids", "labels", "prompt_ids", "chosen_ids", "rejected_ids", "completion_ids")


def lengths(completion_ids, **_):
    """A reward of GRPO's: long completions."""
    return [float(len(ids)) for ids in completion_ids]


def fitted(name: str, file: str, out: str) -> dict:
    """Anybody's script with TRL and the file: the default of every option that matters."""
    trainer_class, config_class, more = TRAINERS[name]
    kind = "parquet" if file.endswith(".parquet") else "json"
    data = load_dataset(kind, data_files=file, split="train", cache_dir=f"{out}/cache")
    args = config_class(
        output_dir=out,
        max_steps=2,
        learning_rate=1e-4,
        per_device_train_batch_size=2,
        seed=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        **more,
    )
    model = load_model("game24", device="cpu")
    before = [p.detach().clone() for p in model.parameters()]
    rewards = {"reward_funcs": lengths} if name == "grpo" else {}
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=data,
        processing_class=load_tokenizer("game24"),
        **rewards,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.train()
    rows = trainer.train_dataset
    return {
        "columns": data.column_names,
        "features": {column: str(kind) for column, kind in data.features.items()},
        "read": {c: list(rows[c]) for c in COLUMNS if c in rows.column_names},
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "moved": any(
            not torch.equal(old, new.detach())
            for old, new in zip(before, model.parameters(), strict=True)
        ),
    }


def main(out: str, *named: str) -> None:
    """Each trainer in turn."""
    torch.set_num_threads(1)
    files = [part.split("=", 1) for part in named]
    found = {name: fitted(name, file, f"{out}/{name}") for name, file in files}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
