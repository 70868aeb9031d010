""""""

import math

import numpy as np
import pytest

from sharpen.experiments.theory import linear_softmax as study_module
from sharpen.experiments.theory.linear_softmax import linear_softmax_study, measure


@pytest.fixture
def scripted(monkeypatch):
    """Learners that end where the test says: SFT from a cost on, square losses in given rounds."""
    calls = []

    def sft(model, n, n_samples, rng):
        # 60, 48 and 176 samples in all
        enough = n_samples >= {1: 60, 4: 12, 16: 11}[n]
        return (model.bound if enough else 0.0) * model.phi[0]

    rounds = {}

    def until(model, delta, generator, *, max_rounds, explore):
        calls.append((max_rounds, explore))
        return rounds[max_rounds, explore].pop()

    monkeypatch.setattr(study_module, "best_of_n_sft", sft)
    monkeypatch.setattr(study_module, "rounds_until_sharpened", until)
    return rounds, calls


def test_a_row_holds_the_least_cost_and_the_middle_run(scripted):
    rounds, calls = scripted
    rounds[256, False] = [2, 9, 4]
    rounds[256, True] = [None, 5, 7]
    rounds[16, True] = [None, None, 3]
    row = measure({"d": 4, "repeats": 3}, np.random.default_rng(0))
    assert (row["offline"], row["xpo"], row["xpo_short"]) == (8, 14, None)
    assert calls == [(256, False)] * 3 + [(256, True)] * 3 + [(16, True)] * 3
    # n = 4 needs at least 12 samples each, and steps of sqrt(2) stop short of 17
    assert row["sft_n"] == 4
    assert 12 <= row["sft_n_samples"] <= 17
    assert row["sft"] == 4 * row["sft_n_samples"]
    assert row["completions"] == 32
    assert 32 / math.e < row["coverage"] < 32
    assert row["beta"] == pytest.approx(row["margin"] / (2 * math.log(2 * 32 / 0.1)))


def test_half_of_the_runs_must_end(scripted, monkeypatch):
    rounds, _ = scripted
    for key in ((192, False), (192, True), (12, True)):
        rounds[key] = [1, 1]
    ended = iter([False, False, True, False] + [True, True] * 20)

    def sft(model, n, n_samples, rng):
        return (model.bound if next(ended) else 0.0) * model.phi[0]

    monkeypatch.setattr(study_module, "best_of_n_sft", sft)
    row = measure({"d": 3, "repeats": 2}, np.random.default_rng(0))
    # none of two is not enough, one of two is: the second step
    first = row["coverage"] / 16
    assert (row["sft_n"], row["sft_n_samples"]) == (1, math.ceil(first * math.sqrt(2)))


def rows(*, xpo=lambda d: 4 * d):
    return [
        {
            "d": d,
            "completions": 2 ** (d + 1),
            "coverage": 3.0,
            "margin": 0.2,
            "sft": round(10 * math.exp(0.7 * d)),
            "offline": d**2,
            "xpo": xpo(d),
            "xpo_short": None if d > 4 else 10,
        }
        for d in (4, 6, 8)
    ]


def test_the_table_says_how_the_costs_grow():
    text = linear_softmax_study().table(rows())
    assert "SFT: m grows as e^(0.70 d); square loss, pairs of pi_base: as d^2.00; XPO" in text
    assert "XPO, T = 64 d: as d^1.00." in text
    assert text.count("never") == 2
    # a power of what never ends is not said
    assert "XPO, T = 64 d: as" not in linear_softmax_study().table(rows(xpo=lambda d: None))


def test_the_figure_leaves_out_what_never_ends():
    (panel,) = linear_softmax_study().panels(rows())
    lines = {line.name: line for line in panel.lines}
    assert lines["XPO, T = 4 d"].x == [4]
    assert lines["best-of-N and SFT"].x == [4, 6, 8]
    assert lines["C_cov"].dashed
