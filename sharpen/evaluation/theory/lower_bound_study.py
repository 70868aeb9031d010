"""Study: samples that the family of the lower bound takes, against eps and C.

Costs are exact. The fixed one is also run: a learner draws as many samples as the closed form
says, and its error must come out as eps.
"""

import math
from collections.abc import Sequence

import numpy as np

from sharpen.records import Row

from .chart import Line, Panel
from .hard_family import HardFamily
from .study import Study, markdown, slope


def lower_bound_study(*, quick: bool = False) -> Study:
    """C of 1, 4 and 16, eps from 1/32 to 1/512, d = 16; `quick` takes a part of it."""
    coverages, halvings = ((1.0, 4.0), range(5, 8)) if quick else ((1.0, 4.0, 16.0), range(5, 10))
    cases = [
        {"d": 16, "c": c, "eps": 0.5**h, "repeats": 50 if quick else 400}
        for c in coverages
        for h in halvings
    ]
    return Study(cases, measure, table, panels)


def measure(case: Row, rng: np.random.Generator) -> Row:
    """Samples for an error of eps, and the error of learners that draw them."""
    family = HardFamily(case["d"], case["eps"], case["c"])
    fixed = family.cost(family.eps)
    runs_R2 = np.array(
        [family.simulated_error(math.ceil(fixed), 1, rng) for _ in range(case["repeats"])]
    )
    deviation = runs_R2.std(0, ddof=1) / math.sqrt(case["repeats"])
    return {
        "M": family.size,
        "coverage": family.coverage,
        "fixed": fixed,
        "adaptive": family.cost(family.eps, adaptive=True),
        "bound": family.bound(),
        "error": float(runs_R2[:, 0].mean()),
        "error_se": float(deviation[0]),
        "error_with_guesses": float(runs_R2[:, 1].mean()),
    }


def table(rows: Sequence[Row]) -> str:
    """One line a case, and how the costs grow with 1 / eps at each C."""
    heads = [
        "C",
        "1/eps",
        "M",
        "C_cov",
        "m, fixed N",
        "m / bound",
        "m, adaptive",
        "fixed / adaptive",
        "error / eps, run",
        "with guesses",
    ]
    lines = [
        [
            row["c"], round(1 / row["eps"]), row["M"], row["coverage"], row["fixed"],
            row["fixed"] / row["bound"], row["adaptive"], row["fixed"] / row["adaptive"],
            f"{row['error'] / row['eps']:.3f} ± {row['error_se'] / row['eps']:.3f}",
            f"{row['error_with_guesses'] / row['eps']:.3f}",
        ]
        for row in rows
    ]  # fmt: skip
    text = markdown(heads, lines) + "\n"
    for c, own in _by_coverage(rows).items():
        log_eps = [math.log(1 / row["eps"]) for row in own]
        fixed, adaptive = (
            slope(log_eps, [math.log(row[key]) for row in own]) for key in ("fixed", "adaptive")
        )
        text += f"C = {c:g}: m grows as (1/eps)^{fixed:.2f}, adaptive as (1/eps)^{adaptive:.2f}.\n"
    return text


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Samples against 1 / eps."""
    lines = []
    for c, own in _by_coverage(rows).items():
        x = [1 / row["eps"] for row in own]
        lines.append(Line(f"fixed N, C = {c:g}", x, [row["fixed"] for row in own]))
        lines.append(Line(f"adaptive, C = {c:g}", x, [row["adaptive"] for row in own]))
        name = "" if c != rows[-1]["c"] else "the bound of each C"
        lines.append(Line(name, x, [row["bound"] for row in own], dashed=True))
    return [Panel("1 / eps", "samples m for an error of eps", lines)]


def _by_coverage(rows: Sequence[Row]) -> dict[float, list[Row]]:
    grouped: dict[float, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row["c"], []).append(row)
    return grouped
