"""Small outcomes with answers, ties, invalid completions and repeated ones."""

import numpy as np
import pytest

from sharpen.evaluation import Outcome
from sharpen.experiments.game24.selectors import REWARDS


@pytest.fixture
def make_outcome():
    def make(P=5, G=6, *, all_valid=False):
        rng = np.random.default_rng([P, G])
        # of one value a completion, as real ones have
        response_PG = rng.integers(0, 4, (P, G))
        logprob_PG = -(1.0 + np.arange(4)[response_PG] * 0.7 + rng.random((P, 1)))
        reward_PG = {name: rng.random((P, G)) for name in REWARDS} | {"logprob": logprob_PG}
        valid_PG = np.ones((P, G), dtype=bool) if all_valid else rng.random((P, G)) < 0.8
        answer_of = np.array(["a", "b", "b", None], dtype=object)
        return Outcome(
            reward_PG | {"rpc": logprob_PG},
            valid_PG,
            response_PG % 3 == 0,
            answers=answer_of[response_PG].tolist(),
            response_PG=response_PG,
        )

    return make
