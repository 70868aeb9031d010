""""""

import math
from dataclasses import replace

import numpy as np
import pytest

from sharpen.experiments.game24.pools import Pool
from sharpen.experiments.game24.selectors import Selected, selectors
from sharpen.experiments.game24.tables import (
    MethodResult,
    SeedResult,
    best_of_n_bound,
    of_choice,
    of_power,
    of_samples,
    table_rows,
)


def measured(accuracy, **more):
    return SeedResult(np.array(accuracy), logprob=-2.0, length=25.0, tokens=25.0, **more)


def entries():
    sample = [0.2, 0.4, 0.6, 0.0]
    best = [0.6, 0.4, 1.0, 0.4]
    fitted = [0.4, 0.4, 0.8, 0.2]
    return [
        MethodResult("decoding", "T = 1", None, [measured(sample), measured(sample)], ["pool"]),
        MethodResult("selection", "best-of-N, logprob", 5, [measured(best)] * 2, ["pool"]),
        MethodResult("power", "particles", 5, [measured(fitted)], ["smc"], tokens_as=5),
        MethodResult(
            "training",
            "sft, T = 1",
            None,
            [measured(fitted, kl=0.5), measured(best, kl=1.5)],
            ["sft-0", "sft-1"],
            {"seconds": 3.0},
        ),
    ]


def test_figures_by_hand():
    sample, best, power, fitted = table_rows(entries(), target_n=5, n_resamples=400)
    assert (sample["accuracy"], best["accuracy"]) == (0.3, 0.6)
    assert best["gain_points"] == pytest.approx(30.0)
    # seeds are joined first: (0.45 + 0.6) / 2
    assert fitted["accuracy"] == pytest.approx(0.525)
    assert fitted["by_seed"] == [0.45, 0.6]
    assert fitted["gap_closed"]["share"] == pytest.approx(0.225 / 0.3)
    assert fitted["kl"] == 1.0
    assert power["equal_cost"]["difference_points"] == pytest.approx(-15.0)
    low, high = power["equal_cost"]["ci95"]
    assert low <= -15.0 <= high <= 0.0
    for row in (sample, best, power, fitted):
        assert row["ci95"][0] <= row["accuracy"] <= row["ci95"][1]
    assert sample["p_vs_sample"] is None
    assert fitted["seeds"] == [0, 1]


def test_no_gap_no_share():
    worse = [
        MethodResult("decoding", "T = 1", None, [measured([0.5, 0.5])], ["pool"]),
        MethodResult("selection", "best-of-N, logprob", 5, [measured([0.5, 0.4])], ["pool"]),
        MethodResult("training", "sft, T = 1", None, [measured([0.5, 0.6])], ["sft"], {}),
    ]
    assert table_rows(worse, target_n=5, n_resamples=50)[2]["gap_closed"] is None


@pytest.fixture
def pool(make_outcome):
    outcome = make_outcome(P=6, G=8)
    own_PG = outcome.reward_PG["logprob"] + 0.25
    return Pool(outcome, own_PG, np.full((6, 8), 25), log_z_P=np.full(6, -1.5))


def test_kl_of_a_model_is_its_mean_log_ratio_to_the_base(pool):
    found = of_samples(pool, pool.own_PG)
    assert found.kl == pytest.approx(0.25)
    assert found.n_pass == 8
    np.testing.assert_allclose(found.accuracy_P, pool.correct.mean(axis=1))
    np.testing.assert_array_equal(found.pass_P, pool.correct.any(axis=1))
    assert of_samples(pool).kl is None


def test_kl_of_greedy_decoding_is_that_of_a_sure_thing(pool):
    # its law has one completion: log q = 0
    logprob_PG = pool.outcome.reward_PG["logprob"]
    found = of_samples(pool, np.zeros_like(logprob_PG))
    assert found.kl == pytest.approx(-logprob_PG.mean())


def test_kl_of_the_power_target(pool):
    found = of_power(pool, samples_each=10, alpha=4.0)
    assert found.kl == pytest.approx(3 * pool.outcome.reward_PG["logprob"].mean() + 1.5)
    assert found.tokens == 250.0
    assert found.pass_P is None


def test_a_sampler_that_counts_its_tokens_is_believed(pool):
    counted = replace(pool, cost_PG=np.arange(48.0).reshape(6, 8))
    assert of_power(counted, samples_each=10, alpha=4.0).tokens == pytest.approx(23.5)


def test_kl_of_the_power_target_is_exact_on_an_enumerated_law():
    p = np.array([0.5, 0.3, 0.2])
    target = p**2 / (p**2).sum()
    exact = float((target * np.log(target / p)).sum())
    value = float((target * np.log(p)).sum()) - math.log((p**2).sum())
    assert value == pytest.approx(exact)


def test_a_choice_is_weighed_by_its_chances(pool):
    weight_PG = np.zeros((6, 8))
    weight_PG[:, 0], weight_PG[:, 1] = 0.75, 0.25
    found = of_choice(pool, Selected(weight_PG, {"n_used": 3.0}), k=5)
    want_P = 0.75 * pool.correct[:, 0] + 0.25 * pool.correct[:, 1]
    np.testing.assert_allclose(found.accuracy_P, want_P)
    logprob_PG = pool.outcome.reward_PG["logprob"]
    want = (0.75 * logprob_PG[:, 0] + 0.25 * logprob_PG[:, 1]).mean()
    assert found.logprob == pytest.approx(want)
    assert found.tokens == pytest.approx(75.0)


def test_best_of_n_stays_below_its_bound_of_kl():
    # the law of best-of-n over distinct completions, by its distribution function
    p = np.array([0.05, 0.15, 0.3, 0.5])
    for n in (2, 5, 25):
        upto = np.cumsum(p)
        law = upto**n - (upto - p) ** n
        assert (law * np.log(law / p)).sum() <= best_of_n_bound(n) + 1e-12


def test_selection_on_a_pool_gains_with_n(pool):
    select = selectors()["best-of-N, logprob"]
    logprobs = [of_choice(pool, select(pool.outcome, k, 0), k).logprob for k in (1, 3, 8)]
    assert logprobs == sorted(logprobs)
