"""Folders that are whole or not there, whatever is killed, and on disk when they are called so."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_whole(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None", folder: Path
) -> None:
    """Save a model and its tokenizer as `folder`, which is there whole or not at all."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    if tokenizer is not None:
        tokenizer.save_pretrained(part)
    flush(part)
    os.replace(part, folder)


def flush(folder: Path) -> None:
    """Return when every file of `folder` is on disk: a name must not get there before its bytes."""
    for path in (folder, *folder.rglob("*")):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
