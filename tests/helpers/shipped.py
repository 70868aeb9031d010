"""The smallest useful run of the model that ships with the package, and a broken copy of it."""

from pathlib import Path

import torch

from sharpen.cli import main
from sharpen.models import load_model, load_tokenizer

SMALL_RUN = [
    "bon",
    "--model",
    "game24",
    "--task",
    "game24",
    "--limit",
    "6",
    "-n",
    "8",
    "--max-new-tokens",
    "40",
    "--max-tokens",
    "400",
    "--device",
    "cpu",
]


def bon(out: Path, *extra: str) -> int:
    """Exit code of `sharpen bon` on a few test puzzles."""
    return main([*SMALL_RUN, "--out", str(out), *extra])


def broken_model(folder: Path) -> Path:
    """A folder with the shipped model, whose logits are NaN once it has read the number 13."""
    model, tokenizer = load_model("game24", device="cpu"), load_tokenizer("game24")
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("13")] = float("nan")
    # tied weights would spread the NaN to every logit
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.nan_to_num())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
