"""The family behind the lower bound of sample-and-evaluate, and what a learner pays on it.

A prompt x0 of mass 1 - Delta has one certain completion. Each of d rare prompts, of mass Delta / d,
has M completions of nearly equal probability, one of them twice as probable as the mean:

    Delta = 16 eps,   M = 1 + C / eps,   pi(y*|x_i) = 2 / M,   others  (M - 2) / (M (M - 1))

A learner draws n prompts and N completions of each, m = n N. It knows the family, so one sight of
y* settles a prompt, and nothing seen at one prompt tells of another. Its error, P_x[y* not found],
is known in closed form, for samples of a fixed N and for those drawn until y* is seen. Where y* was
not seen the best learner guesses among what was not seen either; `simulated_error` lets it, and the
closed form is an upper bound of its error.

`lower_bound_study` tabulates the samples that the family takes against eps and C. Costs are exact.
The fixed one is also run: a learner draws as many samples as the closed form says, and its error
must come out as eps. D rare prompts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sharpen.errors import check_fields
from sharpen.records import Row

from .coverage import check_share
from .study import Line, Panel, Study, markdown, rows_by, slope


@dataclass(frozen=True)
class HardFamily:
    """One instance; the place of y* among the completions of a rare prompt is 0.

    Attributes:
        d: Rare prompts, at least 1.
        eps: In (0, 1/16).
        c: C of the coverage; C / eps at least 2.

    Source:
        Huang et al. 2024, arXiv:2412.01951, theorem 3.1, its proof with gamma = 1/2 and p = 1.
    """

    d: int
    eps: float
    c: float

    def __post_init__(self) -> None:
        rules = [
            ("d", self.d >= 1, "at least 1"),
            ("eps", 0 < self.eps < 1 / 16, "in (0, 1/16)"),
            ("c", self.c < math.inf and self.c >= 2 * self.eps, "finite and at least 2 eps"),
        ]
        check_fields(self, rules)

    @property
    def rare(self) -> float:
        """Delta: mass of all rare prompts."""
        return 16 * self.eps

    @property
    def size(self) -> int:
        """M: completions of a rare prompt."""
        return 1 + math.floor(self.c / self.eps + 1e-9)

    @property
    def coverage(self) -> float:
        """C_cov of the instance: 1 - Delta + Delta M / 2, of the order of C."""
        return 1 - self.rare + self.rare * self.size / 2

    def law(self) -> np.ndarray:
        """Probabilities of the completions of a rare prompt, y* first."""
        M = self.size
        return np.array([2 / M] + [(M - 2) / (M * (M - 1))] * (M - 1))

    def error(self, n_prompts: int, n_samples: int) -> float:
        """Expected P_x[y* not found] after `n_prompts` prompts of `n_samples` samples each.

        Delta (1 - (Delta / d) (1 - (1 - 2 / M)^N))^n
        """
        found = -math.expm1(n_samples * math.log1p(-2 / self.size))
        return self.rare * math.exp(n_prompts * math.log1p(-self.rare / self.d * found))

    def simulated_error(
        self, n_prompts: int, n_samples: int, rng: np.random.Generator
    ) -> tuple[float, float]:
        """P_x[y* not found] in one run, every sample drawn: without guesses, and with them."""
        mass = [1 - self.rare] + [self.rare / self.d] * self.d
        visits_D = rng.multinomial(n_prompts, mass)[1:]
        seen_DM = rng.multinomial(visits_D * n_samples, self.law()) > 0
        missed_D = ~seen_DM[:, 0]
        lucky_D = rng.random(self.d) < 1 / np.maximum(1, (~seen_DM).sum(1))
        each = self.rare / self.d
        return float(missed_D.sum()) * each, float((missed_D & ~lucky_D).sum()) * each

    def cost(self, target: float, *, adaptive: bool = False) -> float:
        """Fewest samples m for an expected error of at most `target`, prompts not rounded.

        Args:
            target: Error, in (0, 1).
            adaptive: Draw from each prompt until its y* is seen, also where it was seen before: 1
                sample at x0 and M / 2 in the mean elsewhere; else N = 1, the best fixed N: more
                samples of one prompt find its y* at a falling rate.
        """
        check_share("target", target)
        if target >= self.rare:
            return 0.0
        log_left = math.log(target / self.rare)
        if adaptive:
            return log_left / math.log1p(-self.rare / self.d) * self.coverage
        return log_left / math.log1p(-self.rare / self.d * 2 / self.size)

    def bound(self) -> float:
        """Samples that no algorithm gets below for an error of eps, up to a constant factor.

        C log|Pi| / (eps^2 (1 + log(C / eps))),   log|Pi| = d log M
        """
        log_class = self.d * math.log(self.size)
        return self.c * log_class / (self.eps**2 * (1 + math.log(self.c / self.eps)))


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
            row["c"],
            round(1 / row["eps"]),
            row["M"],
            row["coverage"],
            row["fixed"],
            row["fixed"] / row["bound"],
            row["adaptive"],
            row["fixed"] / row["adaptive"],
            f"{row['error'] / row['eps']:.3f} ± {row['error_se'] / row['eps']:.3f}",
            f"{row['error_with_guesses'] / row['eps']:.3f}",
        ]
        for row in rows
    ]
    text = markdown(heads, lines) + "\n"
    for c, own in rows_by(rows, "c").items():
        log_eps = [math.log(1 / row["eps"]) for row in own]
        fixed, adaptive = (
            slope(log_eps, [math.log(row[key]) for row in own]) for key in ("fixed", "adaptive")
        )
        text += f"C = {c:g}: m grows as (1/eps)^{fixed:.2f}, adaptive as (1/eps)^{adaptive:.2f}.\n"
    return text


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Samples against 1 / eps."""
    lines = []
    for c, own in rows_by(rows, "c").items():
        x = [1 / row["eps"] for row in own]
        lines.append(Line(f"fixed N, C = {c:g}", x, [row["fixed"] for row in own]))
        lines.append(Line(f"adaptive, C = {c:g}", x, [row["adaptive"] for row in own]))
        name = "" if c != rows[-1]["c"] else "the bound of each C"
        lines.append(Line(name, x, [row["bound"] for row in own], dashed=True))
    return [Panel("1 / eps", "samples m for an error of eps", lines)]
