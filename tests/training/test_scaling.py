"""Standardised rewards and soft weights, by hand; and the optimum that scaling leads to."""

import math

import pytest
import torch

from sharpen.errors import InputError
from sharpen.training.groups import standardise, tilted_weights
from sharpen.training.losses import square_loss
from sharpen.training.xpo import regularised_value

REWARD = torch.tensor([-1.0, -3.0, -50.0, -10.0, -14.0, -2.0], dtype=torch.float64)
GROUPS = torch.tensor([0, 3, 5, 5, 6])
OK = torch.tensor([True, True, False, True, True, True])


def test_one_deviation_a_prompt_over_eligible_completions():
    # deviations 1, 2 and, of a single completion, none
    got = standardise(REWARD, GROUPS, OK, "prompt").tolist()
    assert got == [-1, -3, -50, -5, -7, -2]


def test_one_deviation_for_all():
    # centred: 1 -1 | 2 -2 | 0; their mean square is 10 / 5
    got = standardise(REWARD, GROUPS, OK, "all")
    torch.testing.assert_close(got, REWARD / math.sqrt(2), rtol=1e-15, atol=0)


def test_equal_rewards_stay_finite():
    same = torch.full((6,), -2.0, dtype=torch.float64)
    for over in ("all", "prompt"):
        assert standardise(same, GROUPS, OK, over).tolist() == same.tolist()
    assert standardise(REWARD, GROUPS, OK, "none") is REWARD


def test_nan_of_an_ineligible_completion_touches_no_other():
    reward = REWARD.clone()
    reward[2] = float("nan")
    got = standardise(reward, GROUPS, OK, "all")
    assert got[OK].isfinite().all()


def test_rounding_is_not_made_a_difference():
    # of three equal completions, scored apart
    close = torch.tensor([-20.0, -20.000002, -19.999998, -3.0, -5.0, -7.0], dtype=torch.float64)
    groups, every = torch.tensor([0, 3, 6]), torch.ones(6, dtype=torch.bool)
    got = standardise(close, groups, every, "prompt")
    assert got[:3].tolist() == close[:3].tolist()
    torch.testing.assert_close(got[3:], close[3:] / math.sqrt(8 / 3), rtol=1e-15, atol=0)


def test_what_is_ineligible_has_no_weight_whatever_its_reward():
    reward = torch.tensor([0.0, 5.0, 0.0], dtype=torch.float64)
    ok = torch.tensor([True, False, True])
    assert tilted_weights(reward, torch.tensor([0, 3]), ok, 1.0).tolist() == [0.5, 0, 0.5]


def test_standardising_changes_the_power_and_nothing_else():
    base = torch.tensor([-0.3, -1.0, -2.0, 0.5], dtype=torch.float64).log_softmax(0)
    groups, ok = torch.tensor([0, 4]), torch.ones(4, dtype=torch.bool)
    scaled = standardise(base, groups, ok, "prompt")
    sigma = base.std(correction=0)
    power = ((1 + 1 / (sigma * 0.5)) * base).log_softmax(0)
    pairs = torch.combinations(torch.arange(4), 2)
    assert square_loss(power - base, scaled, pairs, beta=0.5).item() < 1e-28


def test_soft_weights_by_hand():
    got = tilted_weights(REWARD, GROUPS, OK, 2.0)
    first = 1 / (1 + math.exp(-1))
    second = 1 / (1 + math.exp(-2))
    want = [first, 1 - first, 0, second, 1 - second, 1]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


def test_cold_soft_weights_are_best_of_n_and_no_overflow_follows():
    got = tilted_weights(REWARD * 1e4, GROUPS, OK, 1e-3)
    assert got.tolist() == [1, 0, 0, 1, 0, 1]
    nothing = tilted_weights(REWARD, GROUPS, torch.zeros(6, dtype=torch.bool), 1.0)
    assert nothing.tolist() == [0] * 6


def test_soft_weights_of_samples_estimate_the_power_distribution():
    base = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    draws = torch.multinomial(
        base, 200_000, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    reward = base.log()[draws]
    weight = tilted_weights(
        reward, torch.tensor([0, len(draws)]), torch.ones(len(draws), dtype=torch.bool), 0.5
    )
    found = torch.zeros(4, dtype=torch.float64).index_add(0, draws, weight)
    power = base**3 / (base**3).sum()
    assert (found - power).abs().sum() / 2 < 0.005


def test_bad_options_are_refused():
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(
            InputError, match=f"`soft_temperature` must be above 0 and finite, got {bad}"
        ):
            tilted_weights(REWARD, GROUPS, OK, bad)
    with pytest.raises(InputError, match="`standardise` must be one of none, all, prompt, got 'x'"):
        standardise.__wrapped__(REWARD, GROUPS, OK, "x")


def test_value_is_highest_at_the_power_distribution():
    base = torch.tensor([-0.3, -1.0, -2.0, 0.5], dtype=torch.float64).log_softmax(0)
    everything = torch.ones(1, dtype=torch.bool)

    def value(policy):
        # the mean over the policy itself, enumerated
        terms = [
            regularised_value(base[v : v + 1], (policy - base)[v : v + 1], everything, beta=0.5)
            for v in range(4)
        ]
        return float((policy.exp() * torch.tensor(terms, dtype=torch.float64)).sum())

    best = value((3 * base).log_softmax(0))
    # beta log Z, Z = sum base^(1 + 1 / beta)
    assert best == pytest.approx(0.5 * (3 * base).logsumexp(0).item(), abs=1e-12)
    assert best > value((2.7 * base).log_softmax(0))
    assert best > value((3.3 * base).log_softmax(0))
