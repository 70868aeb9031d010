"""The tables of `study.json`: every method at every setting, seeds joined, with bands over prompts.

    samples of a stage -> what was measured of one seed -> a method at a setting -> a row

One paired bootstrap over prompts serves all rows; the accuracy of a prompt is its mean over seeds
first, so a band tells how far other puzzles would move a figure. `by_seed` tells the noise of the
seeds. P prompts, G completions per prompt, M columns, B resamples. Nats.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64
from tqdm import tqdm

from sharpen.evaluation.metrics import (
    N_RESAMPLES,
    ci95,
    p_value,
    pass_at_k,
    resample_means,
    sample_accuracy,
)
from sharpen.evaluation.summary import rounded
from sharpen.experiments.options import StudyConfig
from sharpen.records import Row

from .plan import ALPHA, METHODS, TEMPERATURES, Sizes, pool_name
from .pools import Pool, StageFiles
from .rewards import auroc_rows, covariance_rows, power_rows, prompt_rows
from .selectors import BEST_BY, Selected, selectors
from .stages import Stage, stage_rows

TARGET_N = 25  # of the gap that a trained model should close
SAMPLE = ("decoding", "T = 1", None)  # what gains are over
EQUAL_COST = "best-of-N, logprob"


def tables(config: StudyConfig, sizes: Sizes, stages: Sequence[Stage]) -> dict[str, Any]:
    """All figures, as JSON values."""
    files = StageFiles(config, sizes)
    pools = [files.pool(f"base/pool-{seed}", scored=True) for seed in range(sizes.seeds)]
    results = [
        *decoding_results(files, pools),
        *selection_results(pools, sizes.grid(), sizes.budgets),
        *power_results(files),
        *training_results(files),
    ]
    outcomes = [pool.outcome for pool in pools]
    target_n = max(k for k in sizes.grid() if k <= max(TARGET_N, sizes.grid()[0]))
    rows = table_rows(results, target_n=target_n)
    ran = {row["stage"]: row for row in stage_rows(files.out, stages)}
    for row in rows:
        row["command"] = ran[row["stages"][0]]["command"]
        row["seconds"] = round(sum(ran[name]["seconds"] for name in row["stages"]), 2)
    return {
        "stages": list(ran.values()),
        "prompts": pools[0].outcome.n_prompts,
        "target_n": target_n,
        "rows": rows,
        "rounds": round_rows(files),
        "auroc": auroc_rows(outcomes),
        "covariance": covariance_rows(outcomes),
        "under_power": power_rows(outcomes),
        "by_prompt": prompt_rows(outcomes, [example.id for example in files.examples]),
        "machine": {
            "threads": torch.get_num_threads(),
            "jobs": config.jobs,
            "versions": {n: metadata.version(n) for n in ("sharpen", "torch", "transformers")},
        },
    }


@dataclass(frozen=True)
class SeedResult:
    """What was measured of a method at one seed.

    Attributes:
        accuracy_P: Expected accuracy of each prompt's answer.
        logprob: Mean log pi_base of the answers, nats; of those that have one.
        length: Mean tokens of the answers, end tokens among them.
        tokens: Completion tokens that the model reads or writes for one answer, mean over prompts.
        kl: KL to the base model in nats, if it can be estimated; of greedy decoding, -log p(y).
        pass_P: Chance that one of the samples is right, if there are several; and of how many.
        facts: Further means by name.
    """

    accuracy_P: Float64[np.ndarray, " P"]
    logprob: float
    length: float
    tokens: float
    kl: float | None = None
    pass_P: Float64[np.ndarray, " P"] | None = None
    n_pass: int | None = None
    facts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodResult:
    """A method at a setting.

    Attributes:
        group: "decoding", "selection", "power" or "training": which table.
        name: Of the method.
        n: Samples that it chooses from; None where there is no choice.
        measured: One a seed.
        stages: Names of the runs that it needs.
        training: Tokens and seconds that its training took, mean over seeds.
        tokens_as: Number of plain samples that cost as many tokens, where that is the comparison.
        bound_of_kl: What the KL to the base cannot exceed, nats; of best-of-N by a fixed reward.
    """

    group: str
    name: str
    n: int | None
    measured: Sequence[SeedResult]
    stages: Sequence[str]
    training: Mapping[str, int | float] | None = None
    tokens_as: int | None = None
    bound_of_kl: float | None = None

    @property
    def accuracy(self) -> Float64[np.ndarray, " P"]:
        """Mean over seeds."""
        return np.mean([m.accuracy_P for m in self.measured], axis=0)


def decoding_results(files: StageFiles, pools: Sequence[Pool]) -> list[MethodResult]:
    """Greedy, one sample, low temperature."""
    seeds = range(files.sizes.seeds)
    greedy = [of_greedy(files.pool("base/greedy"))]
    sampled = [of_samples(pool, pool.own_PG) for pool in pools]
    found = [
        MethodResult("decoding", "greedy", None, greedy, ["base/greedy"]),
        MethodResult("decoding", "T = 1", None, sampled, [f"base/pool-{seed}" for seed in seeds]),
    ]
    for t in TEMPERATURES:
        names = [f"base/T{t:g}-{seed}" for seed in seeds]
        # rated at their own temperature
        drawn = [files.pool(name, scored=True).outcome.reward_PG["logprob"] for name in names]
        measured = [of_samples(files.pool(name), q) for name, q in zip(names, drawn, strict=True)]
        stages = [f"{name}{part}" for name in names for part in ("", "/scored")]
        found.append(MethodResult("decoding", f"T = {t:g}", None, measured, stages))
    return found


def selection_results(
    pools: Sequence[Pool], grid: Sequence[int], budgets: Sequence[int]
) -> list[MethodResult]:
    """Every selector at every N, from the same pools; best-of-N at the other budgets too."""
    seeds = range(len(pools))
    stages = [f"base/pool-{seed}{part}" for seed in seeds for part in ("", "/scored")]
    every = selectors()
    pairs = [(name, k) for name in every for k in sorted({*grid, *budgets})]
    found = []
    for name, k in tqdm(pairs, desc="select", unit="row", file=sys.stderr):
        if k not in grid and name != f"best-of-N, {BEST_BY[0]}":
            continue
        measured = [
            of_choice(pool, every[name](pool.outcome, k, seed), k)
            for seed, pool in zip(seeds, pools, strict=True)
        ]
        bound = best_of_n_bound(k) if name.startswith("best-of-N") else None
        found.append(MethodResult("selection", name, k, measured, stages, bound_of_kl=bound))
    return found


def power_results(files: StageFiles) -> list[MethodResult]:
    """Samplers of p^alpha, each beside best-of-N of as many tokens."""
    found = []
    titles = {"mh": "Metropolis-Hastings", "smc": "particles"}
    for budget in files.sizes.budgets:
        for kind, title in titles.items():
            names = [f"power/{kind}{budget}-{seed}" for seed in range(files.sizes.seeds)]
            measured = [of_power(files.pool(x), samples_each=budget, alpha=ALPHA) for x in names]
            name = f"{title}, power {ALPHA:g}"
            found.append(MethodResult("power", name, budget, measured, names, tokens_as=budget))
    return found


def training_results(files: StageFiles) -> list[MethodResult]:
    """Every trained model, one sample and greedy."""
    found = []
    for method in METHODS:
        runs = [f"{method}-{seed}" for seed in range(files.sizes.train_seeds)]
        cost = files.training_cost(method)
        for decode, suffix in (("T = 1", ""), ("greedy", "-greedy")):
            pools = [files.pool(f"judge/{run}{suffix}", scored=True) for run in runs]
            measured = [of_greedy(x) if suffix else of_samples(x, x.own_PG) for x in pools]
            stages = [f"train/{run}" for run in runs]
            stages += dict.fromkeys(
                pool for seed in range(len(runs)) if (pool := pool_name(method, seed)) is not None
            )
            stages += [f"judge/{run}{suffix}" for run in runs]
            found.append(
                MethodResult("training", f"{method}, {decode}", None, measured, stages, cost)
            )
    return found


def round_rows(files: StageFiles) -> list[Row]:
    """What each round of XPO came to: J_beta on the held-out prompts, the terms of its loss."""
    rows = []
    for method, kind in METHODS.items():
        for seed in range(files.sizes.train_seeds if kind.verb == "xpo" else 0):
            summary = files.summary(method, seed)
            rows += [
                {"method": method, "seed": seed, "kept": t["round"] == summary["kept_round"], **t}
                for t in summary["rounds"]
            ]
    return rows


def of_samples(pool: Pool, drawn_PG: Float64[np.ndarray, "P G"] | None = None) -> SeedResult:
    """One sample of a law, from several independent ones of each prompt.

    KL(q || p) = E[log q(y) - log p(y)],   E under q, here the samples.

    Args:
        pool: Samples of it.
        drawn_PG: Log-prob of each under the law q that it was drawn from, nats; None: unknown.
    """
    logprob_PG, G = pool.outcome.reward_PG["logprob"], pool.length_PG.shape[1]
    length = float(pool.length_PG.mean())
    return SeedResult(
        sample_accuracy(pool.correct),
        _mean(logprob_PG),
        length,
        length,
        kl=None if drawn_PG is None else _mean(drawn_PG - logprob_PG),
        pass_P=pass_at_k(pool.correct, G) if G > 1 else None,
        n_pass=G if G > 1 else None,
    )


def of_greedy(pool: Pool) -> SeedResult:
    """The one completion of greedy decoding, which is drawn for sure."""
    return of_samples(pool, np.zeros_like(pool.own_PG))


def of_power(pool: Pool, *, samples_each: int, alpha: float) -> SeedResult:
    """One sample of a sampler of p^alpha. Its KL is that of the target, where Z was estimated.

    KL(p^alpha / Z || p) = (alpha - 1) E[log p] - log Z,   E under p^alpha / Z, here the samples.

    Args:
        pool: Samples; those of a prompt may depend on each other, so there is no pass@n.
        samples_each: Whole completions that are drawn for a sample, where its tokens were not
            counted.
        alpha: The power.
    """
    one = of_samples(pool)
    kl = None
    if pool.log_z_P is not None:
        kl = (alpha - 1) * one.logprob - _mean(pool.log_z_P)
    tokens = samples_each * one.length if pool.cost_PG is None else float(pool.cost_PG.mean())
    return SeedResult(one.accuracy_P, one.logprob, one.length, tokens, kl=kl)


def of_choice(pool: Pool, selected: Selected, k: int) -> SeedResult:
    """The choice of a selector from k samples of a pool."""
    weight_PG, correct_PG = selected.weight_PG, pool.correct
    n_used = selected.facts.get("n_used", float(k))
    logprob_PG = pool.outcome.reward_PG["logprob"]
    return SeedResult(
        (weight_PG * correct_PG).sum(axis=1),
        _weighted(logprob_PG, weight_PG, ~np.isnan(logprob_PG)),
        _weighted(pool.length_PG.astype(np.float64), weight_PG, np.ones_like(correct_PG)),
        n_used * float(pool.length_PG.mean()),
        facts=selected.facts,
    )


def best_of_n_bound(n: int) -> float:
    """Log n - (n - 1) / n, nats: best-of-n by any fixed reward is at most that far from the base.

    Source:
        Beirami et al. 2024, arXiv:2401.01879.

    Example:
        >>> round(best_of_n_bound(1), 4), round(best_of_n_bound(25), 4)
        (0.0, 2.2589)
    """
    return math.log(n) - (n - 1) / n


def _mean(values: Float64[np.ndarray, "..."]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan


def _weighted(
    value_PG: Float64[np.ndarray, "P G"],
    weight_PG: Float64[np.ndarray, "P G"],
    counts_PG: Bool[np.ndarray, "P G"],
) -> float:
    used_PG = (weight_PG > 0) & counts_PG
    total = weight_PG[used_PG].sum()
    return float(weight_PG[used_PG] @ value_PG[used_PG] / total) if total > 0 else math.nan


def table_rows(
    results: Sequence[MethodResult], *, target_n: int, seed: int = 0, n_resamples: int = N_RESAMPLES
) -> list[Row]:
    """One JSON object a row.

    Accuracies are fractions of 1, gains are points; `gap_closed` is the gain over one sample as a
    share of that of best-of-`target_n` by log-prob, its band that of the ratio.

    Args:
        results: With one of T = 1 and those of best-of-N by log-prob that are compared with.
        target_n: Of the gap.
        seed: Of the bootstrap.
        n_resamples: Of the bootstrap.
    """
    keys = [(r.group, r.name, r.n) for r in results]
    value_PM = np.stack([r.accuracy for r in results], axis=1)
    mean_BM = resample_means(value_PM, seed=seed, n_resamples=n_resamples)
    mean_B = dict(zip(keys, mean_BM.T, strict=True))
    mean = {key: float(x_P.mean()) for key, x_P in zip(keys, value_PM.T, strict=True)}
    goal = ("selection", EQUAL_COST, target_n)
    rows = []
    for result, key in zip(results, keys, strict=True):
        gain_B = mean_B[key] - mean_B[SAMPLE]
        row: Row = {
            "group": result.group,
            "name": result.name,
            "n": result.n,
            "accuracy": rounded(mean[key]),
            "ci95": _band(mean_B[key]),
            "by_seed": [rounded(float(m.accuracy_P.mean())) for m in result.measured],
            "gain_points": rounded(100 * (mean[key] - mean[SAMPLE]), 2),
            "ci95_of_gain": _band(100 * gain_B, 2),
            "p_vs_sample": rounded(p_value(gain_B)) if key != SAMPLE else None,
            **_means(result.measured),
        }
        if result.bound_of_kl is not None:
            row["kl_at_most"] = rounded(result.bound_of_kl)
        if result.tokens_as is not None:
            rival = ("selection", EQUAL_COST, result.tokens_as)
            difference_B = mean_B[key] - mean_B[rival]
            row["equal_cost"] = {
                "n": result.tokens_as,
                "accuracy": rounded(mean[rival]),
                "difference_points": rounded(100 * (mean[key] - mean[rival]), 2),
                "ci95": _band(100 * difference_B, 2),
                "p": rounded(p_value(difference_B)),
            }
        if result.group == "training":
            row["training"] = result.training
            row["gap_closed"] = _share(mean, mean_B, key, goal)
        seeds = list(range(len(result.measured)))
        rows.append(row | {"seeds": seeds, "stages": list(result.stages)})
    return rows


def _means(measured: Sequence[SeedResult]) -> Row:
    """Means over seeds of what is a number already."""
    found: Row = {
        name: rounded(float(np.mean([getattr(m, name) for m in measured])))
        for name in ("logprob", "length", "tokens")
    }
    kl = [m.kl for m in measured if m.kl is not None]
    found["kl"] = rounded(float(np.mean(kl))) if kl else None
    passed = [m.pass_P for m in measured if m.pass_P is not None]
    found["pass"] = (
        {"n": measured[0].n_pass, "share": rounded(float(np.mean([x.mean() for x in passed])))}
        if passed
        else None
    )
    names = measured[0].facts
    found["facts"] = {n: rounded(float(np.mean([m.facts[n] for m in measured]))) for n in names}
    return found


def _share(
    mean: Mapping[tuple, float],
    mean_B: Mapping[tuple, Float64[np.ndarray, " B"]],
    key: tuple,
    goal: tuple,
) -> Row | None:
    """Gain over one sample as a share of the goal's; None where the goal gains nothing."""
    gap = mean[goal] - mean[SAMPLE]
    if gap <= 0:
        return None
    gap_B = mean_B[goal] - mean_B[SAMPLE]
    # a resample without a gap would have no ratio
    share_B = (mean_B[key] - mean_B[SAMPLE])[gap_B > 0] / gap_B[gap_B > 0]
    return {
        "of_n": goal[2],
        "share": rounded((mean[key] - mean[SAMPLE]) / gap),
        "ci95": _band(share_B),
    }


def _band(value_B: Float64[np.ndarray, " B"], digits: int = 4) -> list[float | None]:
    return [rounded(x, digits) for x in ci95(value_B)]
