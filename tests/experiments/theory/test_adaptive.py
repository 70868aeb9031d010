"""The closed forms against every sequence of draws of a small law, and against simulation."""

import math

import numpy as np
import pytest

from sharpen.errors import InputError
from sharpen.experiments.theory.best_of_n import certified_by, mu_of, stopping

LAWS = {
    "unique": [0.5, 0.3, 0.15, 0.05],
    "tied": [0.3, 0.3, 0.2, 0.1, 0.1],
    "flat": [0.2] * 5,
    "rare": [0.04, *[0.03] * 32],
    # 0.3 of the mass is cut and never stops the rule
    "cut": [0.4, 0.2, 0.1],
}


def logs(law):
    return [math.log(p) for p in law]


def by_steps(law, mu, longest=20_000):
    """E[N], P[miss] and P[N <= k], by following the law of the best draw so far, draw by draw."""
    levels = sorted({*law, 0.0})
    mass = {p: law.count(p) * p for p in levels if p > 0}
    mass[0.0] = 1 - sum(law)
    state = {0.0: 1.0}
    expected, miss, stopped = 0.0, 0.0, [0.0]
    for k in range(1, longest):
        after = dict.fromkeys(levels, 0.0)
        for best, weight in state.items():
            for p in levels:
                after[max(best, p)] += weight * mass[p]
        over = {best: w for best, w in after.items() if best > 0 and k * best >= mu * (1 - 1e-12)}
        expected += k * sum(over.values())
        miss += sum(w for best, w in over.items() if best < max(law))
        stopped.append(stopped[-1] + sum(over.values()))
        state = {best: w for best, w in after.items() if best not in over}
        if sum(state.values()) < 1e-13:
            break
    return expected, miss, stopped


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("mu", [0.5, 1.0, mu_of(0.3), mu_of(0.05)])
def test_the_closed_forms_are_those_of_the_draws(name, mu):
    law = LAWS[name]
    expected, miss, stopped = by_steps(law, mu)
    found = stopping(logs(law), mu, whole=True)
    assert found.expected_low == found.expected_high == pytest.approx(expected, rel=1e-9)
    assert found.miss_low == found.miss_high == pytest.approx(miss, abs=1e-11)
    for cap in (1, found.first - 1, found.first, found.first + 3):
        if 1 <= cap < len(stopped):
            assert certified_by(logs(law), mu, cap) == pytest.approx(stopped[cap], abs=1e-12)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("delta", [0.5, 0.1, 0.02])
def test_the_paper_s_bounds_hold_and_the_miss_rate_is_within_delta(name, delta):
    law, mu = LAWS[name], mu_of(delta)
    star = law.count(max(law))
    found = stopping(logs(law), mu, whole=True)
    assert found.miss_high <= math.exp(-star * mu) <= delta / 2 + 1e-12
    assert found.expected_high <= (mu + 1 / star) / max(law) + 1


@pytest.mark.parametrize("name", LAWS)
def test_a_law_known_in_part_gives_intervals_that_hold_and_shrink(name):
    law, mu = LAWS[name], 1.0
    truth = stopping(logs(law), mu, whole=True)
    widths = []
    for known in range(law.count(max(law)), len(law) + 1):
        found = stopping(logs(law[:known]), mu)
        assert found.expected_low <= truth.expected_low + 1e-12
        assert found.expected_high >= truth.expected_high - 1e-12
        assert found.miss_low <= truth.miss_low + 1e-12
        assert found.miss_high >= truth.miss_high - 1e-12
        widths.append(found.expected_high - found.expected_low)
        capped = certified_by(logs(law[:known]), mu, found.first + 2)
        assert capped <= certified_by(logs(law), mu, found.first + 2) + 1e-12
    assert widths == sorted(widths, reverse=True)


def test_simulated_draws_agree():
    law, mu = LAWS["unique"], mu_of(0.3)
    rng = np.random.default_rng(0)
    needed, missed = [], 0
    for _ in range(4000):
        best, k = 0.0, 0
        while k * best < mu:
            best, k = max(best, law[rng.choice(4, p=law)]), k + 1
        needed.append(k)
        missed += best < 0.5
    found = stopping(logs(law), mu, whole=True)
    error = np.std(needed) / math.sqrt(4000)
    assert np.mean(needed) == pytest.approx(found.expected_low, abs=4 * error)
    assert missed / 4000 == pytest.approx(found.miss_low, abs=4 * math.sqrt(0.06 / 4000))


def test_a_law_of_one_completion_and_a_tiny_one():
    sure = stopping([0.0], mu=2.5, whole=True)
    assert (sure.first, sure.expected_high, sure.miss_high) == (3, 3.0, 0.0)
    rare = stopping([-40.0], mu=1.0)
    assert rare.expected_low == pytest.approx(math.exp(40.0))
    assert rare.expected_high == pytest.approx(math.exp(40.0) * (1 + math.exp(-1)))
    assert rare.miss_high == pytest.approx(math.exp(-1))


def test_bad_input_is_refused():
    with pytest.raises(InputError, match=r"`delta` must be in \(0, 1\), got 1.5"):
        mu_of(1.5)
    with pytest.raises(InputError, match="`mu` must be positive"):
        stopping([-1.0], 0.0)
    with pytest.raises(InputError, match="got 0 of mass"):
        stopping([], 1.0)
    with pytest.raises(InputError, match="mass of at most 1"):
        stopping([-0.1, -0.1], 1.0)
    with pytest.raises(InputError, match="`cap` must be at least 1"):
        certified_by([-1.0], 1.0, 0)
