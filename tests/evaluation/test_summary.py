import dataclasses
import json

import numpy as np
import pytest

from sharpen.errors import InputError
from sharpen.evaluation import Outcome, summarize
from sharpen.evaluation.summary import n_values

KEYS = [
    "task",
    "model",
    "n",
    "prompts",
    "seed",
    "reward",
    "accuracy",
    "lift_over_greedy_percent",
    "ci95",
    "ci95_of_baselines",
    "ci95_of_lift",
    "gain_over_sample_points",
    "ci95_of_gain",
    "p_value_vs_sample",
    "p_value_vs_greedy",
    "mean_logprob_of_chosen",
    "mean_logprob_by_reward",
    "seconds",
    "tokens",
    "invalid_share",
    "prompts_without_choice",
    "settings",
]
# what a run cannot say without a checker
GRADED = KEYS[6:15]


@pytest.fixture
def tiny():
    """Four prompts, two samples; the likelier is right in prompts 0 and 1, the other in 2."""
    return Outcome(
        {"logprob": np.array([[-1.0, -2.0], [-3.0, -1.0], [-1.0, -2.0], [-4.0, -5.0]])},
        np.ones((4, 2), dtype=bool),
        np.array([[1, 0], [0, 1], [0, 1], [0, 0]], dtype=bool),
        np.array([1, 0, 0, 0], dtype=bool),
    )


def test_keys_are_frozen(make_outcome, summary_of):
    summary = summary_of(make_outcome(P=7, G=6))
    assert list(summary) == KEYS
    assert list(summary["accuracy"]) == ["greedy", "sample", "pass_at_n", "best_of_n"]
    assert list(summary["accuracy"]["pass_at_n"]) == ["1", "5", "6"]
    assert list(summary["mean_logprob_of_chosen"]) == ["1", "5", "6"]
    for figure in (
        "ci95",
        "lift_over_greedy_percent",
        "p_value_vs_sample",
        "mean_logprob_by_reward",
    ):
        assert list(summary[figure]) == ["logprob", "mean_logprob", "majority"]
        assert list(summary[figure]["majority"]) == ["1", "5", "6"]


def test_figures_worked_by_hand(tiny, summary_of):
    summary = summary_of(tiny)
    assert (summary["n"], summary["prompts"]) == (2, 4)
    assert summary["accuracy"] == {
        "greedy": 0.25,
        "sample": 0.375,
        "pass_at_n": {"1": 0.375, "2": 0.75},
        "best_of_n": {"logprob": {"1": 0.375, "2": 0.5}},
    }
    assert summary["lift_over_greedy_percent"] == {"logprob": {"1": 50.0, "2": 100.0}}
    assert summary["gain_over_sample_points"] == {"logprob": {"1": 0.0, "2": 12.5}}
    # means of the prompts' means -1.5, -2, -1.5, -4.5 and of their maxima -1, -1, -1, -4
    assert summary["mean_logprob_of_chosen"] == {"1": -2.375, "2": -1.75}
    assert summary["p_value_vs_sample"]["logprob"]["1"] == 1
    assert summary["ci95"]["logprob"]["2"] == [0.0, 1.0]
    assert summary["seconds"] == {"sample": 1.23, "score": 0.5}
    assert summary["tokens"] == {"sampled": 100, "scored": 100}
    assert summary["invalid_share"] == 0
    assert summary["prompts_without_choice"] == {"logprob": 0}


def test_best_of_n_that_always_wins_is_significant(summary_of):
    P = 60
    logprob_PG = np.tile([-1.0, -2.0], (P, 1))
    correct_PG = np.tile([True, False], (P, 1))
    outcome = Outcome(
        {"logprob": logprob_PG}, np.ones_like(correct_PG), correct_PG, ~correct_PG[:, 0]
    )
    summary = summary_of(outcome)
    assert summary["gain_over_sample_points"]["logprob"]["2"] == 50
    assert summary["p_value_vs_sample"]["logprob"]["2"] == pytest.approx(0.0002)
    assert summary["accuracy"]["greedy"] == 0
    assert summary["lift_over_greedy_percent"]["logprob"] == {"1": None, "2": None}
    assert summary["ci95_of_lift"]["logprob"] == {"1": None, "2": None}


def test_without_a_checker_graded_figures_are_null(make_outcome, summary_of):
    summary = summary_of(make_outcome(checker=False))
    assert list(summary) == KEYS
    assert {key for key in KEYS if summary[key] is None} == set(GRADED)


def test_without_greedy_only_what_needs_it_is_null(tiny, summary_of):
    summary = summary_of(dataclasses.replace(tiny, greedy_correct_P=None))
    assert summary["accuracy"]["greedy"] is None
    assert summary["ci95_of_baselines"]["greedy"] is None
    assert summary["lift_over_greedy_percent"]["logprob"] == {"1": None, "2": None}
    assert summary["p_value_vs_greedy"]["logprob"] == {"1": None, "2": None}
    assert summary["p_value_vs_sample"]["logprob"]["1"] == 1


def test_is_json_without_nan_even_when_nothing_is_eligible(tiny, summary_of):
    dead = dataclasses.replace(
        tiny, valid_PG=np.zeros((4, 2), dtype=bool), reward_PG={"logprob": np.full((4, 2), np.nan)}
    )
    summary = summary_of(dead, temperature=float("inf"), folder=object(), sizes=(1, 2))
    assert summary["mean_logprob_of_chosen"] == {"1": None, "2": None}
    assert summary["prompts_without_choice"] == {"logprob": 4}
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_same_run_same_bytes(make_outcome, summary_of):
    first, second = (json.dumps(summary_of(make_outcome())) for _ in range(2))
    assert first == second
    assert first != json.dumps(summary_of(make_outcome(), seed=1))


def test_other_settings_are_kept(tiny, summary_of):
    summary = summary_of(tiny, n=2, temperature=0.7, versions={"torch": "2.9"})
    assert summary["settings"] == {"temperature": 0.7, "versions": {"torch": "2.9"}}


@pytest.mark.parametrize(
    ("n", "values"),
    [
        (1, [1]),
        (3, [1, 3]),
        (5, [1, 5]),
        (30, [1, 5, 10, 25, 30]),
        (50, [1, 5, 10, 25, 50]),
        (64, [1, 5, 10, 25, 50, 64]),
    ],
)
def test_n_values_end_in_n(n, values):
    assert n_values(n) == values


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": "magic"}, "must be one of logprob, got 'magic'"),
        ({"n": 50}, "must be the samples per prompt, 2, got 50"),
        ({"seed": -1}, "must be an integer >= 0, got -1"),
    ],
)
def test_setting_that_contradicts_the_run_is_refused(tiny, summary_of, settings, message):
    with pytest.raises(InputError, match=message):
        summary_of(tiny, **settings)


def test_missing_setting_is_named(tiny):
    with pytest.raises(InputError, match=r"`settings` must hold \['model', 'seed'\]"):
        summarize(tiny, settings={"task": None, "reward": "logprob"}, seconds={}, tokens={})
