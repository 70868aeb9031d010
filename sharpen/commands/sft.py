"""`sharpen sft`: sample, choose what the model itself rates highest, fit it (SFT-Sharpening).

    y_1 ... y_N ~ pi_base(x);   y* = argmax_i r(y_i);   pi = argmax sum_x log pi(y* | x)

With `--weights soft` every sample counts, by exp(r / lambda): power self-distillation. Writes into
its run directory: `samples.jsonl`, `scores.jsonl` (log-probs under the base model), `losses.jsonl`,
`checkpoints/`, `model/` and `summary.json`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from sharpen.errors import InputError
from sharpen.runs import Run
from sharpen.sampling.hf import TransformersSampler
from sharpen.sampling.prompts import render_all
from sharpen.scoring import Scorer
from sharpen.scoring.rewards import REWARDS
from sharpen.selection import best_of_n
from sharpen.training.groups import chosen_weights, weighted_groups
from sharpen.training.objectives import Likelihood
from sharpen.training.scaling import tilted_weights

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
class SftConfig(TrainConfig):
    """SFT-Sharpening: sample, score, choose, fit."""

    out: str = required("run directory; the same command again goes on where it stopped")
    split: str = option("split of the task, or several as A+B", "sharpen")
    reward: str = option(f"what to choose by: {', '.join(REWARDS)}", "logprob")
    weights: Literal["best", "soft", "equal"] = option(
        "best: the best of N alone; soft: all, by exp(reward / soft_temperature), which is power "
        "self-distillation; equal: all alike, for samples of the target itself",
        "best",
    )
    soft_temperature: float = option(
        "lambda of soft weights; of logprob towards the power 1 + 1/lambda", 1.0
    )
    per: Literal["token", "sequence"] = option("what a step's likelihood is a mean over", "token")
    samples: str | None = option(
        "a file of `sharpen sample`, of which the first N a prompt are used instead of drawing"
    )
    scores: Literal["scorer", "sampler"] = option(
        "log-probs of the base: scorer: a forward pass over all samples; "
        "sampler: those kept while drawing, which cost nothing",
        "scorer",
    )


def run(config: SftConfig) -> None:
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
        weight_N = choose(config, drawn)
        groups = weighted_groups(
            [row["prompt_ids"] for row in rows], [row["completion_ids"] for row in rows], weight_N
        )
        fit_into(out, model, tokenizer, groups, Likelihood(config.per), options)
        n_fitted = sum(len(group.completion_ids) for group in groups)
        found = {
            "prompts": len(prompts),
            "prompts_fitted": len(groups),
            "completions_fitted": n_fitted,
            "base_logprob_fitted": _mean(drawn.reference, weight_N),
            "base_logprob_sampled": _mean(drawn.reference, drawn.scores.eligible.double()),
        }
        finish(
            out, config, found,
            f"fitted {n_fitted} completions of {len(groups)} of {len(prompts)} prompts",
        )  # fmt: skip


def check(config: SftConfig) -> None:
    """Refuse weights that cannot be.

    Raises:
        InputError: If the temperature of soft weights is not above 0.
    """
    if not config.soft_temperature > 0:
        raise InputError(f"`soft_temperature` must be above 0, got {config.soft_temperature}.")


def settings(config: SftConfig, device: torch.device) -> dict[str, Any]:
    """Everything that the outputs depend on."""
    names = ("reward", "weights", "soft_temperature", "per", "scores")
    return {
        **training_settings("sft", config, device),
        **{name: getattr(config, name) for name in names},
        **samples_settings(config.samples),
    }


def choose(config: SftConfig, drawn: Drawn) -> Float64[Tensor, " N"]:
    """Weight of each sample in the likelihood; at most 1 a prompt together, but with "equal"."""
    scores = drawn.scores
    eligible_N = scores.eligible & ~drawn.reward.isnan()
    if config.weights == "equal":
        return eligible_N.double()
    if config.weights == "soft":
        return tilted_weights(drawn.reward, scores.groups, eligible_N, config.soft_temperature)
    return chosen_weights(scores.groups, best_of_n(scores, drawn.reward.float()))


def _mean(values: Float64[Tensor, " N"], weight: Float64[Tensor, " N"]) -> float | None:
    used = weight > 0
    if not used.any():
        return None
    return float((values[used] * weight[used]).sum() / weight[used].sum())
