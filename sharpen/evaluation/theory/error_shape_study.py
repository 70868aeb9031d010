"""Study: the error of SFT-Sharpening against n and N, beside the two terms of theorem 4.1.

Two models of prompts: one whose p_x reach down to 0, the worst case of the bound in N, and one
whose p_x are at least 1/8.
"""

from collections.abc import Sequence

import numpy as np

from sharpen.records import Row

from .chart import Line, Panel
from .error_shape import error_bound, fit_two_terms, simulated_error, spread_prompts
from .study import Study, markdown

DELTA = 0.1
HALVINGS, LEVELS = 12, 64
LEAST = (0.0, 0.125)


def error_shape_study(*, quick: bool = False) -> Study:
    """As far as the tails reach: n from 2^10 to 2^18, N from 4 to 128; `quick`: a part of it."""
    n_C = [2**10, 2**14] if quick else [2**i for i in range(10, 19, 2)]
    N_C = [4, 16] if quick else [4, 8, 16, 32, 64, 128]
    repeats = 3 if quick else 20
    cases = [
        {"least": least, "n": n, "N": N, "repeats": repeats}
        for least in LEAST
        for n in n_C
        for N in N_C
    ]
    return Study(cases, measure, table, panels)


def measure(case: Row, rng: np.random.Generator) -> Row:
    """Mean error over drawn data sets, and the bound."""
    prompts = spread_prompts(HALVINGS, LEVELS, case["least"])
    errors = [
        simulated_error(prompts, case["n"], case["N"], DELTA, rng) for _ in range(case["repeats"])
    ]
    return {
        "coverage": prompts.coverage,
        "log_class": prompts.log_class,
        "error": float(np.mean(errors)),
        "bound": error_bound(prompts, case["n"], case["N"], DELTA),
    }


def table(rows: Sequence[Row]) -> str:
    """Errors, n down and N across, for each model; beside the bound, and the fit of the first."""
    text = ""
    for least, own in _by_least(rows).items():
        N_C = sorted({row["N"] for row in own})
        at = {(row["n"], row["N"]): row["error"] for row in own}
        lines = [[n, *(at[n, N] for N in N_C)] for n in sorted({row["n"] for row in own})]
        text += f"p_x from {least:g} on, C_cov = {own[0]['coverage']:.3g}:\n\n"
        text += markdown(["n", *(f"N = {N}" for N in N_C)], lines)
        vacuous = sum(row["bound"] >= 1 for row in own)
        loosest = min(row["bound"] / row["error"] for row in own)
        text += (
            f"\nThe bound is at least {loosest:.3g} times the error, and says nothing (1 or more) "
            f"in {vacuous} of {len(own)} cells."
        )
        # behind a least p_x the second term is no multiple of 1 / N
        if least == 0:
            n, N, error = (np.array([float(row[k]) for row in own]) for k in ("n", "N", "error"))
            a, b, r2 = fit_two_terms(n, N, error)
            text += f" Fitted: error = {a:.3g} / n + {b:.3g} / N, R^2 of logs {r2:.3f}."
        text += "\n\n"
    return text.rstrip() + "\n"


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Errors against N for each n, and against n for each N, of the first model; then the other."""
    first, *others = _by_least(rows).items()
    result = [_panel(*first, across="N", each="n"), _panel(*first, across="n", each="N")]
    return result + [_panel(*other, across="N", each="n") for other in others]


def _panel(least: float, rows: Sequence[Row], *, across: str, each: str) -> Panel:
    values = sorted({row[each] for row in rows})
    lines = []
    # first, middle and last say it
    for value in sorted({values[0], values[len(values) // 2], values[-1]}):
        own = [row for row in rows if row[each] == value]
        name = f"{each} = {value:,}"
        lines.append(Line(name, [row[across] for row in own], [row["error"] for row in own]))
    guide = [row for row in rows if row[each] == values[-1]]
    top = guide[0]["error"] * guide[0][across]
    x = [row[across] for row in guide]
    lines.append(Line(f"1 / {across}", x, [top / value for value in x], dashed=True))
    return Panel(across, f"error, p_x from {least:g} on", lines)


def _by_least(rows: Sequence[Row]) -> dict[float, list[Row]]:
    grouped: dict[float, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row["least"], []).append(row)
    return grouped
