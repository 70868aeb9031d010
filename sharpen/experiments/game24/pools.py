"""Samples of every prompt as arrays: rewards, grades, answers and lengths.

P prompts, G completions per prompt. Nats.

What any selector chooses from k of G samples, as a mean over seeded subsets.

The samples of each prompt are put in a random order and cut into G // k sets of k, that many sets
for every order: fewer orders are needed than if each gave one. At k = G only a selector that draws,
or minds the order, sees more than one case.

P prompts, G completions per prompt, N = P k completions of a subset.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from sharpen.errors import InputError
from sharpen.evaluation.outcome import RPC, Outcome
from sharpen.records import Row
from sharpen.scoring import Scores
from sharpen.scoring.votes import answer_logprob
from sharpen.tasks import Example, Task


@dataclass(frozen=True)
class Pool:
    """Equally many samples of each prompt, drawn from one law.

    Attributes:
        outcome: Rewards under the base model, grades, answers.
        own_PG: Log-prob of each completion under the model that drew it, at temperature 1.
        length_PG: Tokens of each completion, its end token among them.
        log_z_P: A sampler's estimate of log sum_y p(y | x)^alpha; None if it has none.
        cost_PG: Completion tokens that the model drew and read again for each sample, where its
            sampler counts them.
    """

    outcome: Outcome
    own_PG: Float64[np.ndarray, "P G"]
    length_PG: Int64[np.ndarray, "P G"]
    log_z_P: Float64[np.ndarray, " P"] | None = None
    cost_PG: Float64[np.ndarray, "P G"] | None = None

    @property
    def correct(self) -> Bool[np.ndarray, "P G"]:
        """Grades."""
        assert self.outcome.correct_PG is not None
        return self.outcome.correct_PG


def pool_of(rows: Sequence[Row], task: Task, examples: Sequence[Example]) -> Pool:
    """The pool in records of `sharpen sample`, or of `sharpen score` after it.

    A record that was scored holds `rewards` under the base model; of one that was not, the
    log-probs kept in sampling are taken for the base model's.

    Raises:
        InputError: If the records are not those of the examples, or of different numbers.
    """
    got, wanted = [row["prompt_id"] for row in rows], [example.id for example in examples]
    if got != wanted:
        raise InputError(
            f"`rows` must be of the prompts {wanted[:3]} ..., {len(wanted)} in all, got "
            f"{got[:3]} ..., {len(got)}; draw them with the same task, split and limit."
        )
    length_PG = np.array([[len(ids) for ids in row["completion_ids"]] for row in rows])
    own_PG = np.array([[_total(tokens) for tokens in row["logprobs"]] for row in rows])
    reward_PG = {
        name: np.array([_numbers(row["rewards"][name]) for row in rows])
        for name in rows[0].get("rewards", {})
    }
    reward_PG.setdefault("logprob", own_PG)
    finished_PG = np.array([[why == "stop" for why in row["finish_reasons"]] for row in rows])
    valid_PG = finished_PG & (length_PG > 0) & ~np.isnan(reward_PG["logprob"])
    pairs = list(zip(examples, rows, strict=True))
    answers = [[task.answer(e, text) for text in row["completions"]] for e, row in pairs]
    response_PG = np.array([_numbered(row["completion_ids"]) for row in rows])
    reward_PG[RPC] = _log_masses(reward_PG["logprob"], valid_PG, answers, response_PG)
    correct_PG = np.array([[task.is_correct(e, t) for t in row["completions"]] for e, row in pairs])
    outcome = Outcome(
        reward_PG=reward_PG,
        valid_PG=valid_PG,
        correct_PG=correct_PG,
        answers=answers,
        response_PG=response_PG,
    )
    has_z = "log_z" in rows[0]
    log_z_P = np.array(_numbers([row["log_z"] for row in rows])) if has_z else None
    cost_PG = None
    if "drawn" in rows[0]:
        cost_PG = np.array([np.add(row["drawn"], row["read_again"]) for row in rows], dtype=float)
    return Pool(outcome, own_PG, length_PG.astype(np.int64), log_z_P, cost_PG)


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [np.nan if x is None else float(x) for x in values]


def _total(tokens: Sequence[float | None]) -> float:
    return float(np.sum(_numbers(tokens)))


def _numbered(completion_ids: Sequence[Sequence[int]]) -> list[int]:
    """A number for each distinct completion of a prompt."""
    seen: dict[tuple[int, ...], int] = {}
    return [seen.setdefault(tuple(ids), len(seen)) for ids in completion_ids]


def _log_masses(
    logprob_PG: Float64[np.ndarray, "P G"],
    valid_PG: Bool[np.ndarray, "P G"],
    answers: Sequence[Sequence[str | None]],
    response_PG: Int64[np.ndarray, "P G"],
) -> Float64[np.ndarray, "P G"]:
    P, G = logprob_PG.shape
    mass_N = answer_logprob(
        torch.from_numpy(logprob_PG.flatten()),
        torch.arange(0, P * G + 1, G),
        torch.from_numpy(valid_PG.flatten()),
        [answer for group in answers for answer in group],
        response_PG.flatten().tolist(),
    )
    return mass_N.numpy().reshape(P, G)


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
