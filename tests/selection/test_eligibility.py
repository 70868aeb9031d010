"""What no selector may ever choose, asked of each of them."""

import pytest
import torch

from sharpen import Scores, best_of_n
from sharpen.errors import InputError
from sharpen.selection import (
    adaptive_best_of_n,
    borda_vote,
    confidence_vote,
    inference_time_pessimism,
    majority_vote,
    pessimistic_best_of_n,
    probability_vote,
    soft_best_of_n,
    weighted_vote,
)

NAN, INF = float("nan"), float("inf")


def positive(scores):
    """A confidence that orders as the log-prob."""
    return (scores.reward("logprob") / 10).exp()


def seeded():
    return torch.Generator().manual_seed(0)


def ones(scores):
    return torch.ones(len(scores.valid), dtype=torch.float64)


# each from scores and answers to the chosen
SELECTORS = {
    "best_of_n": lambda s, a: best_of_n(s),
    "majority": lambda s, a: majority_vote(s, a),
    "weighted": lambda s, a: weighted_vote(s, a, ones(s)),
    "borda": lambda s, a: borda_vote(s, a, reward="logprob"),
    "probability": lambda s, a: probability_vote(s, a, list(range(len(a)))),
    "confidence": lambda s, a: confidence_vote(s, a, reward=positive(s), keep=0.5),
    "soft": lambda s, a: soft_best_of_n(s, temperature=1.0, generator=seeded()).chosen,
    "pessimistic": lambda s, a: pessimistic_best_of_n(s, beta=0.1, generator=seeded()).chosen,
    "two batches": lambda s, a: inference_time_pessimism(s, s, beta=0.1, generator=seeded()).chosen,
    "adaptive": lambda s, a: adaptive_best_of_n(s, delta=1e-9).chosen,
}
every_selector = pytest.mark.parametrize("select", SELECTORS.values(), ids=SELECTORS)


@every_selector
@pytest.mark.parametrize(
    ("logprobs", "valid"),
    [
        ([[-0.1], [-9.0]], [False, True]),  # cut at the token limit
        ([[], [-9.0]], [True, True]),  # empty: its sum of 0 would beat everything
        ([[NAN, -0.1], [-9.0]], [True, True]),
        ([[NAN], [-INF]], [True, True]),
    ],
    ids=["invalid", "empty", "nan", "nan-beside-minus-infinity"],
)
@pytest.mark.parametrize("answers", [["7", "24"], [None, "24"], ["7", None], [None, None]])
def test_ineligible_never_wins(select, logprobs, valid, answers):
    # three copies of it against one
    scores = Scores.from_logprobs([logprobs[:1] * 3 + logprobs[1:]], [valid[:1] * 3 + valid[1:]])
    assert select(scores, answers[:1] * 3 + answers[1:]).tolist() == [3]


@every_selector
def test_minus_one_where_nothing_is_eligible_and_no_prompts(select):
    scores = Scores.from_logprobs(
        [[], [[-1.0]], [[]], [[NAN]], [[-1.0]]],
        valid=[[], [False], [True], [True], [True]],
    )
    chosen = select(scores, ["7"] * 4)
    assert chosen.tolist() == [-1, -1, -1, -1, 0]
    assert chosen.dtype == torch.int64
    assert select(Scores.from_logprobs([]), []).shape == (0,)


@every_selector
def test_prompts_do_not_see_each_other(select):
    logprobs = (-3 * torch.rand(6, 5, 1)).tolist()
    answers = [["a", "b", "a", None, "b"][i % 5] for i in range(30)]
    together = select(Scores.from_logprobs(logprobs), answers)
    first = select(Scores.from_logprobs(logprobs[:3]), answers[:15])
    assert together[:3].tolist() == first.tolist()


@every_selector
def test_all_at_minus_infinity_are_still_choices(select):
    scores = Scores.from_logprobs([[[-INF], [-INF]]])
    assert select(scores, ["7", "24"]).item() in (0, 1)


@pytest.mark.parametrize("name", ["majority", "weighted", "borda", "probability", "confidence"])
def test_votes_want_one_answer_each(name):
    scores = Scores.from_logprobs([[[-1.0], [-2.0]]])
    with pytest.raises(InputError, match=r"`answers` must hold .* N=2 completions, got 1;"):
        SELECTORS[name](scores, ["7"])
