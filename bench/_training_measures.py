"""Of a trained model and the samples that it was fitted on: the loss that is left, and the mass."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from sharpen import Scorer
from sharpen.cli import parse
from sharpen.commands import rlhf
from sharpen.commands.inputs import open_source
from sharpen.commands.train import rate
from sharpen.evaluation.metrics import bootstrap_ci95
from sharpen.tasks import get_task
from sharpen.training.groups import Batch
from sharpen.training.losses import square_loss

Rows = list[dict[str, Any]]


def sums(scorer: Scorer, rows: Rows) -> list[list[float]]:
    """Log-prob of each completion of each prompt, nats."""
    ids = [row["prompt_ids"] for row in rows], [row["completion_ids"] for row in rows]
    return [x.tolist() for x in scorer.score(*ids).by_prompt("logprob")]


def drawn_mass(scorer: Scorer, rows: Rows) -> float:
    """Probability of all distinct finished completions of a prompt together, mean over prompts."""
    found = []
    for values, row in zip(sums(scorer, rows), rows, strict=True):
        each = zip(row["completion_ids"], values, row["finish_reasons"], strict=True)
        distinct = {tuple(ids): value for ids, value, reason in each if reason == "stop"}
        found.append(torch.tensor(list(distinct.values()), dtype=torch.float64).exp().sum())
    return float(torch.stack(found).mean())


def mean_logprob(scorer: Scorer, rows: Rows) -> float:
    """Mean log-prob of the finished completions of all prompts, nats."""
    kept = [
        value
        for values, row in zip(sums(scorer, rows), rows, strict=True)
        for value, reason in zip(values, row["finish_reasons"], strict=True)
        if reason == "stop"
    ]
    return sum(kept) / len(kept)


def gain_points(rows: Rows, before: Rows) -> list[float]:
    """Accuracy of one sample less that of another model on the same puzzles, and its 95 % band."""
    task = get_task("game24")
    examples = {example.id: example for example in task.examples("test")}

    def share(row: dict[str, Any]) -> float:
        example = examples[row["prompt_id"]]
        return float(np.mean([task.is_correct(example, text) for text in row["completions"]]))

    gain_P = np.array([share(a) - share(b) for a, b in zip(rows, before, strict=True)])
    return [round(100 * x, 2) for x in (float(gain_P.mean()), *bootstrap_ci95(gain_P))]


def squares(flags: list[str], rows: Rows, base: Scorer, model: Scorer) -> list[float]:
    """Mean e^2 over the pairs that `sharpen rlhf` with these flags fitted: base, model; nats^2."""
    config = parse("rlhf", flags)
    drawn = rate(Path(config.out), base, open_source(config, None), rows, config.reward)
    batch = Batch.of(rlhf.choose(config, drawn).groups)
    logprob = model.score(batch.prompts, batch.completions).reward("logprob").double()
    ratios = torch.zeros_like(logprob), logprob - batch.reference
    return [float(square_loss(x, batch.reward, batch.pairs, beta=config.beta)) for x in ratios]
