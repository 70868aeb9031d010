"""What `sharpen bon`, `rlhf` and `sft` write feeds TRL as it is."""

import json

import pytest
import torch
from datasets import load_dataset
from transformers import PrinterCallback
from trl import DPOConfig, SFTConfig, SFTTrainer

from helpers.trl_tiny import QUIET
from sharpen.cli import main
from sharpen.integrations.trl import SharedPrefixDPOTrainer
from sharpen.models import load_model, load_tokenizer
from sharpen.scoring import Scorer

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
RUN = [
    "--model",
    "game24",
    "--task",
    "game24",
    "--device",
    "cpu",
    "--max-new-tokens",
    "40",
    "--limit",
    "8",
    "-n",
    "6",
]
FIT = ["--batch", "4", "--trainer", "max_steps=1"]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def trained(trainer, steps):
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == steps
    return losses


def sums(model, prompts, completions):
    """Log-probs in nats of completions, one a prompt or several."""
    return Scorer(model).score(prompts, completions).reward("logprob")


def test_sft_on_the_best_of_n_from_a_sharpened_model(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert main(["sft", *RUN, *FIT, "--out", str(tmp_path / "sft")]) == 0
    assert main(["bon", *RUN, "--out", str(tmp_path / "bon")]) == 0
    chosen = tmp_path / "bon" / "chosen.jsonl"
    data = load_dataset("json", data_files=str(chosen), split="train", cache_dir=str(tmp_path))
    start = str(tmp_path / "sft" / "model")
    args = SFTConfig(
        output_dir=str(tmp_path / "trl"),
        max_steps=8,
        learning_rate=3e-4,
        per_device_train_batch_size=8,
        max_length=None,
        **QUIET,
    )
    tokenizer = load_tokenizer(start)
    trainer = SFTTrainer(model=start, args=args, train_dataset=data, processing_class=tokenizer)
    # TRL reads the very tokens that were sampled
    drawn = {tuple(row["prompt_ids"]): row for row in rows(tmp_path / "bon" / "samples.jsonl")}
    prompts, best = [], []
    for row in trainer.train_dataset:
        first = next(i for i, label in enumerate(row["labels"]) if label != -100)
        prompts.append(row["input_ids"][:first])
        best.append([row["input_ids"][first:]])
        assert best[-1][0] in drawn[tuple(prompts[-1])]["completion_ids"]
    before = sums(load_model(start, device="cpu"), prompts, best)
    losses = trained(trainer, 8)
    assert losses[-1] < losses[0]
    assert sums(trainer.model, prompts, best).mean() > before.mean() + 0.1


def test_dpo_on_the_pairs_of_rlhf(tmp_path):
    out = tmp_path / "rlhf"
    argv = ["rlhf", *RUN, *FIT, "--loss", "dpo", "--pairs", "best_worst", "--out", str(out)]
    assert main(argv) == 0
    path = str(out / "pairs.jsonl")
    data = load_dataset("json", data_files=path, split="train", cache_dir=str(tmp_path))
    pairs = rows(out / "pairs.jsonl")
    prompts = [row["prompt_ids"] for row in pairs]
    both = [[row["chosen_ids"], row["rejected_ids"]] for row in pairs]
    base = load_model("game24", device="cpu")
    before = sums(base, prompts, both).view(-1, 2)
    # the reference comes with the data: no second model, no forward of one
    data = data.add_column("ref_chosen_logps", before[:, 0].tolist())
    data = data.add_column("ref_rejected_logps", before[:, 1].tolist())
    args = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        max_steps=6,
        learning_rate=1e-4,
        beta=0.5,
        per_device_train_batch_size=8,
        max_length=None,
        **QUIET,
    )
    trainer = SharedPrefixDPOTrainer(
        model=load_model("game24", device="cpu"),
        args=args,
        train_dataset=data,
        processing_class=load_tokenizer("game24"),
    )
    assert trainer.ref_model is None
    read = [[row["chosen_ids"], row["rejected_ids"]] for row in trainer.train_dataset]
    assert read == both
    losses = trained(trainer, 6)
    # the policy is the base at first: the ratio is 0
    assert losses[0] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-3)
    after = sums(trainer.model, prompts, both).view(-1, 2)
    margin = (after - before)[:, 0] - (after - before)[:, 1]
    assert margin.mean() > 0.1
    assert losses[-1] < losses[0] - 0.02
