"""What any selector chooses from k of G samples, as a mean over seeded subsets.

The samples of each prompt are put in a random order and cut into G // k sets of k, that many sets
for every order: fewer orders are needed than if each gave one. At k = G only a selector that draws,
or minds the order, sees more than one case.

P prompts, G completions per prompt, N = P k completions of a subset.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from sharpen.scoring import Scores

from ..outcome import Outcome

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
class Choice:
    """What a selector made of a subset.

    Attributes:
        weight: fp64 [N], chance of each completion to be chosen.
        facts: Further numbers [P] by name, such as the samples used.
    """

    weight: Tensor
    facts: Mapping[str, Tensor]


Chooser = Callable[[Subset, torch.Generator], Choice]


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
