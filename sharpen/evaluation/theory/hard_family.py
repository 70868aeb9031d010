"""The family behind the lower bound of sample-and-evaluate, and what the best learner gets on it.

A prompt x0 of mass 1 - Delta has one certain completion. Each of d rare prompts, of mass Delta / d,
has M completions of nearly equal probability, one of them twice as probable as the mean:

    Delta = 16 eps,   M = 1 + C / eps,   pi(y*|x_i) = 2 / M,   others  (M - 2) / (M (M - 1))

A learner draws n prompts and N completions of each, m = n N. It knows the family, so one sight of
y* settles a prompt. Its error, P_x[y* not found], is known in closed form, for samples of a fixed N
and for those drawn until y* is seen. D rare prompts.
"""

import math
from dataclasses import dataclass

import numpy as np

from sharpen.errors import InputError

from .coverage import check_share


@dataclass(frozen=True)
class HardFamily:
    """One instance; the place of y* among the completions of a rare prompt is 0.

    Attributes:
        d: Rare prompts, at least 1.
        eps: In (0, 1/16).
        c: C of the coverage; C / eps at least 2.

    Raises:
        InputError: If a value is out of its range.

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
        for name, holds, wanted in rules:
            if not holds:
                raise InputError(f"`{name}` must be {wanted}, got {getattr(self, name)}.")

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

    def simulated_error(self, n_prompts: int, n_samples: int, rng: np.random.Generator) -> float:
        """P_x[y* not found] in one run of the learner, every sample drawn."""
        mass = [1 - self.rare] + [self.rare / self.d] * self.d
        visits_D = rng.multinomial(n_prompts, mass)[1:]
        law = self.law()
        missed = sum(
            rng.multinomial(int(visits) * n_samples, law)[0] == 0 for visits in visits_D.tolist()
        )
        return missed * self.rare / self.d

    def cost(self, target: float, *, adaptive: bool = False) -> float:
        """Fewest samples m for an expected error of at most `target`, prompts not rounded.

        Args:
            target: Error, in (0, 1).
            adaptive: Draw from each prompt until its y* is seen, 1 sample at x0 and M / 2 in the
                mean elsewhere; else the best fixed N, which x0 pays as well.

        Raises:
            InputError: If `target` is out of its range.
        """
        check_share("target", target)
        if target >= self.rare:
            return 0.0
        log_left = math.log(target / self.rare)
        if adaptive:
            prompts = log_left / math.log1p(-self.rare / self.d)
            return prompts * (1 - self.rare + self.rare * self.size / 2)
        N_K = np.unique(np.geomspace(1, 20 * self.size, 400).astype(np.int64))
        found_K = -np.expm1(N_K * math.log1p(-2 / self.size))
        return float(np.min(N_K * log_left / np.log1p(-self.rare / self.d * found_K)))
