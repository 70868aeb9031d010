"""`sharpen sft`: sample, choose what the model itself rates highest, fit it (SFT-Sharpening).

    y_1 ... y_N ~ pi_base(x);   y* = argmax_i r(y_i);   pi = argmax sum_x log pi(y* | x)

With `--weights soft` every sample counts, by exp(r / lambda): power self-distillation. Writes into
its run directory: `samples.jsonl`, `scores.jsonl` (log-probs under the base model), `losses.jsonl`,
`checkpoints/`, `model/` and `summary.json`.
"""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from sharpen.errors import check_value
from sharpen.selection import best_of_n
from sharpen.training.groups import chosen_weights, tilted_weights, weighted_groups
from sharpen.training.losses import Likelihood

from .inputs import check_provenance
from .options import SftConfig
from .train import Choice, Drawn, train_offline


def run(config: SftConfig) -> None:
    """Run the command, or go on with it."""
    check(config)
    train_offline("sft", config, own(config), partial(choose, config))


def check(config: SftConfig) -> None:
    """Reject soft weights that cannot be, or that are no such thing on the samples they get."""
    soft = config.soft_temperature
    check_value("soft_temperature", soft, 0 < soft < float("inf"), "above 0 and finite")
    plain = "must" if config.weights == "soft" else "any"
    check_provenance(config, plain, "`--weights soft`")


def own(config: SftConfig) -> dict[str, Any]:
    """The options that no other training command has."""
    return {name: getattr(config, name) for name in ("weights", "soft_temperature", "per")}


def choose(config: SftConfig, drawn: Drawn) -> Choice:
    """The samples of positive weight."""
    weight_N = weights(config, drawn)
    groups = weighted_groups(
        [row["prompt_ids"] for row in drawn.rows],
        [row["completion_ids"] for row in drawn.rows],
        weight_N,
    )
    n_fitted = sum(len(group.completion_ids) for group in groups)
    found = {
        "completions_fitted": n_fitted,
        "base_logprob_fitted": _mean(drawn.reference, weight_N),
        "base_logprob_sampled": _mean(drawn.reference, drawn.usable.double()),
    }
    return Choice(groups, Likelihood(config.per), found, f"{n_fitted} completions")


def weights(config: SftConfig, drawn: Drawn) -> Float64[Tensor, " N"]:
    """Weight of each sample in the likelihood; at most 1 a prompt together, but with "equal"."""
    groups, usable_N = drawn.scores.groups, drawn.usable
    if config.weights == "equal":
        return usable_N.double()
    if config.weights == "soft":
        return tilted_weights(drawn.reward, groups, usable_N, config.soft_temperature)
    reward_N = drawn.reward.masked_fill(~usable_N, torch.nan)
    return chosen_weights(groups, best_of_n(drawn.scores, reward_N))


def _mean(values: Float64[Tensor, " N"], weight: Float64[Tensor, " N"]) -> float:
    used = weight > 0
    return float((values[used] * weight[used]).sum() / weight[used].sum())
