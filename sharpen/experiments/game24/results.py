"""From what the stages left on disk to the tables of `study.json`."""

import json
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from sharpen.commands.train import SUMMARY
from sharpen.experiments.game24.pools import Pool, pool_of
from sharpen.experiments.game24.rewards import auroc_rows, covariance_rows, power_rows, prompt_rows
from sharpen.experiments.game24.rows import (
    Entry,
    Measured,
    best_of_n_bound,
    of_choice,
    of_power,
    of_samples,
    table_rows,
)
from sharpen.experiments.game24.selectors import BEST_BY, selectors
from sharpen.models import load_model
from sharpen.records import Row, read_rows
from sharpen.tasks import get_task

from .plan import (
    ALPHA,
    METHODS,
    TEMPERATURES,
    TEST,
    Given,
    Sizes,
    given,
    lineage,
    pool_name,
    samples_file,
)
from .stages import STAGES, Stage, stage_rows

if TYPE_CHECKING:
    from .run import StudyConfig

TARGET_N = 25  # of the gap that a trained model should close


def tables(config: "StudyConfig", sizes: Sizes, stages: Sequence[Stage]) -> dict[str, Any]:
    """All figures, as JSON values."""
    reader = _Reader(config, sizes)
    pools = [reader.pool(f"base/pool-{seed}", scored=True) for seed in range(sizes.seeds)]
    entries = [
        *decoding_entries(reader, pools),
        *selection_entries(pools, sizes.grid(), sizes.budgets),
        *power_entries(reader),
        *training_entries(reader),
    ]
    outcomes = [pool.outcome for pool in pools]
    target_n = max(k for k in sizes.grid() if k <= max(TARGET_N, sizes.grid()[0]))
    rows = table_rows(entries, target_n=target_n)
    ran = {row["stage"]: row for row in stage_rows(reader.out, stages)}
    for row in rows:
        row["command"] = ran[row["stages"][0]]["command"]
        row["seconds"] = round(sum(ran[name]["seconds"] for name in row["stages"]), 2)
    return {
        "stages": list(ran.values()),
        "prompts": pools[0].outcome.n_prompts,
        "target_n": target_n,
        "rows": rows,
        "rounds": round_rows(reader),
        "auroc": auroc_rows(outcomes),
        "covariance": covariance_rows(outcomes),
        "under_power": power_rows(outcomes),
        "by_prompt": prompt_rows(outcomes, [example.id for example in reader.examples]),
        "machine": {
            "threads": torch.get_num_threads(),
            "jobs": config.jobs,
            "versions": {n: metadata.version(n) for n in ("sharpen", "torch", "transformers")},
        },
    }


def decoding_entries(reader: "_Reader", pools: Sequence[Pool]) -> list[Entry]:
    """Greedy, one sample, low temperature."""
    seeds = range(reader.sizes.seeds)
    found = [
        Entry("decoding", "greedy", None, [of_greedy(reader.pool("base/greedy"))], ["base/greedy"]),
        Entry(
            "decoding", "T = 1", None,
            [of_samples(pool, pool.own_PG) for pool in pools],
            [f"base/pool-{seed}" for seed in seeds],
        ),
    ]  # fmt: skip
    for t in TEMPERATURES:
        names = [f"base/T{t:g}-{seed}" for seed in seeds]
        # rated at their own temperature
        drawn = [reader.pool(name, scored=True).outcome.reward_PG["logprob"] for name in names]
        measured = [of_samples(reader.pool(name), q) for name, q in zip(names, drawn, strict=True)]
        stages = [f"{name}{part}" for name in names for part in ("", "/scored")]
        found.append(Entry("decoding", f"T = {t:g}", None, measured, stages))
    return found


def of_greedy(pool: Pool) -> Measured:
    """The one completion of greedy decoding, which is drawn for sure."""
    return of_samples(pool, np.zeros_like(pool.own_PG))


def selection_entries(
    pools: Sequence[Pool], grid: Sequence[int], budgets: Sequence[int]
) -> list[Entry]:
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
        found.append(Entry("selection", name, k, measured, stages, bound_of_kl=bound))
    return found


def power_entries(reader: "_Reader") -> list[Entry]:
    """Samplers of p^alpha, each beside best-of-N of as many tokens."""
    found = []
    titles = {"mh": "Metropolis-Hastings", "smc": "particles"}
    for budget in reader.sizes.budgets:
        for kind, title in titles.items():
            names = [f"power/{kind}{budget}-{seed}" for seed in range(reader.sizes.seeds)]
            measured = [of_power(reader.pool(x), samples_each=budget, alpha=ALPHA) for x in names]
            found.append(
                Entry(
                    "power", f"{title}, power {ALPHA:g}", budget, measured, names, tokens_as=budget
                )
            )
    return found


def training_entries(reader: "_Reader") -> list[Entry]:
    """Every trained model, one sample and greedy."""
    found = []
    for method in METHODS:
        runs = [f"{method}-{seed}" for seed in range(reader.sizes.train_seeds)]
        cost = reader.training_cost(method)
        for decode, suffix in (("T = 1", ""), ("greedy", "-greedy")):
            pools = [reader.pool(f"judge/{run}{suffix}", scored=True) for run in runs]
            measured = [of_greedy(x) if suffix else of_samples(x, x.own_PG) for x in pools]
            stages = [f"train/{run}" for run in runs]
            stages += dict.fromkeys(
                pool for seed in range(len(runs)) if (pool := pool_name(method, seed)) is not None
            )
            stages += [f"judge/{run}{suffix}" for run in runs]
            found.append(Entry("training", f"{method}, {decode}", None, measured, stages, cost))
    return found


def round_rows(reader: "_Reader") -> list[Row]:
    """What each round of XPO came to: J_beta on the held-out prompts, the terms of its loss."""
    rows = []
    for method, kind in METHODS.items():
        for seed in range(reader.sizes.train_seeds if kind.verb == "xpo" else 0):
            summary = reader.summary(method, seed)
            rows += [
                {"method": method, "seed": seed, "kept": t["round"] == summary["kept_round"], **t}
                for t in summary["rounds"]
            ]
    return rows


class _Reader:
    """Reads what the stages wrote."""

    def __init__(self, config: "StudyConfig", sizes: Sizes):
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
            taken = self._tokens(path, given(self.sizes, method))
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

    def _tokens(self, path: Path, part: Given | None = None) -> int:
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
