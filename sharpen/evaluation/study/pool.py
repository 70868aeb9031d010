"""Samples of every prompt as arrays: rewards, grades, answers and lengths.

P prompts, G completions per prompt. Nats.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64

from sharpen.errors import InputError
from sharpen.records import Row
from sharpen.scoring.votes import answer_logprob
from sharpen.tasks import Example, Task

from ..outcome import RPC, Outcome


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
