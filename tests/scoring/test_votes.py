import itertools
import math

import pytest
import torch

from sharpen import Scores
from sharpen.errors import InputError
from sharpen.scoring.rewards import answer_logprob

NAN, INF = float("nan"), float("inf")


def rpc(probabilities, answers, keys, **options):
    """Of one prompt's completions of one token each, given by their probabilities."""
    logprobs = [[[math.log(p)] if p else [] for p in probabilities]]
    return Scores.from_logprobs(logprobs, **options).reward("rpc", answers=answers, keys=keys)


def test_distinct_completions_of_an_answer_are_summed_once():
    got = rpc([0.2, 0.2, 0.1, 0.25, 0.05], ["a", "a", "a", "b", None], [1, 1, 2, 3, 4])
    assert got[:4].exp().tolist() == pytest.approx([0.3, 0.3, 0.3, 0.25])
    assert got[4].item() == -INF


def test_prompts_do_not_see_each_other():
    scores = Scores.from_logprobs([[[math.log(0.5)]], [[math.log(0.25)], [math.log(0.125)]]])
    got = scores.reward("rpc", answers=["a", "a", "a"], keys=[1, 1, 2])
    assert got.exp().tolist() == pytest.approx([0.5, 0.375, 0.375])


def test_invalid_empty_and_nan_completions_do_not_count():
    answers, keys = ["a"] * 4, list(range(4))
    got = rpc([0.3, 0.2, 0, 0.1], answers, keys, valid=[[True, False, True, True]])
    # an empty completion would count as a certain one
    assert got.exp().tolist() == pytest.approx([0.4] * 4)
    got = rpc([0.3, NAN, 0.2, 0.1], answers, keys)
    assert got.isnan().tolist() == [False, True, False, False]
    assert got[0].exp().item() == pytest.approx(0.6)
    alone = rpc([0.3], ["a"], [0], valid=[[False]])
    assert alone.tolist() == [-INF]


def test_long_completions_do_not_underflow():
    scores = Scores.from_logprobs([[[-2000.0], [-2000.0], [-1999.0]]])
    got = scores.reward("rpc", answers=["a", "a", "b"], keys=[(1,), (2,), (3,)])
    assert got.tolist() == pytest.approx([-2000 + math.log(2)] * 2 + [-1999])


def test_every_completion_drawn_gives_the_exact_probability_of_the_answer():
    # two tokens out of three, p(y) = p[first] p[second]; the answer is their sum
    p = [0.5, 0.3, 0.2]
    every = list(itertools.product(range(3), repeat=2))
    logprobs = [[[math.log(p[a]), math.log(p[b])] for a, b in every * 2]]
    answers = [str(a + b) for a, b in every * 2]
    got = Scores.from_logprobs(logprobs).reward("rpc", answers=answers, keys=every * 2)
    exact = {"0": 0.25, "1": 0.3, "2": 0.29, "3": 0.12, "4": 0.04}
    assert got.exp().tolist() == pytest.approx([exact[answer] for answer in answers])


def test_the_order_of_the_completions_does_not_show():
    logprob = -3 * torch.rand(300, dtype=torch.float64)
    answers = [str(i % 3) for i in range(300)]
    order = torch.randperm(300)

    def run(order):
        bounds, all_count = torch.tensor([0, 300]), torch.ones(300, dtype=torch.bool)
        of = [answers[i] for i in order]
        return answer_logprob(logprob[order], bounds, all_count, of, order.tolist())

    assert run(torch.arange(300))[order].tolist() == run(order).tolist()


def test_one_answer_and_one_key_for_each_completion():
    with pytest.raises(InputError, match=r"`answers` must hold one answer or None .* N=1 .*got 2"):
        rpc([0.5], ["a", "b"], [1])
    with pytest.raises(InputError, match=r"`keys` must hold one key for each of N=1 .*got 0"):
        rpc([0.5], ["a"], [])
