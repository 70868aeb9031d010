"""`sharpen rlhf`: sample, pair, fit reward differences to log-ratios (RLHF-Sharpening).

    y, y' ~ pi_base(x);   e = beta (log pi/pi_base(y) - log pi/pi_base(y')) - (r(y) - r(y'))
    pi = argmin sum e^2,  whose optimum is pi_base exp(r / beta)

Writes into its run directory: `samples.jsonl`, `scores.jsonl` (log-probs under the base model: the
rewards and the reference), `losses.jsonl`, `checkpoints/`, `model/` and `summary.json`.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch

from sharpen.errors import InputError
from sharpen.runs import Run
from sharpen.sampling.hf import TransformersSampler
from sharpen.sampling.prompts import render_all
from sharpen.scoring import Scorer
from sharpen.scoring.rewards import REWARDS
from sharpen.training.groups import Group, paired_group
from sharpen.training.objectives import Dpo, Square, check_beta
from sharpen.training.pairs import choose_pairs
from sharpen.training.scaling import standardise

from .options import option, required
from .sources import open_source
from .training import (
    Drawn,
    TrainConfig,
    check_training,
    draw,
    finish,
    fit_into,
    load_base,
    outputs_of,
    rate,
    samples_settings,
    training_settings,
)


@dataclass(frozen=True, kw_only=True)
class RlhfConfig(TrainConfig):
    """RLHF-Sharpening: sample, score, pair, fit."""

    out: str = required("run directory; the same command again goes on where it stopped")
    split: str = option("split of the task, or several as A+B", "sharpen")
    n: int = option("completions per prompt, at least 2", 8, ("-n",))
    reward: str = option(f"self-reward: {', '.join(REWARDS)}", "logprob")
    beta: float = option(
        "weight of the KL term; of logprob the optimum is the power 1 + 1/beta of the base", 1.0
    )
    pairs: Literal["random", "all", "best_worst"] = option(
        "random: each completion in one pair; all: every two; best_worst: one pair a prompt",
        "random",
    )
    standardise: Literal["none", "all", "prompt"] = option(
        "divide rewards by their deviation within prompts: one for all prompts, or one a prompt; "
        "changes the optimum",
        "none",
    )
    loss: Literal["square", "dpo"] = option(
        "square: the paper's; dpo: a logistic loss of which is better, the common baseline",
        "square",
    )
    samples: str | None = option(
        "a file of `sharpen sample`, of which the first N a prompt are used instead of drawing"
    )
    scores: Literal["scorer", "sampler"] = option(
        "log-probs of the base: scorer: a forward pass over all samples; "
        "sampler: those kept while drawing, which cost nothing",
        "scorer",
    )


def run(config: RlhfConfig) -> None:
    """Run the command, or go on with it."""
    options = check_training(config, config.reward)
    check(config)
    draws = config.sampling()
    model, tokenizer = load_base(config)
    source = open_source(config, tokenizer)
    prompts = render_all(source.records, tokenizer)
    sampler = TransformersSampler(model, tokenizer, max_tokens=config.max_tokens)
    sampler.check(prompts, draws)
    out = Path(config.out)
    with Run(out / "run.json", settings(config, model.device), outputs_of(out)):
        rows = draw(config, out, sampler, prompts, config.samples)
        scorer = Scorer(model, max_tokens=config.max_tokens)
        drawn = rate(out, scorer, source, rows, config.reward, config.scores)
        groups = paired_groups(config, drawn)
        objective = Square(config.beta) if config.loss == "square" else Dpo(config.beta)
        fit_into(out, model, tokenizer, groups, objective, options)
        n_pairs = sum(len(group.pairs) for group in groups)
        found = {"prompts": len(prompts), "prompts_fitted": len(groups), "pairs_fitted": n_pairs}
        finish(
            out, config, found,
            f"fitted {n_pairs} pairs of {len(groups)} of {len(prompts)} prompts",
        )  # fmt: skip


def check(config: RlhfConfig) -> None:
    """Refuse what has no optimum or no pairs.

    Raises:
        InputError: If beta is not above 0, or N < 2.
    """
    check_beta(config.beta)
    if config.n < 2 and config.samples is None:
        raise InputError(f"`n` must be at least 2 for pairs, got {config.n}.")


def settings(config: RlhfConfig, device: torch.device) -> dict[str, Any]:
    """Everything that the outputs depend on."""
    names = ("reward", "beta", "pairs", "standardise", "loss", "scores")
    return {
        **training_settings("rlhf", config, device),
        **{name: getattr(config, name) for name in names},
        **samples_settings(config.samples),
    }


def paired_groups(config: RlhfConfig, drawn: Drawn) -> list[Group]:
    """The pairs of each prompt; prompts with fewer than two eligible samples are left out.

    Raises:
        InputError: If no prompt has a pair.
    """
    scores = drawn.scores
    eligible_N = scores.eligible & ~drawn.reward.isnan()
    reward_N = standardise(drawn.reward, scores.groups, eligible_N, config.standardise)
    reward, reference, eligible = reward_N.tolist(), drawn.reference.tolist(), eligible_N.tolist()
    generator = torch.Generator().manual_seed(config.seed)
    found = []
    for row, (a, b) in zip(drawn.rows, pairwise(scores.groups.tolist()), strict=True):
        pairs = choose_pairs(config.pairs, reward[a:b], eligible[a:b], generator)
        if pairs:
            found.append(
                paired_group(
                    row["prompt_ids"], row["completion_ids"], reference[a:b], reward[a:b], pairs
                )
            )
    if not found:
        raise InputError(
            "`n` must leave at least two finished completions of some prompt, got none; "
            "raise `--max-new-tokens` or `-n`."
        )
    return found
