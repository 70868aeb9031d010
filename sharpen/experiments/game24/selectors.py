"""Every selector of the study, by name: what it chooses from k of the G samples of each prompt.

Best-of-N and the votes have exact figures, or finer ones, in `sharpen.evaluation.metrics`. The
others are the functions of `sharpen.selection`, run on seeded subsets: the samples of each prompt
are put in a random order and cut into G // k sets of k, that many sets for every order, so fewer
orders are needed than if each gave one. At k = G only a selector that draws, or minds the order,
sees more than one case.

P prompts, G completions per prompt, N = P k completions of a subset.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from sharpen.evaluation.metrics import MAJORITY, RPC, Outcome, best_of_k
from sharpen.scoring import Scores
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
N_ORDERS = 4  # orders of a prompt's samples; chosen


@dataclass(frozen=True)
class Subset:
    """k samples of each prompt, as selectors take them; flat lists are all prompts end to end.

    Attributes:
        scores: One token a completion, whose log-prob is that of the completion.
        reward: fp64 [N] of each reward.
        answers: What each of the N completions answers.
        keys: Equal for equal completions of a prompt.
        k: Completions of each prompt.
    """

    scores: Scores
    reward: Mapping[str, Tensor]
    answers: list[str | None]
    keys: list[int]
    k: int


@dataclass(frozen=True)
class SubsetChoice:
    """What a selector made of a subset.

    Attributes:
        weight: fp64 [N], chance of each completion to be chosen.
        facts: Further numbers [P] by name, such as the samples used.
    """

    weight: Tensor
    facts: Mapping[str, Tensor]


Chooser = Callable[[Subset, torch.Generator], SubsetChoice]


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
    def choose(subset: Subset, generator: torch.Generator) -> SubsetChoice:
        # as the source does: 0.3 for up to 16 samples
        p = 0.3 if subset.k <= 16 else 1.2
        reward_N = subset.reward[reward]
        return _one_hot(subset, borda_vote(subset.scores, subset.answers, reward=reward_N, p=p))

    return choose


def _confidence(reward: str, keep: float) -> Chooser:
    def choose(subset: Subset, generator: torch.Generator) -> SubsetChoice:
        reward_N = subset.reward[reward]
        vote_P = confidence_vote(subset.scores, subset.answers, reward=reward_N, keep=keep)
        return _one_hot(subset, vote_P)

    return choose


def _filtered(reward: str, keep: float) -> Chooser:
    def choose(subset: Subset, generator: torch.Generator) -> SubsetChoice:
        kept_N = confidence_filter(subset.scores, subset.reward[reward], keep=keep)
        logprob_Pk = subset.reward["logprob"].masked_fill(~kept_N, -math.inf).reshape(-1, subset.k)
        has_one_P = kept_N.reshape(-1, subset.k).any(dim=1)
        return _one_hot(subset, torch.where(has_one_P, logprob_Pk.argmax(dim=1), -1))

    return choose


def _soft(power: float) -> Chooser:
    def choose(subset: Subset, generator: torch.Generator) -> SubsetChoice:
        found = soft_best_of_n(
            subset.scores,
            subset.reward["logprob"],
            temperature=1 / (power - 1),
            generator=generator,
        )
        return SubsetChoice(found.weight, {"effective_samples": found.effective_samples})

    return choose


def _pessimistic(subset: Subset, generator: torch.Generator) -> SubsetChoice:
    reward_N = subset.reward["logprob"]
    found = pessimistic_best_of_n(subset.scores, reward_N, beta=BETA, generator=generator)
    return SubsetChoice(found.weight, {"effective_samples": found.effective_samples})


def _two_batches(subset: Subset, generator: torch.Generator) -> SubsetChoice:
    """The first half of the samples measures, the second is chosen from."""
    n_first = subset.k // 2
    first, second = _halves(subset, n_first)
    found = inference_time_pessimism(first, second, beta=BETA, generator=generator)
    chosen_P = torch.where(found.chosen >= 0, found.chosen + n_first, -1)
    return _one_hot(subset, chosen_P, accepted=found.accepted)


def _halves(subset: Subset, n_first: int) -> list[Scores]:
    """Scores of the first `n_first` samples of each prompt, and of the others."""
    logprob_Pk = subset.reward["logprob"].reshape(-1, subset.k)
    valid_Pk = subset.scores.valid.reshape(-1, subset.k)
    return [
        Scores.from_logprobs(logprob_Pk[:, part, None].tolist(), valid_Pk[:, part].tolist())
        for part in (slice(None, n_first), slice(n_first, None))
    ]


def _adaptive(subset: Subset, generator: torch.Generator) -> SubsetChoice:
    found = adaptive_best_of_n(subset.scores, delta=DELTA)
    return _one_hot(subset, found.chosen, n_used=found.n_used, certified=found.certified)


def _one_hot(subset: Subset, chosen: Int64[Tensor, " P"], **facts: Tensor) -> SubsetChoice:
    """The choice of one completion of each prompt, of none where it is -1."""
    return SubsetChoice(chosen_weights(subset.scores.groups, chosen), facts)


def subset_of(outcome: Outcome, index_Pk: Int64[np.ndarray, "P k"]) -> Subset:
    """The samples of each prompt that `index_Pk` names, in its order."""
    P, k = index_Pk.shape
    logprob_Pk = np.take_along_axis(outcome.reward_PG["logprob"], index_Pk, axis=1)
    valid_Pk = np.take_along_axis(outcome.valid_PG, index_Pk, axis=1)
    assert outcome.answers is not None
    assert outcome.response_PG is not None
    index = index_Pk.tolist()
    return Subset(
        scores=Scores.from_logprobs(logprob_Pk[..., None].tolist(), valid_Pk.tolist()),
        reward={
            name: torch.from_numpy(np.take_along_axis(reward_PG, index_Pk, axis=1).reshape(P * k))
            for name, reward_PG in outcome.reward_PG.items()
        },
        answers=[outcome.answers[p][g] for p in range(P) for g in index[p]],
        keys=np.take_along_axis(outcome.response_PG, index_Pk, axis=1).flatten().tolist(),
        k=k,
    )


def expected_choice(
    outcome: Outcome, choose: Chooser, k: int, *, seed: int, n_orders: int = N_ORDERS
) -> tuple[Float64[np.ndarray, "P G"], dict[str, float]]:
    """Chance of each of the G samples to be chosen from k of them, and the means of the facts.

    Args:
        outcome: With answers.
        choose: The selector.
        k: In 1 ... G.
        seed: Of the orders, and of the selector's own draws.
        n_orders: Orders of the samples, at least 1.
    """
    P, G = outcome.valid_PG.shape
    weight_PG = np.zeros((P, G))
    facts: dict[str, list[float]] = {}
    generator = torch.Generator().manual_seed(seed)
    n_sets = G // k
    for order in range(n_orders):
        order_PG = np.random.default_rng([seed, order]).random((P, G)).argsort(axis=1)
        for part in range(n_sets):
            index_Pk = order_PG[:, part * k : (part + 1) * k]
            choice = choose(subset_of(outcome, index_Pk), generator)
            share_Pk = choice.weight.numpy().reshape(P, k) / (n_orders * n_sets)
            # indices of a prompt are distinct
            at_PG = np.take_along_axis(weight_PG, index_Pk, axis=1)
            np.put_along_axis(weight_PG, index_Pk, at_PG + share_Pk, axis=1)
            for name, value_P in choice.facts.items():
                facts.setdefault(name, []).append(float(value_P.double().mean()))
    return weight_PG, {name: float(np.mean(values)) for name, values in facts.items()}
