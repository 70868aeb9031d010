"""The proof's alpha: the linear softmax's weight, and how it grows and falls."""

import math

import pytest
import torch

from sharpen.experiments.theory.linear_softmax import LinearSoftmax, optimism_of, sphere_packing
from sharpen.training.xpo import optimism_weight, proof_alpha


@pytest.fixture(scope="module")
def model():
    points = sphere_packing(4, 24, 0.6, torch.Generator().manual_seed(0))
    return LinearSoftmax.of(points, 0.1)


def weight(model, rounds, exploration):
    # the bounds that the instance takes: V = 2, R of its least likely completion
    bounds = 2.0, -model.base.min().item()
    alpha = proof_alpha(exploration, model.beta, *bounds, rounds)
    return optimism_weight(alpha, *bounds)


@pytest.mark.parametrize("rounds", [1, 2, 30, 1000])
def test_it_is_the_weight_of_the_linear_softmax(model, rounds):
    # log |Pi| = SEC = d log(1 + T), but for the rho of the union bound
    assert weight(model, rounds, 1.0) == pytest.approx(optimism_of(model, rounds, rho=1.0))
    dimension = 4 * math.log(1 + rounds)
    c = math.sqrt((dimension + math.log(10)) / dimension)
    assert weight(model, rounds, c) == pytest.approx(optimism_of(model, rounds, rho=0.1))


def test_the_weight_grows_as_the_bounds_and_falls_as_the_root_of_the_rounds():
    def of(value, reward, rounds, beta=0.5, c=1.0):
        return optimism_weight(proof_alpha(c, beta, value, reward, rounds), value, reward)

    once = of(4.0, 6.0, 1)
    assert once == pytest.approx(0.5 * 10)
    assert of(12.0, 18.0, 1) == pytest.approx(3 * once)
    assert of(4.0, 6.0, 9) == pytest.approx(once / 3)
    assert of(4.0, 6.0, 1, beta=1.0) == pytest.approx(2 * once)
    assert of(4.0, 6.0, 1, c=0.1) == pytest.approx(once / 10)
    # a constant alpha makes it grow as the square
    assert optimism_weight(1e-4, 12.0, 18.0) == pytest.approx(9 * optimism_weight(1e-4, 4.0, 6.0))


def test_nothing_seen_is_no_optimism():
    assert proof_alpha(1.0, 0.5, 0.0, 0.0, 3) == 0
