""""""

import math
from itertools import product

import numpy as np
import pytest
import torch

from helpers.enumerated import EOS, law, ranked, small
from sharpen.errors import InputError
from sharpen.experiments.theory.best_of_n import (
    best_of_n_law,
    fixed_n,
    miss_probability,
    necessary_n,
    sufficient_n,
)
from sharpen.experiments.theory.coverage import (
    coverage,
    greedy_must_find,
    margin,
    mass_within,
    unsharpened,
)

HALF = math.log(0.5)


def test_coverage_by_hand():
    logprob_P = np.log([0.5, 0.1, 0.25])
    assert coverage(logprob_P) == pytest.approx((2 + 10 + 4) / 3)
    assert coverage(logprob_P, power=2.0) == pytest.approx(math.sqrt((4 + 100 + 16) / 3))
    assert coverage(np.array([0.0])) == 1
    assert coverage(np.array([0.0, -math.inf])) == math.inf
    assert coverage(np.array([-2000.0])) == math.inf


def test_margin_by_hand():
    found = margin(np.log([0.6, 0.3, 0.9]), np.array([math.log(0.2), math.log(0.3), -math.inf]))
    assert found[:2] == pytest.approx([2.0, 0.0])
    assert found[2] == math.inf


def test_the_mass_of_all_that_is_nearly_best():
    logprobs = [math.log(p) for p in (0.4, 0.4, 0.19, 0.01)]
    assert mass_within(logprobs) == pytest.approx(0.8)
    assert mass_within(logprobs, 0.5) == pytest.approx(0.8)
    assert mass_within(logprobs, 0.53) == pytest.approx(0.99)


def test_one_n_for_all_prompts_is_the_least_that_holds():
    p_P = np.array([0.9, 0.3, 0.02])
    for miss in (0.3, 0.05, 0.001):
        n = fixed_n(np.log(p_P), miss)
        assert np.mean((1 - p_P) ** n) <= miss < np.mean((1 - p_P) ** (n - 1))


@pytest.mark.parametrize(("delta", "eps"), [(0.05, 0.75), (0.1, 0.5), (0.5, 0.25), (0.9, 0.0)])
def test_unsharpened_counts_prompts_below_one_minus_delta(delta, eps):
    assert unsharpened(np.log([0.9, 0.5, 0.2, 0.96]), delta) == eps


def test_sharpening_with_fp32_rounding_above_zero_is_accepted():
    assert coverage(np.array([1e-6])) == pytest.approx(1.0)
    with pytest.raises(InputError, match=r"at most 0 nats, got 0\.1 for prompt 1"):
        coverage(np.array([-1.0, 0.1]))


@pytest.mark.parametrize("scale", [1.0, 4.0, 8.0])
def test_greedy_finds_what_has_more_than_half_the_mass(scale):
    """Proposition 3.1 on every prompt of two tokens, on models of growing certainty."""
    n_must = 0
    model = small(2)
    with torch.no_grad():
        model.lm_head.weight *= scale
    for prompt in product(range(5), repeat=2):
        finished, _ = law(model, list(prompt), 3)
        best, logprob = ranked(finished)[0]
        ids = list(prompt)
        while len(ids) < 5 and (len(ids) == 2 or ids[-1] != EOS):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if greedy_must_find(np.array([logprob]))[0]:
            n_must += 1
            assert tuple(ids[2:]) == best
    assert n_must > 0


def test_one_half_is_not_enough_for_greedy():
    # the first token b has 1/2 too, and goes on: greedy may take it, and then never ends well
    assert greedy_must_find(np.array([HALF, HALF + 1e-9])).tolist() == [False, True]


@pytest.mark.parametrize("p", [0.5, 0.03, 0.9, 1e-4])
@pytest.mark.parametrize("rho", [0.5, 0.1, 1e-3])
def test_sample_sizes_are_the_least_that_hold(p, rho):
    logprob = math.log(p)
    exact, enough = necessary_n(logprob, rho), sufficient_n(logprob, rho)
    assert exact <= enough
    assert miss_probability(logprob, exact) <= rho * (1 + 1e-9)
    assert exact == 1 or miss_probability(logprob, exact - 1) > rho * (1 - 1e-9)
    assert enough - 1 < math.log(1 / rho) / p <= enough + 1e-9


def test_sample_sizes_of_a_certain_completion():
    assert (miss_probability(0.0, 0), miss_probability(0.0, 1)) == (1.0, 0.0)
    assert (necessary_n(0.0, 0.1), sufficient_n(0.0, 0.1)) == (1, 3)
    assert miss_probability(math.log(0.25), 2) == pytest.approx(0.5625)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_law_of_best_of_n_is_that_of_all_tuples(n):
    p_Y = np.array([0.4, 0.2, 0.1, 0.3])
    reward_Y = np.array([0.0, 2.0, 1.0, 1.0])
    want = np.zeros(4)
    for draws in product(range(4), repeat=n):
        # the first of equals
        want[max(draws, key=reward_Y.__getitem__)] += p_Y[list(draws)].prod()
    assert best_of_n_law(p_Y, reward_Y, n) == pytest.approx(want)


def test_the_law_of_best_of_n_misses_as_often_as_it_should():
    p_Y = np.array([0.4, 0.35, 0.25])
    law_Y = best_of_n_law(p_Y, np.log(p_Y), 6)
    assert 1 - law_Y[0] == pytest.approx(miss_probability(math.log(0.4), 6))


def test_bad_input_is_refused():
    one = np.array([-1.0])
    for call, message in [
        (lambda: coverage(np.zeros(0)), "`logprob` must hold at least one prompt"),
        (lambda: coverage(np.array([math.nan])), "got nan for prompt 0"),
        (lambda: coverage(one, power=0.0), "`power` must be positive"),
        (lambda: margin(one, np.zeros(2)), "`runner_up` must hold one number"),
        (lambda: margin(one, np.array([-0.5])), "`runner_up` must be at most `logprob`"),
        (lambda: unsharpened(one, 0.0), r"`delta` must be in \(0, 1\), got 0.0"),
        (lambda: sufficient_n(-1.0, 1.0), r"`rho` must be in \(0, 1\)"),
        (lambda: necessary_n(-math.inf, 0.5), "`logprob` must be a log-prob above -inf"),
        (lambda: miss_probability(-1.0, -1), "`n` must be at least 0"),
        (lambda: best_of_n_law(np.array([0.5]), one, 2), "sum to 1, got a sum of 0.5"),
        (lambda: best_of_n_law(np.ones(1), np.zeros(2), 2), "`reward` must hold one number"),
        (lambda: fixed_n(one, 0.0), r"`miss` must be in \(0, 1\)"),
        (lambda: fixed_n(np.zeros(0), 0.5), "`logprob` must hold at least one prompt"),
        (lambda: mass_within([-1.0], 1.0), r"`gamma` must be in \[0, 1\)"),
        (lambda: mass_within([]), "`logprobs` must hold at least one completion"),
        (lambda: best_of_n_law(np.ones(1), one, 0), "`n` must be at least 1"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
