"""Rounds of sampling from the model being trained: the data they gather, and what each does."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sharpen.errors import InputError
from sharpen.models import load_model
from sharpen.records import Row
from sharpen.runs import Journal
from sharpen.sampling import Prompt, SamplingConfig
from sharpen.sampling.hf import TransformersSampler
from sharpen.scoring import Scorer
from sharpen.training.fit import MODEL
from sharpen.training.groups import Batch, Group
from sharpen.training.losses import square_loss
from sharpen.training.value import regularised_value

from .crew import Crew, Task
from .sources import Source
from .stages import sample_into, score_samples
from .training import SAMPLES, TIMINGS, Drawn, TrainConfig, fit_into, rate

VALIDATION = "validation"
# samples of a held-out prompt that judge a round; chosen
N_JUDGE = 16


class Data:
    """Pairs (y, y') of every prompt, of all rounds so far.

    Attributes:
        value_bound: Largest |beta log pi/pi_base| of a y or y', under the policy of its round.
        reward_bound: Largest -log pi_base of a y or y', in nats.
    """

    def __init__(self, prompts: Sequence[Prompt]):
        self.prompts = [list(prompt.ids) for prompt in prompts]
        self.completions: list[list[list[int]]] = [[] for _ in prompts]
        self.reference: list[list[float]] = [[] for _ in prompts]
        self.reward: list[list[float]] = [[] for _ in prompts]
        self.value_bound = 0.0
        self.reward_bound = 0.0

    def add(
        self,
        drawn: Drawn,
        base: Drawn,
        t: int,
        *,
        n: int,
        beta: float,
        policy: list[list[float]] | None = None,
    ) -> None:
        """Add round t >= 1: y_i of each prompt from `drawn`, y'_i from its n samples of `base`.

        A pair with an unusable side is left out.

        Args:
            drawn: Of the policy of the round.
            base: Of the base model, n a prompt for each round.
            t: The round.
            n: Pairs a prompt.
            beta: Weight of the KL term.
            policy: log pi of each prompt's n y', in nats; None where the policy is the base.
        """
        for p, (policy_row, base_row) in enumerate(zip(_each(drawn), _each(base), strict=True)):
            for i in range(n):
                sides = [(policy_row, i), (base_row, (t - 1) * n + i)]
                if not all(row["usable"][g] for row, g in sides):
                    continue
                for row, g in sides:
                    self.completions[p].append(row["completion_ids"][g])
                    self.reference[p].append(row["reference"][g])
                    self.reward[p].append(row["reward"][g])
                    self.reward_bound = max(self.reward_bound, -row["reference"][g])
                ratios = [math.fsum(policy_row["logprobs"][i]) - policy_row["reference"][i]]
                if policy is not None:
                    ratios.append(policy[p][i] - base_row["reference"][(t - 1) * n + i])
                self.value_bound = max(self.value_bound, *(abs(beta * ratio) for ratio in ratios))

    def groups(self) -> list[Group]:
        """One group a prompt, of all its pairs.

        Raises:
            InputError: If there is no pair.
        """
        columns = zip(self.prompts, self.completions, self.reference, self.reward, strict=True)
        found = [
            Group(
                prompt, ids, reference=reference, reward=reward,
                pairs=[(at, at + 1) for at in range(0, len(ids), 2)],
            )
            for prompt, ids, reference, reward in columns
            if ids
        ]  # fmt: skip
        if not found:
            raise InputError(
                "`n` must leave a finished pair of some prompt, got none; raise "
                "`--max-new-tokens` or `-n`."
            )
        return found


@dataclass(frozen=True)
class Stage:
    """What every round needs: how to draw, rate, fit and judge."""

    config: TrainConfig
    reward: str
    beta: float
    source: Source
    tokenizer: PreTrainedTokenizerBase
    scorer: Scorer
    crew: Crew

    def draw(
        self, folder: Path, policy: PreTrainedModel, prompts: list[Prompt], draws: SamplingConfig
    ) -> Drawn:
        """Samples of `policy`, rated by the base model."""
        folder.mkdir(parents=True, exist_ok=True)
        sampler = TransformersSampler(policy, self.tokenizer, max_tokens=self.config.max_tokens)
        timings = Journal(folder / TIMINGS)
        rows = sample_into(
            folder / SAMPLES, sampler, prompts, draws, label="sample", timings=timings
        )
        return rate(folder, self.scorer, self.source, rows, self.reward)

    def logprobs(self, path: Path, policy: PreTrainedModel, rows: list[Row]) -> list[list[float]]:
        """Log pi of given completions of each prompt under `policy`, in nats; kept in `path`."""
        scorer = Scorer(policy, max_tokens=self.config.max_tokens)
        scores = score_samples(path, scorer, rows, ("logprob",), Journal(path.parent / TIMINGS))
        return [logprob_G.tolist() for logprob_G in scores.by_prompt("logprob")]

    def terms(
        self, folder: Path, policy: PreTrainedModel, groups: list[Group], optimism: float
    ) -> Row:
        """The two terms of the loss that the fit of a round has left, and what they are made of.

        Returns:
            `pairs`, `square` (mean e^2, nats^2), `base_logprob` (mean log pi(y'), nats) and
            `optimism_term`, its product with `optimism`.
        """
        batch = Batch.of(groups)
        rows = [
            {"prompt_id": str(p), "prompt_ids": prompt, "completion_ids": completions,
             "finish_reasons": ["stop"] * len(completions)}
            for p, (prompt, completions) in enumerate(
                zip(batch.prompts, batch.completions, strict=True)
            )
        ]  # fmt: skip
        found = self.logprobs(folder / "scores-fitted.jsonl", policy, rows)
        logprob_N = torch.tensor([x for group in found for x in group], dtype=torch.float64)
        square = square_loss(
            logprob_N - batch.reference, batch.reward, batch.pairs, beta=self.beta
        ).item()
        base = logprob_N[batch.pairs[:, 1]].mean().item()
        terms = {"square": square, "base_logprob": base, "optimism_term": optimism * base}
        return {"pairs": len(batch.pairs)} | {
            # a policy that diverged has none
            name: value if math.isfinite(value) else None
            for name, value in terms.items()
        }

    def judge(self, folder: Path, policy: PreTrainedModel, prompts: list[Prompt]) -> float | None:
        """J_beta on prompts that are not fitted; None where no sample was finished."""
        draws = replace(self.config.sampling(), n=N_JUDGE)
        drawn = self.draw(folder / VALIDATION, policy, prompts, draws)
        own = [math.fsum(_numbers(x)) for row in drawn.rows for x in row["logprobs"]]
        log_ratio_N = torch.tensor(own, dtype=torch.float64) - drawn.reference
        eligible_N = drawn.usable & log_ratio_N.isfinite()
        if not eligible_N.any():
            return None
        return regularised_value(drawn.reward, log_ratio_N, eligible_N, beta=self.beta)

    def fit(self, task: Task, policy: PreTrainedModel) -> PreTrainedModel:
        """The next policy, from the weights of this one."""
        if not (task.out / MODEL).exists():
            # the base stays as it is: it rates every round
            started = copy.deepcopy(policy) if policy is self.scorer.model else policy
            fit_into(self.crew, task, started, self.tokenizer)
        return self.load(task.out)

    def load(self, folder: Path) -> PreTrainedModel:
        """The model of a round: from disk, so that a resumed run goes on with the same bits."""
        base = self.scorer.model
        return load_model(
            folder / MODEL,
            device=base.device,
            dtype=base.dtype,
            trust_remote_code=self.config.trust_remote_code,
        )


def of_round(row: Row, t: int, n: int) -> Row:
    """A record of samples with those n alone that belong to round t >= 1."""
    lists = "completions", "completion_ids", "logprobs", "finish_reasons"
    return row | {name: row[name][(t - 1) * n : t * n] for name in lists}


def _each(drawn: Drawn) -> list[Row]:
    """The rows of `drawn` with what is known of their completions."""
    bounds = list(pairwise(drawn.scores.groups.tolist()))
    columns = {
        "reference": drawn.reference.tolist(),
        "reward": drawn.reward.tolist(),
        "usable": drawn.usable.tolist(),
    }
    return [
        row | {name: values[a:b] for name, values in columns.items()}
        for row, (a, b) in zip(drawn.rows, bounds, strict=True)
    ]


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if x is None else x for x in values]
