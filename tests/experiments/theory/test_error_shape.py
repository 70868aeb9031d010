""""""

import math
from itertools import product

import numpy as np
import pytest

from sharpen.errors import InputError
from sharpen.experiments.theory.error_shape import (
    Prompts,
    error_bound,
    fit_two_terms,
    simulated_error,
    spread_prompts,
)


def test_the_prompts_by_hand():
    prompts = spread_prompts(halvings=2, levels=2)
    assert prompts.mass == pytest.approx([1 / 3, 1 / 3, 1 / 6, 1 / 6])
    assert prompts.p_star == pytest.approx([0.25, 0.75, 0.25, 0.75])
    assert prompts.M == 8
    assert prompts.coverage == pytest.approx((4 + 4 / 3) / 2)
    assert prompts.log_class == pytest.approx(4 * math.log(8))
    assert spread_prompts(1, 2, least=0.5).p_star == pytest.approx([0.625, 0.875])


def by_hand(prompts, n, N, delta):
    """The expected error: every draw of prompts, and of a choice at each."""
    X, M = len(prompts.mass), prompts.M
    total = 0.0
    for drawn in product(range(X), repeat=n):
        weight = prompts.mass[list(drawn)].prod()
        for x in range(X):
            won = 1 - (1 - prompts.p_star[x]) ** N
            law = [won] + [(1 - won) / (M - 1)] * (M - 1)
            visits = drawn.count(x)
            right = 0.0
            for seen in product(range(M), repeat=visits):
                counts = [seen.count(y) for y in range(M)]
                ties = counts.count(max(counts))
                if counts[0] == max(counts):
                    right += math.prod(law[y] for y in seen) / ties
            total += weight * prompts.mass[x] * (1.0 if won <= 1 - delta else 1 - right)
    return total


@pytest.mark.parametrize(("n", "N", "delta"), [(1, 1, 0.7), (3, 2, 0.6), (3, 3, 0.3), (2, 1, 0.2)])
def test_the_error_is_that_of_every_data_set(n, N, delta):
    prompts = Prompts(np.array([0.7, 0.3]), np.array([0.45, 0.8]), 3)
    rng = np.random.default_rng(0)
    errors = [simulated_error(prompts, n, N, delta, rng) for _ in range(6000)]
    deviation = np.std(errors) / math.sqrt(len(errors))
    assert np.mean(errors) == pytest.approx(by_hand(prompts, n, N, delta), abs=4 * deviation + 1e-9)


def test_with_all_prompts_seen_only_the_coverage_term_is_left():
    prompts = spread_prompts(halvings=1, levels=8)
    rng = np.random.default_rng(0)
    for N in (2, 4, 8, 16):
        failed = np.mean(1 - (1 - prompts.p_star) ** N <= 0.9)
        assert simulated_error(prompts, 10**6, N, 0.1, rng) == pytest.approx(failed)


def test_the_bound_is_the_theorem_s():
    prompts = spread_prompts(halvings=2, levels=2)
    got = error_bound(prompts, 100, 7, 0.1)
    n_star = 7 / math.log(20)
    assert got == pytest.approx(4 * math.log(8) / (0.1 * 100) + prompts.coverage / n_star)


def test_the_error_stays_within_the_bound_and_falls_in_both():
    prompts = spread_prompts(6, 16)
    rng = np.random.default_rng(0)
    error = {
        (n, N): np.mean([simulated_error(prompts, n, N, 0.1, rng) for _ in range(10)])
        for n in (100, 1000, 20000)
        for N in (4, 16, 64)
    }
    for (n, N), value in error.items():
        assert value <= error_bound(prompts, n, N, 0.1)
    assert error[100, 64] > error[1000, 64] > error[20000, 64]
    assert error[20000, 4] > error[20000, 16] > error[20000, 64]


def test_the_fit_gives_back_two_terms_and_says_where_there_are_none():
    n, N = (x.ravel() for x in np.meshgrid([10.0, 100.0, 1000.0], [2.0, 8.0, 64.0]))
    a, b, r2 = fit_two_terms(n, N, 7 / n + 0.5 / N)
    assert (a, b, r2) == pytest.approx((7, 0.5, 1))
    # relative errors: a small error counts as much as a large one
    noisy = (7 / n + 0.5 / N) * np.where(np.arange(9) % 2, 1.05, 0.95)
    a, b, r2 = fit_two_terms(n, N, noisy)
    assert (a, b) == pytest.approx((7, 0.5), rel=0.1)
    assert 0.99 < r2 < 1
    assert fit_two_terms(n, N, 1 / (n * N))[2] < 0.5


def test_bad_input_is_refused():
    rng, prompts = np.random.default_rng(0), spread_prompts(1, 2)
    for call, message in [
        (lambda: spread_prompts(0, 2), "`halvings` and `levels` must be at least 1, got 0 and 2"),
        (lambda: spread_prompts(1, 2, least=1.0), r"`least` must be in \[0, 1\), got 1.0"),
        (lambda: simulated_error(prompts, 0, 1, 0.1, rng), "must be at least 1, got 0 and 1"),
        (lambda: simulated_error(prompts, 1, 1, 1.0, rng), r"`delta` must be in \(0, 1\)"),
        (lambda: error_bound(prompts, 1, 1, 0.0), r"`delta` must be in \(0, 1\)"),
        (lambda: fit_two_terms(*np.ones((3, 2))), "at least three positive numbers"),
        (lambda: fit_two_terms(*np.zeros((3, 4))), "at least three positive numbers"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
