"""Every selector of the study, by name: what it chooses from k of the samples of each prompt.

Best-of-N and the votes have exact figures, or finer ones, in `curves`; the others are the functions
of `sharpen.selection`, run on subsets.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from sharpen.evaluation.metrics import best_of_k
from sharpen.evaluation.outcome import MAJORITY, RPC, Outcome
from sharpen.selection import (
    adaptive_best_of_n,
    borda_vote,
    confidence_filter,
    confidence_vote,
    inference_time_pessimism,
    pessimistic_best_of_n,
    soft_best_of_n,
)
from sharpen.training.groups import chosen_weights

from .pools import Choice, Chooser, Subset, expected_choice

# neg_perplexity orders as mean_logprob does
BEST_BY = (
    "logprob",
    "mean_logprob",
    "min_token",
    "self_certainty",
    "neg_entropy",
    "confidence",
    "confidence_lowest",
    "confidence_bottom",
    "confidence_tail",
)
# rewards that `sharpen score` must have computed
REWARDS = ("logprob", "mean_logprob", "neg_perplexity", *BEST_BY[2:])
DELTA = 0.1  # of adaptive best-of-N; chosen
BETA = 1.0  # of pessimism, nats; chosen


@dataclass(frozen=True)
class Selected:
    """What a selector chooses from k samples.

    Attributes:
        weight_PG: Chance of each of all samples to be chosen.
        facts: Means over prompts and subsets of what else it says; `n_used` is k if not there.
    """

    weight_PG: Float64[np.ndarray, "P G"]
    facts: dict[str, float] = field(default_factory=dict)


# outcome, k, seed
Selector = Callable[[Outcome, int, int], Selected]


def selectors() -> dict[str, Selector]:
    """All of them, in the order of the table."""
    found: dict[str, Selector] = {f"best-of-N, {name}": _exact(name) for name in BEST_BY}
    found["majority"] = _exact(MAJORITY)
    found["probability-weighted majority"] = _exact(RPC)
    on_subsets: dict[str, Chooser] = {
        "Borda, self_certainty": _borda("self_certainty"),
        "Borda, logprob": _borda("logprob"),
        "DeepConf vote, tail, keep 0.1": _confidence("confidence_tail", 0.1),
        "DeepConf vote, tail, keep 0.9": _confidence("confidence_tail", 0.9),
        "DeepConf vote, bottom, keep 0.1": _confidence("confidence_bottom", 0.1),
        "DeepConf vote, bottom, keep 0.9": _confidence("confidence_bottom", 0.9),
        "DeepConf filter, tail, keep 0.5, then logprob": _filtered("confidence_tail", 0.5),
        "soft best-of-N, power 2": _soft(2.0),
        "soft best-of-N, power 4": _soft(4.0),
        f"pessimistic best-of-N, beta {BETA:g}": _pessimistic,
        f"InferenceTimePessimism, beta {BETA:g}": _two_batches,
        f"adaptive best-of-N, delta {DELTA:g}": _adaptive,
    }
    return found | {name: _on_subsets(choose) for name, choose in on_subsets.items()}


def _exact(reward: str) -> Selector:
    def select(outcome: Outcome, k: int, seed: int) -> Selected:
        return Selected(best_of_k(outcome, reward, k, seed=seed).weight_PG)

    return select


def _on_subsets(choose: Chooser) -> Selector:
    def select(outcome: Outcome, k: int, seed: int) -> Selected:
        return Selected(*expected_choice(outcome, choose, k, seed=seed))

    return select


def _borda(reward: str) -> Chooser:
    def choose(subset: Subset, generator: torch.Generator) -> Choice:
        # as the source does: 0.3 for up to 16 samples
        p = 0.3 if subset.k <= 16 else 1.2
        reward_N = subset.reward[reward]
        return _one(subset, borda_vote(subset.scores, subset.answers, reward=reward_N, p=p))

    return choose


def _confidence(reward: str, keep: float) -> Chooser:
    def choose(subset: Subset, generator: torch.Generator) -> Choice:
        reward_N = subset.reward[reward]
        vote_P = confidence_vote(subset.scores, subset.answers, reward=reward_N, keep=keep)
        return _one(subset, vote_P)

    return choose


def _filtered(reward: str, keep: float) -> Chooser:
    def choose(subset: Subset, generator: torch.Generator) -> Choice:
        kept_N = confidence_filter(subset.scores, subset.reward[reward], keep=keep)
        logprob_Pk = subset.reward["logprob"].masked_fill(~kept_N, -math.inf).reshape(-1, subset.k)
        has_one_P = kept_N.reshape(-1, subset.k).any(dim=1)
        return _one(subset, torch.where(has_one_P, logprob_Pk.argmax(dim=1), -1))

    return choose


def _soft(power: float) -> Chooser:
    def choose(subset: Subset, generator: torch.Generator) -> Choice:
        found = soft_best_of_n(
            subset.scores, subset.reward["logprob"], temperature=1 / (power - 1),
            generator=generator,
        )  # fmt: skip
        return Choice(found.weight, {"effective_samples": found.effective_samples})

    return choose


def _pessimistic(subset: Subset, generator: torch.Generator) -> Choice:
    reward_N = subset.reward["logprob"]
    found = pessimistic_best_of_n(subset.scores, reward_N, beta=BETA, generator=generator)
    return Choice(found.weight, {"effective_samples": found.effective_samples})


def _two_batches(subset: Subset, generator: torch.Generator) -> Choice:
    """The first half of the samples measures, the second is chosen from."""
    n_first = subset.k // 2
    first, second = _halves(subset, n_first)
    found = inference_time_pessimism(first, second, beta=BETA, generator=generator)
    chosen_P = torch.where(found.chosen >= 0, found.chosen + n_first, -1)
    choice = _one(subset, chosen_P)
    return Choice(choice.weight, {"accepted": found.accepted})


def _halves(subset: Subset, n_first: int):
    logprob_Pk = subset.reward["logprob"].reshape(-1, subset.k)
    valid_Pk = subset.scores.valid.reshape(-1, subset.k)
    return [
        type(subset.scores).from_logprobs(
            logprob_Pk[:, part, None].tolist(), valid_Pk[:, part].tolist()
        )
        for part in (slice(None, n_first), slice(n_first, None))
    ]


def _adaptive(subset: Subset, generator: torch.Generator) -> Choice:
    found = adaptive_best_of_n(subset.scores, delta=DELTA)
    choice = _one(subset, found.chosen)
    return Choice(choice.weight, {"n_used": found.n_used, "certified": found.certified})


def _one(subset: Subset, chosen: Int64[Tensor, " P"]) -> Choice:
    return Choice(chosen_weights(subset.scores.groups, chosen), {})
