"""`sharpen rlhf`: sample, pair, fit reward differences to log-ratios (RLHF-Sharpening).

    y, y' ~ pi_base(x);   e = beta (log pi/pi_base(y) - log pi/pi_base(y')) - (r(y) - r(y'))
    pi = argmin sum e^2,  whose optimum is pi_base exp(r / beta)

Writes into its run directory: `samples.jsonl`, `scores.jsonl` (log-probs under the base model: the
rewards and the reference), `losses.jsonl`, `checkpoints/`, `model/` and `summary.json`; with
`--loss dpo` also `pairs.jsonl`, the preferences as TRL's `DPOTrainer` takes them.
"""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from sharpen.errors import InputError
from sharpen.records import Messages, Row, completion_as, write_rows
from sharpen.training.groups import Pairs, choose_pairs, paired_group, standardise
from sharpen.training.losses import Dpo, Square, check_beta

from .inputs import check_provenance
from .options import RlhfConfig
from .train import PAIRS, Choice, Drawn, train_offline


def run(config: RlhfConfig) -> None:
    """Run the command, or go on with it."""
    check(config)
    train_offline("rlhf", config, own(config), partial(choose, config))


def check(config: RlhfConfig) -> None:
    """Reject what has no optimum or no pairs, and options that would change nothing."""
    check_beta(config.beta)
    if config.samples is None and config.temperature == 0:
        raise InputError(
            "`temperature` must be above 0 in rlhf, got 0: greedy draws of a prompt are all one "
            "completion, which makes no pair; take 1."
        )
    if config.n < 2:
        raise InputError(f"`n` must be at least 2 for pairs, got {config.n}.")
    if config.loss == "dpo" and config.standardise != "none":
        raise InputError(
            f"`standardise` must be none with `--loss dpo`, got {config.standardise}: that loss "
            "knows which reward is higher, not by how much."
        )
    by = "Eq. (8)" if config.loss == "square" else "`--loss dpo`"
    check_provenance(config, "should", by)


def own(config: RlhfConfig) -> dict[str, Any]:
    """The options that no other training command has."""
    return {name: getattr(config, name) for name in ("beta", "pairs", "standardise", "loss")}


def choose(config: RlhfConfig, drawn: Drawn) -> Choice:
    """The pairs of each prompt; prompts without two usable samples that differ are left out."""
    groups_N, usable_N = drawn.scores.groups, drawn.usable
    reward_N = standardise(drawn.reward, groups_N, usable_N, config.standardise)
    reward, reference, usable = reward_N.tolist(), drawn.reference.tolist(), usable_N.tolist()
    generator = torch.Generator().manual_seed(config.seed)
    groups, preferences = [], []
    bounds = pairwise(groups_N.tolist())
    for row, prompt, (a, b) in zip(drawn.rows, drawn.prompts, bounds, strict=True):
        keys = [tuple(ids) for ids in row["completion_ids"]]
        pairs = choose_pairs(config.pairs, reward[a:b], usable[a:b], generator, keys)
        if config.loss == "dpo":
            pairs = preferred(pairs, reward[a:b])
            preferences += pair_rows(row, prompt, pairs)
        if pairs:
            parts = reference[a:b], reward[a:b], pairs
            groups.append(paired_group(row["prompt_ids"], row["completion_ids"], *parts))
    if not groups:
        two = "two finished completions" + (" of unequal reward" if config.loss == "dpo" else "")
        raise InputError(
            f"`{'n' if config.samples is None else 'samples'}` must leave at least {two} of some "
            "prompt, got none that differ; raise `--max-new-tokens`, `-n` or `--temperature`."
        )
    if config.loss == "dpo":
        write_rows(Path(config.out) / PAIRS, preferences)
    objective = Square(config.beta) if config.loss == "square" else Dpo(config.beta)
    n_pairs = sum(len(group.pairs) for group in groups)
    return Choice(groups, objective, {"pairs_fitted": n_pairs}, f"{n_pairs} pairs")


def preferred(pairs: Pairs, reward: list[float]) -> Pairs:
    """Those of unequal reward: of equals, none is to be preferred."""
    return [(i, j) for i, j in pairs if reward[i] > reward[j]]


def pair_rows(row: Row, prompt: str | Messages, pairs: Pairs) -> Iterator[Row]:
    """TRL's `prompt`, `chosen` and `rejected` of one prompt's pairs, and their ids."""
    ids = row["completion_ids"]
    texts = [completion_as(prompt, text) for text in row["completions"]]
    for i, j in pairs:
        yield {
            "prompt_id": row["prompt_id"],
            "prompt": prompt,
            "chosen": texts[i],
            "rejected": texts[j],
            "prompt_ids": row["prompt_ids"],
            "chosen_ids": ids[i],
            "rejected_ids": ids[j],
        }
