""""""

import json
import math

import numpy as np
import pytest

from sharpen.experiments.theory.best_of_n import fixed_n, mu_of, necessary_n, stopping
from sharpen.experiments.theory.findings import Known, findings, format_table


def known(*probabilities, greedy=True, policy=None, **changes):
    logprobs = [math.log(p) for p in probabilities]
    options = {
        "logprobs": logprobs,
        "bound": logprobs[-1] - 1e-4,
        "proved": True,
        "complete": True,
        "n_expanded": 10,
        "cut_bound": -math.inf,
        "rounding": 1e-6,
        "greedy_found": greedy,
        "policy_logprobs": None if policy is None else [math.log(p) for p in policy],
    }
    return Known(**(options | changes))


def found(*prompts, gamma=0.0, deltas=(0.1,)):
    result = findings(prompts, gamma=gamma, deltas=deltas)
    json.dumps(result, allow_nan=False)
    assert format_table(result)
    return result


def test_proved_prompts_by_hand():
    first = known(0.8, 0.1, n_expanded=20, cut_bound=-0.1)
    second = known(0.25, 0.2, greedy=False, rounding=2e-6)
    got = found(first, second)
    assert (got["n_prompts"], got["n_proved"], got["n_complete"]) == (2, 2, 2)
    assert got["n_expanded"] == {"mean": 15, "max": 20}
    assert got["rounding"] == 2e-6
    assert got["coverage"]["c_cov"] == pytest.approx([2.625, 2.625])
    assert got["logprob"]["mean"] == pytest.approx((math.log(0.8) + math.log(0.25)) / 2)
    # the first could be beaten by a longer completion
    assert got["n_best_at_any_length"] == 1
    assert got["greedy"] == {"n_must_find": 1, "n_found_of_those": 1, "n_found": 1}
    assert got["margin"]["smallest"] == pytest.approx(0.25)
    assert got["margin"]["median"] == pytest.approx((7 + 0.25) / 2)
    sizes = got["best_of_n"]["0.1"]
    least = [necessary_n(math.log(p), 0.1) for p in (0.8, 0.25)]
    assert sizes["n_necessary"] == {"mean": sum(least) / 2, "max": least[1]}
    rule = got["adaptive"]["0.1"]
    stops = [stopping(x.logprobs, mu_of(0.1)) for x in (first, second)]
    assert rule["expected_n"][0] == pytest.approx(sum(s.expected_low for s in stops) / 2)
    assert rule["miss"][1] == pytest.approx(sum(s.miss_high for s in stops) / 2)
    assert rule["largest_miss"] == pytest.approx(max(s.miss_high for s in stops))
    assert rule["largest_miss"] <= 0.05
    # 0.75^n <= 0.05 from n = 11 on, (0.2^n + 0.75^n) / 2 <= 0.05 from n = 9 on
    assert rule["fixed_n"]["guarantee_on_each"] == 11
    assert rule["fixed_n"]["guarantee_in_the_mean"] == 9
    assert rule["fixed_n"]["equal_miss"] == fixed_n(np.log([0.8, 0.25]), rule["miss"][1])
    assert rule["factor_saved"]["guarantee_on_each"] == pytest.approx(11 / rule["expected_n"][1])
    assert got["miss_by_n"]["2"] == pytest.approx(
        [(0.2**2 + 0.75**2) / 2, (math.exp(-1.6) + math.exp(-0.5)) / 2]
    )
    # mu is just below 3: within 10 samples only 0.8 stops the rule
    assert rule["certified_by"]["10"] == pytest.approx((1 - 0.2**10) / 2)
    assert rule["certified_by"]["1"] == 0
    assert "policy" not in got


def test_greedy_may_find_what_it_need_not():
    got = found(known(0.8), known(0.4, 0.1), known(0.3, 0.2, greedy=False))
    assert got["greedy"] == {"n_must_find": 1, "n_found_of_those": 1, "n_found": 2}


def test_ties_are_one_set():
    got = found(known(0.3, 0.3, 0.1), gamma=0.5)
    assert got["coverage"]["c_cov"] == pytest.approx([1 / 0.6, 1 / 0.6])
    assert got["coverage"]["c_cov_adaptive"] == pytest.approx(1 / 0.3)
    assert got["margin"]["smallest"] == 0


def test_coverage_of_near_best_completions():
    got = found(known(0.4, 0.25, 0.19), known(0.5, 0.1), gamma=0.5)
    assert got["coverage"]["c_cov_gamma"]["value"] == pytest.approx((1 / 0.65 + 2) / 2)


def test_an_unproved_prompt_widens_coverage_and_leaves_the_rest_alone():
    unproved = known(0.01, proved=False, complete=False, bound=-0.5)
    got = found(known(0.5, 0.2), unproved)
    assert got["n_proved"] == 1
    assert got["coverage"]["c_cov"] == pytest.approx([(2 + 1) / 2, (2 + 100) / 2])
    assert "c_cov_gamma" not in got["coverage"]
    assert got["logprob"]["mean"] == pytest.approx(math.log(0.5))
    only = found(unproved)
    assert only["n_proved"] == 0
    assert "adaptive" not in only


def test_a_proved_best_with_an_unproved_runner_up_has_no_margin():
    half = known(0.4, 0.01, complete=False, bound=math.log(0.3))
    got = found(half)
    assert got["margin"] == {}
    # only y* is known: what lies below the bound is not taken for the whole list
    rule, alone = got["adaptive"]["0.1"], stopping([math.log(0.4)], mu_of(0.1))
    assert rule["expected_n"] == pytest.approx([alone.expected_low, alone.expected_high])


def test_a_policy_is_judged_by_its_mass_on_the_base_model_s_y_star():
    prompts = (
        known(0.5, 0.45, policy=(0.6, 0.3)),
        known(0.5, 0.1, policy=(0.2, 0.8)),
        known(0.4, 0.4, policy=(0.5, 0.45)),
    )
    got = found(*prompts, gamma=0.2, deltas=(0.5, 0.08))
    assert got["policy"]["eps"] == pytest.approx({"0.5": 1 / 3, "0.08": 2 / 3})
    assert got["policy"]["eps_gamma"] == pytest.approx({"0.5": 1 / 3, "0.08": 2 / 3})
    masses = [0.6, 0.2, 0.95]
    assert got["policy"]["logprob_mean"] == pytest.approx(sum(map(math.log, masses)) / 3)


def test_an_unproved_tie_counts_once_in_the_upper_end():
    # the real best may be a single completion just above the two
    unproved = known(0.1, 0.1, proved=False, complete=False, bound=-0.5)
    assert found(unproved)["coverage"]["c_cov"] == pytest.approx([1, 10])
