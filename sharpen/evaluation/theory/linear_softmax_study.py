"""Study: samples that best-of-N with SFT, offline square loss and XPO take, against the dimension.

Instances of `LinearSoftmax` with 2^(d + 1) completions at least 1/2 apart. A learner's cost is the
least number of samples with which half of its runs, or more, end with pi(y*) >= 1 - delta.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from sharpen.records import Row

from .chart import Line, Panel
from .linear_softmax import (
    LinearSoftmax,
    best_of_n_sft,
    rounds_until_sharpened,
    sphere_packing,
)
from .study import Study, markdown, slope

DELTA = 0.1
# samples are tried in steps of this factor
STEP = math.sqrt(2)
# T of XPO, in d: with many rounds the proof's optimism is light, with few it outweighs the data
MANY, FEW = 64, 4
COLUMNS = {
    "sft": "best-of-N and SFT",
    "offline": "square loss, pairs of pi_base",
    "xpo": f"XPO, T = {MANY} d",
    "xpo_short": f"XPO, T = {FEW} d",
}


def linear_softmax_study(*, quick: bool = False) -> Study:
    """Dimensions 4 to 12; `quick` takes 3 and 4."""
    dimensions = (3, 4) if quick else (4, 6, 8, 10, 12)
    cases = [{"d": d, "repeats": 1 if quick else 7} for d in dimensions]
    return Study(cases, measure, table, panels)


def measure(case: Row, rng: np.random.Generator) -> Row:
    """Samples that each learner takes on one random instance; None where most runs never end."""
    d, repeats = case["d"], case["repeats"]
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    model = LinearSoftmax.of(sphere_packing(d, 2 ** (d + 1), 0.5, generator), DELTA)
    n, n_samples = _sft(model, repeats, rng)

    def pairs(*, explore: bool, horizon: int) -> int | None:
        rounds = [
            rounds_until_sharpened(model, DELTA, generator, max_rounds=horizon * d, explore=explore)
            for _ in range(repeats)
        ]
        middle = sorted(math.inf if r is None else r for r in rounds)[(repeats - 1) // 2]
        return None if math.isinf(middle) else 2 * int(middle)

    return {
        "completions": len(model.phi),
        "coverage": 1 / model.star(model.phi[0]),
        "margin": math.expm1(1 - float((model.phi[1:] @ model.phi[0]).max())),
        "beta": model.beta,
        "sft_n": n,
        "sft_n_samples": n_samples,
        "sft": n * n_samples,
        "offline": pairs(explore=False, horizon=MANY),
        "xpo": pairs(explore=True, horizon=MANY),
        "xpo_short": pairs(explore=True, horizon=FEW),
    }


def _sft(model: LinearSoftmax, repeats: int, rng: np.random.Generator) -> tuple[int, int]:
    """The cheapest n and N, n in 1, 4, 16."""
    costs = []
    for n in (1, 4, 16):
        wanted = 1 / model.star(model.phi[0]) / 16
        while not _half_end(model, n, math.ceil(wanted), repeats, rng):
            wanted *= STEP
        costs.append((n * math.ceil(wanted), n, math.ceil(wanted)))
    return min(costs)[1:]


def _half_end(
    model: LinearSoftmax, n: int, n_samples: int, repeats: int, rng: np.random.Generator
) -> bool:
    ended = sum(
        model.star(best_of_n_sft(model, n, n_samples, rng)) >= 1 - DELTA for _ in range(repeats)
    )
    return 2 * ended >= repeats


def table(rows: Sequence[Row]) -> str:
    """One line a dimension, and how the costs grow."""
    heads = ["d", "completions", "C_cov", "margin", *COLUMNS.values()]
    lines = [
        [row["d"], row["completions"], row["coverage"], row["margin"], *(row[k] for k in COLUMNS)]
        for row in rows
    ]
    d = [row["d"] for row in rows]
    rate = slope(d, [math.log(row["sft"]) for row in rows])
    text = markdown(heads, lines) + f"\nBest-of-N and SFT: m grows as e^({rate:.2f} d)"
    for key in ("offline", "xpo"):
        if all(row[key] is not None for row in rows):
            power = slope([math.log(x) for x in d], [math.log(row[key]) for row in rows])
            text += f"; {COLUMNS[key]}: as d^{power:.2f}"
    return text + ".\n"


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Samples against the dimension."""
    lines = []
    for key, name in COLUMNS.items():
        own = [row for row in rows if row[key] is not None]
        if own:
            lines.append(Line(name, [row["d"] for row in own], [row[key] for row in own]))
    x = [row["d"] for row in rows]
    lines.append(Line("C_cov", x, [row["coverage"] for row in rows], dashed=True))
    return [Panel("d", "samples m until y* has 0.9 of the mass", lines, linear_x=True)]
