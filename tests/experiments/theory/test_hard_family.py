""""""

import math
from itertools import pairwise

import numpy as np
import pytest

from sharpen.errors import InputError
from sharpen.experiments.theory.lower_bound import HardFamily


@pytest.mark.parametrize("eps", [1 / 32, 0.01, 1 / 1000])
@pytest.mark.parametrize("c", [0.5, 1.0, 7.0])
def test_the_instance_is_that_of_the_proof(eps, c):
    family = HardFamily(d=3, eps=eps, c=c)
    law, M = family.law(), family.size
    assert 1 + math.floor(c / eps + 1e-9) == M
    assert len(law) == M
    assert law.sum() == pytest.approx(1)
    # gamma = 1/2: y* has 1 / ((1 - gamma) M), the others (1/M) (1 - gamma / ((M - 1) (1 - gamma)))
    assert law[0] == pytest.approx(1 / (0.5 * M))
    assert law[1:] == pytest.approx((1 / M) * (1 - 1 / (M - 1)))
    assert family.rare == pytest.approx(16 * eps)
    # x0 is certain, the rare ones find y* once in M / 2
    want = (1 - family.rare) + sum(family.rare / 3 / law[0] for _ in range(3))
    assert family.coverage == pytest.approx(want)
    assert family.coverage <= 1 + 8 * c + 1e-9


def test_the_error_by_hand():
    # Delta = 1/2, M = 3, one sample finds y* with 2/3, two with 8/9
    family = HardFamily(d=2, eps=1 / 32, c=1 / 16)
    assert family.size == 3
    assert family.error(1, 1) == pytest.approx(0.5 * (1 - 0.25 * 2 / 3))
    assert family.error(2, 2) == pytest.approx(0.5 * (1 - 0.25 * 8 / 9) ** 2)
    assert family.error(0, 5) == family.rare


@pytest.mark.parametrize(("n", "N"), [(60, 1), (20, 4), (5, 40)])
def test_runs_have_the_expected_error_and_guesses_the_best_learner_s(n, N):
    family = HardFamily(d=4, eps=1 / 32, c=1 / 4)
    rng = np.random.default_rng(0)
    runs = np.array([family.simulated_error(n, N, rng) for _ in range(4000)])
    deviation = runs.std(0) / math.sqrt(len(runs))
    assert runs[:, 0].mean() == pytest.approx(family.error(n, N), abs=4 * deviation[0])
    # the learner of guesses, drawn one sample at a time
    law, errors = family.law(), []
    for _ in range(4000):
        seen = [set() for _ in range(4)]
        for x in rng.choice(5, size=n, p=[1 - family.rare] + [family.rare / 4] * 4):
            if x > 0:
                seen[x - 1].update(rng.choice(family.size, size=N, p=law).tolist())
        missed = [s for s in seen if 0 not in s]
        wrong = sum(rng.random() >= 1 / (family.size - len(s)) for s in missed)
        errors.append(wrong * family.rare / 4)
    both = math.hypot(float(np.std(errors)) / math.sqrt(len(errors)), deviation[1])
    assert runs[:, 1].mean() == pytest.approx(np.mean(errors), abs=4 * both)
    assert runs[:, 1].mean() < runs[:, 0].mean()


def test_one_sample_of_each_prompt_is_the_cheapest_fixed_n():
    family = HardFamily(d=8, eps=1 / 64, c=1.0)
    cost = family.cost(family.eps)
    assert family.error(math.ceil(cost), 1) <= family.eps < family.error(math.ceil(cost) - 1, 1)
    for N in (2, 3, 10, family.size, 5 * family.size):
        n = next(n for n in range(1, 10**6) if family.error(n, N) <= family.eps)
        assert n * N >= cost


def test_draws_until_y_star_cost_what_is_said():
    family = HardFamily(d=2, eps=1 / 32, c=1 / 4)
    assert family.cost(family.eps, adaptive=True) == pytest.approx(
        math.log(1 / 16) / math.log(1 - family.rare / 2) * family.coverage
    )
    rng = np.random.default_rng(1)
    n = math.ceil(family.cost(family.eps, adaptive=True) / family.coverage)
    errors, samples = [], []
    for _ in range(3000):
        visits = rng.multinomial(n, [1 - family.rare, family.rare / 2, family.rare / 2])
        errors.append(family.rare / 2 * (visits[1:] == 0).sum())
        samples.append(visits[0] + rng.geometric(2 / family.size, size=visits[1:].sum()).sum())
    assert np.mean(samples) == pytest.approx(n * family.coverage, rel=0.05)
    # n is rounded up
    assert np.mean(errors) == pytest.approx(family.rare * (1 - family.rare / 2) ** n, rel=0.15)


def test_costs_grow_as_the_theorems_say():
    eps = [2.0**-h for h in (8, 10, 12)]
    families = [HardFamily(d=16, eps=e, c=4.0) for e in eps]
    fixed = [f.cost(f.eps) for f in families]
    adaptive = [f.cost(f.eps, adaptive=True) for f in families]
    assert [b / a for a, b in pairwise(fixed)] == pytest.approx([16, 16], rel=0.01)
    assert [b / a for a, b in pairwise(adaptive)] == pytest.approx([4, 4], rel=0.01)
    # tight up to a constant: C d / eps^2 both
    ratios = [cost / f.bound() for cost, f in zip(fixed, families, strict=True)]
    assert max(ratios) / min(ratios) < 1.05
    assert families[0].bound() == pytest.approx(
        4 * 16 * math.log(1025) / (2.0**-16 * (1 + math.log(1024)))
    )


def test_an_error_that_nothing_need_be_known_for_is_free():
    family = HardFamily(d=2, eps=1 / 64, c=1.0)
    assert family.cost(0.25) == 0
    assert family.cost(0.249) > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d": 0}, "`d` must be at least 1, got 0"),
        ({"eps": 1 / 16}, r"`eps` must be in \(0, 1/16\), got 0.0625"),
        ({"c": 0.01}, "`c` must be finite and at least 2 eps, got 0.01"),
    ],
)
def test_bad_input_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        HardFamily(**({"d": 2, "eps": 1 / 32, "c": 1.0} | values))
    with pytest.raises(InputError, match="`target` must be in"):
        HardFamily(2, 1 / 32, 1.0).cost(0.0)
