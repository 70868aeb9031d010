"""`sharpen xpo`: RLHF-Sharpening that explores (XPO), in rounds.

    for t = 1 ... T:
        y ~ pi_t(x),  y' ~ pi_base(x);   add (x, y, y') to D
        pi_{t+1} = argmin  mean_D e^2 + alpha (V + R)^2 mean_D log pi(y')
    the pi_t of highest J_beta on prompts that were held out

V and R bound |beta log pi/pi_base| and -log pi_base; here they are the largest seen in D, of y and
y'. alpha is a number, or with `--alpha auto` the proof's beta / (V + R) c / sqrt(T). Writes into
its run directory: `samples.jsonl` and `scores.jsonl` (of the base model), a folder
`round-T/` each with its own samples, scores, losses, checkpoints and model, `validation/` beside
them, `rounds.jsonl`, and in the end `model/` and `summary.json`.

    run, _train         the loop
    Rounds              what each round does: draw, fit, judge
    Data                D, and the largest V and R seen in it
"""

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sharpen.errors import InputError, check_value
from sharpen.models import load_model
from sharpen.records import Row, write_rows
from sharpen.runs import Journal, Run, Settings
from sharpen.sampling import Prompt, SamplingConfig
from sharpen.sampling.base import render_all
from sharpen.sampling.hf import TransformersSampler
from sharpen.scoring import Scorer
from sharpen.training.fit import MODEL, save_whole
from sharpen.training.groups import Batch, Group
from sharpen.training.losses import Square, check_beta, check_optimism, square_loss
from sharpen.training.options import FitOptions
from sharpen.training.xpo import optimism_weight, proof_alpha, regularised_value

from .engines import sampling_config
from .inputs import Source, open_source
from .options import REWARDS, REWARDS_WITHOUT_ANSWERS, XpoConfig
from .stages import RUN, SAMPLES, TIMINGS, numbers, sample_into, score_samples, some_samples
from .train import (
    Drawn,
    FitTask,
    WorkerGroup,
    check_training,
    finish,
    load_base,
    outputs_of,
    rate,
    run_on_rank_zero,
    training_settings,
)

log = logging.getLogger("sharpen")

ROUNDS, VALIDATION, AUTO = "rounds.jsonl", "validation", "auto"
# samples of a held-out prompt that judge a round; chosen
N_JUDGE = 16


def run(config: XpoConfig) -> None:
    """Run the command, or go on with it."""
    check(config)
    options = check_training(config, config.reward)
    run_on_rank_zero(config, partial(_train, config, options))


def _train(config: XpoConfig, options: FitOptions, workers: WorkerGroup) -> None:
    draws, out = sampling_config(config), Path(config.out)
    base, tokenizer = load_base(config)
    source = open_source(config, tokenizer)
    prompts = render_all(source.records, tokenizer)
    TransformersSampler(base, tokenizer, max_tokens=config.max_tokens).check(prompts, draws)
    fitted, held_out = divide(prompts, config.validation, config.seed)
    claimed = settings(config, base.device, workers.size)
    with Run(out / RUN, claimed, [*outputs_of(out), out / ROUNDS]):
        scorer = Scorer(base, max_tokens=config.max_tokens)
        rounds = Rounds(config, source, tokenizer, scorer, workers)
        # one stream for y', whatever the rounds do
        base_drawn = rounds.draw(out, base, fitted, replace(draws, n=config.n * config.rounds))
        found: list[Row] = [{"round": 0, "value": rounds.judge(out, base, held_out)}]
        data, policy = Data(fitted), base
        for t in range(1, config.rounds + 1):
            folder = out / f"round-{t}"
            # sample y of the policy, and rate its y'
            drawn = rounds.draw(folder, policy, fitted, replace(draws, seed=config.seed + t))
            moved = None
            if policy is not base:
                rows = [
                    some_samples(row, (t - 1) * config.n, t * config.n) for row in base_drawn.rows
                ]
                moved = rounds.logprobs(folder / "scores-base.jsonl", policy, rows)
            # choose all pairs so far, and how optimistic to be
            data.add(drawn, base_drawn, t, n=config.n, beta=config.beta, policy=moved)
            groups = data.groups()
            bounds = data.value_bound, data.reward_bound
            if config.alpha == AUTO:
                alpha = proof_alpha(config.exploration, config.beta, *bounds, config.rounds)
            else:
                alpha = float(config.alpha)
            optimism = optimism_weight(alpha, *bounds)
            # fit, judge, log
            before = None if policy is base else out / f"round-{t - 1}" / MODEL
            objective = Square(config.beta, optimism)
            task = FitTask(folder, before, base.dtype, groups, objective, options)
            policy = rounds.fit(task, policy)
            row = {
                "round": t,
                "value": rounds.judge(folder, policy, held_out),
                "alpha": alpha,
                "value_bound": data.value_bound,
                "reward_bound": data.reward_bound,
                "optimism": optimism,
            }
            found.append(row | rounds.terms(folder, policy, groups, optimism))
            write_rows(out / ROUNDS, found)
        best = best_round(found)
        chosen = base if best == 0 else rounds.load(out / f"round-{best}")
        if not (out / MODEL).exists():
            save_whole(chosen, tokenizer, out / MODEL)
        summary = {"prompts": len(fitted), "held_out": len(held_out), "kept_round": best}
        finish(out, config, summary | {"rounds": found}, report_of(found, best, len(held_out)))


