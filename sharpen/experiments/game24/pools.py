"""What the stages left on disk: samples of every prompt as arrays, and the cost of each training.

P prompts, G completions per prompt. Nats.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64

from sharpen.commands.train import SUMMARY
from sharpen.errors import InputError
from sharpen.evaluation.metrics import RPC, Outcome
from sharpen.experiments.options import StudyConfig
from sharpen.models import load_model
from sharpen.records import Row, read_rows
from sharpen.scoring.rewards import answer_logprob
from sharpen.tasks import Example, Task, get_task

from .plan import TEST, Sizes, TakenSamples, lineage, pool_name, samples_file, taken_samples
from .stages import STAGES


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
    """
    got, wanted = [row["prompt_id"] for row in rows], [example.id for example in examples]
    if got != wanted:
        raise InputError(
            f"`rows` must be of the prompts {wanted[:3]} ..., {len(wanted)} in all, got "
            f"{got[:3]} ..., {len(got)}; draw them with the same task, split and limit."
        )
    length_PG = np.array([[len(ids) for ids in row["completion_ids"]] for row in rows])
    own_PG = np.array(
        [[float(np.sum(_numbers(tokens))) for tokens in row["logprobs"]] for row in rows]
    )
    reward_PG = {
        name: np.array([_numbers(row["rewards"][name]) for row in rows])
        for name in rows[0].get("rewards", {})
    }
    reward_PG.setdefault("logprob", own_PG)
    finished_PG = np.array([[why == "stop" for why in row["finish_reasons"]] for row in rows])
    valid_PG = finished_PG & (length_PG > 0) & ~np.isnan(reward_PG["logprob"])
    pairs = list(zip(examples, rows, strict=True))
    answers = [[task.answer(e, text) for text in row["completions"]] for e, row in pairs]
    response_PG = np.array([_response_numbers(row["completion_ids"]) for row in rows])
    reward_PG[RPC] = _answer_logprobs(reward_PG["logprob"], valid_PG, answers, response_PG)
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


def _response_numbers(completion_ids: Sequence[Sequence[int]]) -> list[int]:
    """A number for each distinct completion of a prompt."""
    seen: dict[tuple[int, ...], int] = {}
    return [seen.setdefault(tuple(ids), len(seen)) for ids in completion_ids]


def _answer_logprobs(
    logprob_PG: Float64[np.ndarray, "P G"],
    valid_PG: Bool[np.ndarray, "P G"],
    answers: Sequence[Sequence[str | None]],
    response_PG: Int64[np.ndarray, "P G"],
) -> Float64[np.ndarray, "P G"]:
    """Log of the summed probability of each completion's answer, nats: the reward "rpc"."""
    P, G = logprob_PG.shape
    mass_N = answer_logprob(
        torch.from_numpy(logprob_PG.flatten()),
        torch.arange(0, P * G + 1, G),
        torch.from_numpy(valid_PG.flatten()),
        [answer for group in answers for answer in group],
        response_PG.flatten().tolist(),
    )
    return mass_N.numpy().reshape(P, G)


class StageFiles:
    """What the stages of a study wrote: samples as pools, and what each training cost."""

    def __init__(self, config: StudyConfig, sizes: Sizes):
        self.config, self.sizes, self.out = config, sizes, Path(config.out)
        self.task = get_task(config.task)
        self.examples = self.task.examples(TEST)[: sizes.limit]
        self.n_parameters = load_model(config.model, device="cpu").num_parameters()

    def pool(self, name: str, *, scored: bool = False) -> Pool:
        """The samples of a stage."""
        rows = self._rows(samples_file(self.out, name, scored=scored))
        return pool_of(rows, self.task, self.examples)

    def training_cost(self, method: str) -> dict[str, int | float]:
        """Tokens and seconds of a training and of those that it starts from, mean over seeds."""
        seeds = range(self.sizes.train_seeds)
        costs = [[self._own_cost(m, seed) for m in lineage(method)] for seed in seeds]
        sums = np.array(costs).sum(axis=1).mean(axis=0)
        drawn, fitted, seconds, fitting = map(float, sums)
        return {
            "tokens_drawn": round(drawn),
            "tokens_fitted": round(fitted),
            "seconds": round(seconds, 1),
            "seconds_of_fitting": round(fitting, 1),
        }

    def summary(self, method: str, seed: int) -> Row:
        """What a training says of itself."""
        return json.loads((self.out / "train" / f"{method}-{seed}" / SUMMARY).read_text())

    def _own_cost(self, method: str, seed: int) -> tuple[float, float, float, float]:
        """Tokens drawn and fitted, seconds in all and of fitting; of a pool, the share it takes."""
        run = self.out / "train" / f"{method}-{seed}"
        spent = self.summary(method, seed)["seconds"]
        drawn = float(sum(self._tokens(path) for path in sorted(run.rglob("samples.jsonl"))))
        seconds, pool = sum(spent.values()), pool_name(method, seed)
        if pool is not None:
            path = samples_file(self.out, pool)
            taken = self._tokens(path, taken_samples(self.sizes, method))
            stages = {row["stage"]: row["seconds"] for row in self._rows(self.out / STAGES)}
            drawn += taken
            seconds += stages[pool] * taken / self._tokens(path)
        return drawn, self._fitted(run), seconds, spent.get("train", 0.0)

    def _fitted(self, run: Path) -> float:
        """Tokens that fitting read, prompts once; the Trainer counts 6 flops a weight and token."""
        total = 0.0
        for folder in sorted(run.rglob("checkpoints")):
            states = folder.glob("checkpoint-*/trainer_state.json")
            last = max(states, key=lambda path: int(path.parent.name.rpartition("-")[2]))
            total += json.loads(last.read_text())["total_flos"] / (6 * self.n_parameters)
        return total

    def _tokens(self, path: Path, part: TakenSamples | None = None) -> int:
        """Of all samples in a file, or of those that a training takes."""
        rows = self._rows(path)
        if part is None:
            return sum(len(ids) for row in rows for ids in row["completion_ids"])
        examples = [x for split in part.split.split("+") for x in self.task.examples(split)]
        taken = {example.id for example in examples[: part.limit]}
        return sum(
            len(ids)
            for row in rows
            if row["prompt_id"] in taken
            for ids in row["completion_ids"][: part.n]
        )

    def _rows(self, path: Path) -> list[Row]:
        return [row for _, row in read_rows(path)]
