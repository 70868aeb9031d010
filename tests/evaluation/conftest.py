"""One small run with everything that can go wrong in it: ties, NaN, invalid samples, no answer."""

from collections.abc import Callable

import numpy as np
import pytest

from sharpen.evaluation import Outcome, Texts, summarize
from sharpen.evaluation.summary import Summary

SETTINGS = {"task": "game24", "model": "tiny", "seed": 0, "reward": "logprob"}
COST = {
    "seconds": {"sample": 1.234, "score": 0.5},
    "tokens": {"sampled": 100, "scored": 100},
}


@pytest.fixture
def make_outcome() -> Callable[..., Outcome]:
    """Build a random outcome; `checker` and `answers` off leave those fields None."""

    def make(P: int = 7, G: int = 6, *, checker: bool = True, answers: bool = True) -> Outcome:
        rng = np.random.default_rng([P, G])
        # few distinct values, so that ties are common
        logprob_PG = -rng.integers(1, 5, (P, G)).astype(np.float64)
        mean_PG = logprob_PG / rng.integers(1, 3, (P, G))
        mean_PG[rng.random((P, G)) < 0.15] = np.nan
        valid_PG = rng.random((P, G)) < 0.75
        valid_PG[0] = False
        logprob_PG[~valid_PG & (rng.random((P, G)) < 0.5)] = np.nan
        letters = np.array(["a", "b", "c", None], dtype=object)
        return Outcome(
            {"logprob": logprob_PG, "mean_logprob": mean_PG},
            valid_PG,
            rng.random((P, G)) < 0.4 if checker else None,
            rng.random(P) < 0.5 if checker else None,
            letters[rng.integers(4, size=(P, G))].tolist() if answers else None,
        )

    return make


@pytest.fixture
def texts_of() -> Callable[[Outcome], Texts]:
    """Distinct texts for an outcome."""

    def make(outcome: Outcome) -> Texts:
        P, G = outcome.valid_PG.shape
        return Texts(
            [f"prompt {p}" for p in range(P)],
            [[f"response {p}.{g}" for g in range(G)] for p in range(P)],
        )

    return make


@pytest.fixture
def summary_of() -> Callable[..., Summary]:
    """Summarize with the settings above; keyword arguments replace settings."""

    def make(outcome: Outcome, **settings: object) -> Summary:
        return summarize(outcome, settings=SETTINGS | settings, **COST)

    return make