def check(config: XpoConfig) -> None:
    """Reject what has no optimum, or what J_beta cannot be estimated from."""
    check_beta(config.beta)
    check_optimism("exploration", config.exploration)
    if config.alpha != AUTO:
        try:
            alpha = float(config.alpha)
        except ValueError as error:
            raise InputError(
                f"`alpha` must be a number or {AUTO}, got {config.alpha!r}."
            ) from error
        check_optimism("alpha", alpha)
        if config.exploration != 1:
            raise InputError(
                f"`exploration` must be left out with `--alpha {config.alpha}`, got "
                f"{config.exploration}: it is the constant of `--alpha {AUTO}`."
            )
    for name in ("rounds", "validation"):
        check_value(name, getattr(config, name), getattr(config, name) >= 1, "at least 1")
    if config.reward in REWARDS and config.reward not in REWARDS_WITHOUT_ANSWERS:
        raise InputError(
            f"`reward` must be one of {', '.join(REWARDS_WITHOUT_ANSWERS)} in xpo, got "
            f"{config.reward!r}: it depends on the other samples of a prompt, which change from "
            "round to round."
        )
    if (config.temperature, config.top_p) != (1.0, 1.0):
        raise InputError(
            "`temperature` and `top_p` must be 1 in xpo, whose samples are the model's own, got "
            f"{config.temperature} and {config.top_p}."
        )


def settings(config: XpoConfig, device: torch.device, n_processes: int = 1) -> Settings:
    """Everything that the outputs depend on."""
    names = ("reward", "beta", "exploration", "rounds", "validation")
    return {
        **training_settings("xpo", config, device, n_processes),
        **{name: getattr(config, name) for name in names},
        "alpha": AUTO if config.alpha == AUTO else float(config.alpha),
    }


