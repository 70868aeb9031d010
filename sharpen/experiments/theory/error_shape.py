"""How the error of SFT-Sharpening falls with prompts n and samples N, where all of it is exact.

    P_x[pihat(y*|x) <= 1 - delta]  <~  (1 / delta) log|Pi| / n  +  C_cov / N*

A model of X prompts: each has one y* of probability p_x among M completions, the others equal. The
class is finite and realisable: for each prompt, which completion is y*; so it holds the law of
best-of-N, and its maximum-likelihood member takes the completion seen most often at each prompt.
Masses of prompts fall by halves and the p_x are spread evenly from a least one on. With a least p_x
of 0 both terms have long tails, the worst that the bound allows; else the second one falls
exponentially.

`error_shape_study` tabulates the error against n and N, beside the two terms of theorem 4.1, for a
model whose p_x reach down to 0 and one whose p_x are at least 1/8.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from sharpen.errors import InputError, check_value
from sharpen.records import Row

from .coverage import check_share
from .study import Line, Panel, Study, markdown, rows_by

# of the study
DELTA = 0.1
HALVINGS, LEVELS = 12, 64
LEAST = (0.0, 0.125)


@dataclass(frozen=True)
class Prompts:
    """Masses of X prompts and p_x of each, with M completions a prompt.

    Attributes:
        mass: Sums to 1.
        p_star: pi(y*|x), above 1 / M.
        M: Completions of a prompt, at least 2.
    """

    mass: Float64[np.ndarray, " X"]
    p_star: Float64[np.ndarray, " X"]
    M: int

    @property
    def coverage(self) -> float:
        """C_cov = E_x[1 / p_x]."""
        return float((self.mass / self.p_star).sum())

    @property
    def log_class(self) -> float:
        """The logarithm of |Pi| = M^X."""
        return len(self.mass) * float(np.log(self.M))


def spread_prompts(halvings: int = 12, levels: int = 16, least: float = 0.0) -> Prompts:
    """Masses 2^-i, shared by `levels` prompts of p_x = least + (1 - least) (j + 1/2) / levels."""
    if min(halvings, levels) < 1:
        raise InputError(
            f"`halvings` and `levels` must be at least 1, got {halvings} and {levels}."
        )
    check_value("least", least, 0 <= least < 1, "in [0, 1)")
    share_I = 0.5 ** np.arange(halvings)
    mass_X = np.repeat(share_I / share_I.sum() / levels, levels)
    p_J = least + (1 - least) * (np.arange(levels) + 0.5) / levels
    return Prompts(mass_X, np.tile(p_J, halvings), 4 * levels)


def simulated_error(
    prompts: Prompts, n_prompts: int, n_samples: int, delta: float, rng: np.random.Generator
) -> float:
    """P_x[pihat(y*|x) <= 1 - delta] of the maximum-likelihood member on one drawn data set.

    A prompt fails if another completion was seen as often as y* (ties are settled by lot), or if
    best-of-N itself has no more than 1 - delta on y*.

    Args:
        prompts: The model.
        n_prompts: n, prompts drawn with replacement.
        n_samples: N of best-of-N.
        delta: In (0, 1).
        rng: Of all draws.

    Source:
        Huang et al. 2024, arXiv:2412.01951, theorem 4.1 and its general form in appendix H.
    """
    check_share("delta", delta)
    if n_prompts < 1 or n_samples < 1:
        raise InputError(
            f"`n_prompts` and `n_samples` must be at least 1, got {n_prompts} and {n_samples}."
        )
    won_X = -np.expm1(n_samples * np.log1p(-prompts.p_star))
    other_X = (1 - won_X) / (prompts.M - 1)
    law_XM = np.column_stack([won_X, np.tile(other_X[:, None], (1, prompts.M - 1))])
    visits_X = rng.multinomial(n_prompts, prompts.mass)
    chosen_X = _most_seen(rng.multinomial(visits_X, law_XM), rng)
    failed_X = (chosen_X != 0) | (won_X <= 1 - delta)
    return float(prompts.mass[failed_X].sum())


def error_bound(prompts: Prompts, n_prompts: int, n_samples: int, delta: float) -> float:
    """What theorem 4.1 promises of the same, without its constant: may well be above 1.

    (1 / delta) log|Pi| / n + C_cov / N*,   N = N* log(2 / delta)
    """
    check_share("delta", delta)
    fitted = prompts.log_class / (delta * n_prompts)
    return fitted + prompts.coverage * math.log(2 / delta) / n_samples


def _most_seen(count: Int64[np.ndarray, "X M"], rng: np.random.Generator) -> np.ndarray:
    """The completion of the highest count of each prompt; ties are settled by lot."""
    # less than one half cannot change an order of counts
    return np.argmax(count + 0.5 * rng.random(count.shape), axis=1)


def fit_two_terms(
    n: Float64[np.ndarray, " K"], N: Float64[np.ndarray, " K"], error: Float64[np.ndarray, " K"]
) -> tuple[float, float, float]:
    """a, b and R^2 of error = a / n + b / N, by least squares of relative errors.

    Example:
        >>> n, N = np.array([1.0, 2.0, 2.0, 4.0]), np.array([1.0, 1.0, 4.0, 8.0])
        >>> a, b, r2 = fit_two_terms(n, N, 3 / n + 5 / N)
        >>> round(a, 9), round(b, 9), round(r2, 9)
        (3.0, 5.0, 1.0)
    """
    if len(error) < 3 or not (error > 0).all():
        raise InputError("`error` must hold at least three positive numbers; leave zeros out.")
    # each row divided by its error: the fit is to 1
    row_K2 = np.column_stack([1 / n, 1 / N]) / error[:, None]
    (a, b), *_ = np.linalg.lstsq(row_K2, np.ones(len(error)), rcond=None)
    log_K = np.log(error)
    left_K = log_K - np.log(np.maximum(a / n + b / N, 1e-300))
    r2 = 1 - float((left_K**2).sum() / ((log_K - log_K.mean()) ** 2).sum())
    return float(a), float(b), r2


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
    for least, own in rows_by(rows, "least").items():
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
    first, *others = rows_by(rows, "least").items()
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
