"""`sharpen export`: scored samples to the data sets that TRL's trainers take, chosen by a reward.

Reads a file of `sharpen score` (or of `sharpen sample`, whose log-probs give some rewards) and
writes one of TRL's shapes; see `sharpen.training.datasets`. The same input and options make the
same file.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Literal

import torch

from sharpen.errors import InputError, RecordError
from sharpen.records import Row, file_digest, read_prompts
from sharpen.runs import Run
from sharpen.scoring.rewards import REWARDS
from sharpen.training.datasets import (
    Rated,
    dpo_rows,
    kto_rows,
    prompt_rows,
    sft_rows,
    token_rows,
    unique,
)

from .options import option, required
from .rated_samples import read_rated, with_prompts
from .row_files import check_suffix, write_file
from .stages import settings_beside

# options that belong to some shapes alone
OWN = {
    "top": ("sft", "tokens"),
    "pairs": ("dpo",),
    "margin": ("dpo",),
    "seed": ("dpo",),
    "threshold": ("kto",),
    "share": ("kto",),
    "reward": ("sft", "dpo", "kto", "tokens"),
    "unique": ("sft", "dpo", "kto", "tokens"),
    "cut": ("sft", "dpo", "kto", "tokens"),
}


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Scored samples to TRL's data sets."""

    input: str = required("JSON lines file of `sharpen score`, or of `sharpen sample`")
    shape: Literal["sft", "dpo", "kto", "prompt", "tokens"] = required(
        "sft: the best completions; dpo: pairs; kto: good and bad ones; prompt: prompts alone; "
        "tokens: the best as token ids"
    )
    out: str = required("file to write: .jsonl, or .parquet")
    reward: str | None = option(
        f"what to choose by: one that the records hold, or {', '.join(REWARDS)}"
    )
    top: int = option("sft, tokens: completions a prompt, best first", 1)
    pairs: Literal["best_worst", "all", "random"] = option(
        "dpo: best_worst: one pair a prompt; all: every two; random: each completion in one pair",
        "best_worst",
    )
    margin: float = option("dpo: only pairs whose rewards differ by more", 0.0)
    seed: int = option("dpo: fixes random pairs", 0)
    threshold: float | None = option("kto: good are those of at least this reward, bad all others")
    share: float | None = option(
        "kto: good are the best SHARE of a prompt's completions, bad as many of the worst"
    )
    unique: bool = option("equal completions of a prompt count once", False)
    cut: bool = option("take completions that were cut at the token limit too", False)
    prompts: str | None = option(
        "the file that the samples were drawn from: its prompts, such as messages, go out instead "
        "of the text that a template made of them"
    )


def run(config: ExportConfig) -> None:
    """Run the command; where the same one was finished before, it writes the same file again."""
    check(config)
    out = Path(config.out)
    check_suffix(out)
    groups = read_rated(config.input, config.reward, cut=config.cut)
    digests = {"input_digest": file_digest(config.input)}
    if config.prompts is not None:
        groups = with_prompts(groups, read_prompts(config.prompts), config.prompts)
        digests["prompts_digest"] = file_digest(config.prompts)
    if config.unique:
        groups = [unique(group) for group in groups]
    check_one_form(groups)
    rows = list(rows_of(config, groups))
    if not rows:
        raise InputError(
            f"{config.input!r} must leave at least one row of shape {config.shape}, got none of "
            f"{len(groups)} prompts; lower `--margin`, or take cut ones with `--cut`."
        )
    settings = {"command": "export", **asdict(config), **digests}
    with Run(settings_beside(out), settings, [out]):
        write_file(out, rows)
    used = len({row["prompt_id"] for row in rows})
    sys.stdout.write(f"{len(rows)} rows of {used} of {len(groups)} prompts: {config.out}\n")


def check(config: ExportConfig) -> None:
    """Refuse options that contradict each other, or would change nothing.

    Raises:
        InputError: If so.
    """
    for name, shapes in OWN.items():
        default = ExportConfig.__dataclass_fields__[name].default
        if config.shape not in shapes and getattr(config, name) != default:
            raise InputError(
                f"`{name}` must be left out with `--shape {config.shape}`, which it cannot change, "
                f"got {getattr(config, name)!r}."
            )
    if config.shape != "prompt" and config.reward is None:
        raise InputError(f"`reward` must be given with `--shape {config.shape}`, got none.")
    if config.top < 1:
        raise InputError(f"`top` must be at least 1, got {config.top}.")
    if not (isfinite(config.margin) and config.margin >= 0):
        raise InputError(f"`margin` must be at least 0, got {config.margin}.")
    if config.seed and config.pairs != "random":
        raise InputError(
            f"`seed` must be left out with `--pairs {config.pairs}`: nothing is drawn."
        )
    if config.shape == "kto" and (config.threshold is None) == (config.share is None):
        got = "neither" if config.share is None else "both"
        raise InputError(f"give one of `--threshold` and `--share` with `--shape kto`, got {got}.")
    if config.threshold is not None and not isfinite(config.threshold):
        raise InputError(f"`threshold` must be a number, got {config.threshold}.")
    if config.share is not None and not 0 < config.share <= 0.5:
        raise InputError(f"`share` must be above 0 and at most 0.5, got {config.share}.")
    if Path(config.out).resolve() == Path(config.input).resolve():
        raise InputError(f"`out` must be another file than `input`, got {config.out!r} for both.")


def check_one_form(groups: list[Rated]) -> None:
    """Refuse prompts of two forms: a column of a data set has one type.

    Raises:
        RecordError: If some are text and others messages.
    """
    for group in groups:
        if isinstance(group.prompt, str) != isinstance(groups[0].prompt, str):
            raise RecordError(
                f"{group.place}: prompts must all be text or all messages, got the other than at "
                f"{groups[0].place}; export them to two files."
            )


def rows_of(config: ExportConfig, groups: list[Rated]) -> Iterator[Row]:
    """The rows of every prompt, in order."""
    generator = torch.Generator().manual_seed(config.seed)
    seen: set[str] = set()
    for group in groups:
        if config.shape == "sft":
            yield from sft_rows(group, top=config.top)
        elif config.shape == "tokens":
            yield from token_rows(group, top=config.top)
        elif config.shape == "dpo":
            yield from dpo_rows(group, generator, pairs=config.pairs, margin=config.margin)
        elif config.shape == "kto":
            yield from kto_rows(group, threshold=config.threshold, share=config.share)
        elif group.prompt_id not in seen:
            seen.add(group.prompt_id)
            yield from prompt_rows(group)
