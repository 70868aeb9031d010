import numpy as np
import pytest

from sharpen.evaluation import metrics
from sharpen.evaluation.metrics import bootstrap_ci95, ci95, p_value, resample_means


def coin(n_heads, P=400):
    return np.repeat([1.0, 0.0], [n_heads, P - n_heads])


def paired_p_value(a_P, b_P, **options):
    return p_value(resample_means((a_P - b_P)[:, None], **options)[:, 0])


def test_interval_of_a_proportion_is_near_the_normal_one():
    low, high = bootstrap_ci95(coin(160))
    half = 1.96 * np.sqrt(0.4 * 0.6 / 400)
    assert low == pytest.approx(0.4 - half, abs=0.004)
    assert high == pytest.approx(0.4 + half, abs=0.004)


def test_interval_covers_the_truth_about_95_times_in_100():
    draws = np.random.default_rng(0).random((400, 200)) < 0.3
    bounds = [bootstrap_ci95(draw.astype(float), seed=1, n_resamples=1000) for draw in draws]
    covered = np.mean([low <= 0.3 <= high for low, high in bounds])
    # 3 standard errors of a share of 400 are 0.033
    assert 0.91 <= covered <= 0.98


def test_interval_of_a_constant_is_a_point():
    assert bootstrap_ci95(np.full(9, 0.25)) == (0.25, 0.25)
    assert bootstrap_ci95(np.array([0.5])) == (0.5, 0.5)


def test_percentiles_are_the_outer_fortieths():
    assert ci95(np.arange(1001.0)) == (25, 975)


def test_same_seed_same_resamples_and_columns_are_paired():
    value_P = coin(3, P=10)
    mean_BM = resample_means(np.stack([value_P, 1 - value_P], axis=1), seed=5, n_resamples=50)
    assert mean_BM.shape == (50, 2)
    np.testing.assert_allclose(mean_BM.sum(axis=1), 1)
    again = resample_means(value_P[:, None], seed=5, n_resamples=50)
    np.testing.assert_allclose(again[:, 0], mean_BM[:, 0])
    assert not np.allclose(resample_means(value_P[:, None], seed=6, n_resamples=50), again)


def test_chunks_are_of_the_same_law(monkeypatch):
    value_P1 = coin(30, P=100)[:, None]
    whole = resample_means(value_P1, n_resamples=4000)
    monkeypatch.setattr(metrics, "CHUNK", 700)
    parts = resample_means(value_P1, n_resamples=4000)
    assert parts.shape == whole.shape
    assert parts.mean() == pytest.approx(0.3, abs=0.003)
    assert parts.std() == pytest.approx(whole.std(), rel=0.05)


def test_p_value_counts_both_tails():
    assert p_value(np.array([1.0, 1.0, 1.0, -1.0])) == pytest.approx(2 * 2 / 5)
    assert p_value(np.array([-1.0] * 99)) == pytest.approx(2 / 100)
    assert p_value(np.zeros(99)) == 1


def test_p_value_of_a_clear_difference_is_small_and_symmetric():
    a_P, b_P = coin(240), coin(160)
    assert paired_p_value(a_P, b_P) == pytest.approx(2 / 10_001)
    assert paired_p_value(b_P, a_P) == pytest.approx(2 / 10_001)


def test_p_value_agrees_with_the_interval():
    difference_P = np.repeat([1.0, -1.0, 0.0], [40, 22, 100])
    low, _ = bootstrap_ci95(difference_P)
    p = paired_p_value(difference_P, np.zeros(162))
    assert (p < 0.05) == (low > 0)
    # exact sign test: 2 * P[Binomial(62, 1/2) <= 22] = 0.030
    assert 0.01 < p < 0.05


def test_rounding_noise_is_no_difference():
    a_P = np.random.default_rng(0).random(50)
    noise_P = np.random.default_rng(1).choice([1e-16, 2e-16], 50)
    assert paired_p_value(a_P, a_P + noise_P) == 1


def test_p_values_under_no_difference_are_about_uniform():
    rng = np.random.default_rng(2)
    p = [
        paired_p_value(*(rng.random((2, 200)) < 0.4).astype(float), seed=3, n_resamples=500)
        for _ in range(300)
    ]
    # 3 standard errors of a share of 300 are 0.038 and 0.087
    assert 0.01 <= np.mean(np.array(p) < 0.05) <= 0.09
    assert 0.41 <= np.mean(np.array(p) < 0.5) <= 0.59