@dataclass(frozen=True)
class Rounds:
    """What every round does: draw, rate, fit and judge."""

    config: XpoConfig
    source: Source
    tokenizer: PreTrainedTokenizerBase
    scorer: Scorer
    workers: WorkerGroup

    def draw(
        self, folder: Path, policy: PreTrainedModel, prompts: list[Prompt], draws: SamplingConfig
    ) -> Drawn:
        """Samples of `policy`, rated by the base model."""
        folder.mkdir(parents=True, exist_ok=True)
        sampler = TransformersSampler(policy, self.tokenizer, max_tokens=self.config.max_tokens)
        timings = Journal(folder / TIMINGS)
        rows = sample_into(folder / SAMPLES, sampler, prompts, draws, timings=timings)
        return rate(folder, self.scorer, self.source, rows, self.config.reward)

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
        rows = [
            {
                "prompt_id": str(p),
                "prompt_ids": group.prompt_ids,
                "completion_ids": group.completion_ids,
                "finish_reasons": ["stop"] * len(group.completion_ids),
            }
            for p, group in enumerate(groups)
        ]
        found = self.logprobs(folder / "scores-fitted.jsonl", policy, rows)
        logprob_N = torch.tensor([x for group in found for x in group], dtype=torch.float64)
        batch = Batch.of(groups)
        square = square_loss(
            logprob_N - batch.reference, batch.reward, batch.pairs, beta=self.config.beta
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
        draws = replace(sampling_config(self.config), n=N_JUDGE)
        drawn = self.draw(folder / VALIDATION, policy, prompts, draws)
        own = [math.fsum(numbers(x)) for row in drawn.rows for x in row["logprobs"]]
        log_ratio_N = torch.tensor(own, dtype=torch.float64) - drawn.reference
        eligible_N = drawn.usable & log_ratio_N.isfinite()
        if not eligible_N.any():
            return None
        return regularised_value(drawn.reward, log_ratio_N, eligible_N, beta=self.config.beta)

    def fit(self, task: FitTask, policy: PreTrainedModel) -> PreTrainedModel:
        """The next policy, from the weights of this one."""
        if not (task.out / MODEL).exists():
            # the base stays as it is: it rates every round
            started = copy.deepcopy(policy) if policy is self.scorer.model else policy
            self.workers.fit(task, started, self.tokenizer)
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
        """One group a prompt, of all its pairs; at least one."""
        columns = zip(self.prompts, self.completions, self.reference, self.reward, strict=True)
        found = [
            Group(
                prompt,
                ids,
                reference=reference,
                reward=reward,
                pairs=[(at, at + 1) for at in range(0, len(ids), 2)],
            )
            for prompt, ids, reference, reward in columns
            if ids
        ]
        if not found:
            raise InputError(
                "`n` must leave a finished pair of some prompt, got none; raise "
                "`--max-new-tokens` or `-n`."
            )
        return found


def _each(drawn: Drawn) -> list[Row]:
    bounds = pairwise(drawn.scores.groups.tolist())
    columns = {
        "reference": drawn.reference.tolist(),
        "reward": drawn.reward.tolist(),
        "usable": drawn.usable.tolist(),
    }
    return [
        row | {name: values[a:b] for name, values in columns.items()}
        for row, (a, b) in zip(drawn.rows, bounds, strict=True)
    ]


def divide(prompts: list[Prompt], n: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to fit, at least one, and n prompts to judge by, each in input order."""
    if n >= len(prompts):
        raise InputError(
            f"`validation` must leave prompts to fit, got {n} of {len(prompts)}; lower it."
        )
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    fitted, held_out = ([prompts[p] for p in sorted(part)] for part in (order[n:], order[:n]))
    return fitted, held_out


def best_round(found: list[Row]) -> int:
    """The round of highest J_beta; the first of equals, and the base where none can be judged."""
    values = [-math.inf if row["value"] is None else row["value"] for row in found]
    best = max(range(len(values)), key=values.__getitem__)
    if best == 0:
        log.warning("no round has a higher J_beta than the base model, which is kept.")
    return best


def report_of(found: list[Row], best: int, n_held_out: int) -> str:
    """What the rounds came to, in lines: J_beta of all, and the terms of each."""
    values = [_shown(row["value"]) for row in found]
    lines = [
        f"J_beta on {n_held_out} held-out prompts: base {values[0]}, "
        f"rounds {' '.join(values[1:])}; kept: {f'round {best}' if best else 'the base'}"
    ]
    lines += [
        f"round {row['round']}: mean e^2 {_shown(row['square'])}, optimism {row['optimism']:.4g} x "
        f"mean log pi(y') {_shown(row['base_logprob'])} = {_shown(row['optimism_term'])}"
        for row in found[1:]
    ]
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
