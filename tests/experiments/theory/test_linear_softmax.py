""""""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sharpen.errors import InputError
from sharpen.experiments.theory.best_of_n import best_of_n_law
from sharpen.experiments.theory.linear_softmax import (
    LinearSoftmax,
    best_of_n_sft,
    most_likely,
    optimism_of,
    rounds_until_sharpened,
    sphere_packing,
    square_loss_fit,
)

DELTA = 0.1


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model():
    return LinearSoftmax.of(sphere_packing(4, 24, 0.6, generator()), DELTA)


def test_a_packing_is_of_unit_vectors_far_enough_apart():
    points = sphere_packing(5, 40, 0.7, generator())
    assert points.shape == (40, 5)
    assert points.norm(dim=1).numpy() == pytest.approx(np.ones(40))
    apart = torch.cdist(points, points) + 10 * torch.eye(40, dtype=torch.float64)
    assert apart.min() >= 0.7
    # no nearer than asked, and not much farther: a larger distance is another packing
    assert apart.min() < 0.8
    with pytest.raises(InputError, match=r"`size` must fit the sphere of R\^2, got 20 points"):
        sphere_packing(2, 20, 0.5, generator())


def test_the_instance_by_hand(model):
    base = model.base.exp()
    assert base.sum().item() == pytest.approx(1)
    weights = (model.phi @ model.phi[0]).exp()
    assert base.numpy() == pytest.approx((weights / weights.sum()).numpy())
    assert model.star(model.phi[0]) == pytest.approx(base[0].item())
    # y* stands out by gamma_margin, and beta is the theorem's
    margin = (base[0] / base[1:].max() - 1).item()
    assert model.beta == pytest.approx(margin / (2 * math.log(2 * 24 / DELTA)))
    assert model.bound == pytest.approx(2 * (1 + 1 / model.beta))


def test_the_optimum_of_the_regularised_reward_is_sharp_and_within_the_ball(model):
    """pi_base^(1 + 1/beta) is theta* times as much; theorem 4.3's beta makes it sharpened."""
    theta = (1 + 1 / model.beta) * model.phi[0]
    power = ((1 + 1 / model.beta) * model.base).log_softmax(0)
    assert model.logprob(theta).numpy() == pytest.approx(power.numpy())
    assert model.star(theta) >= 1 - DELTA / 2
    assert theta.norm() < model.bound
    # V of the optimism: |beta log pi/pi_base| of the optimum
    assert (model.beta * (power - model.base)).abs().max() <= 2


def test_the_likeliest_theta_matches_the_mean_of_what_it_saw(model):
    chosen = torch.tensor([0, 0, 3, 5, 9, 12, 17, 20])
    theta = most_likely(model, chosen)
    assert theta.norm() < model.bound
    # the gradient of a log-likelihood: mean of the model = mean of the data
    mean = model.logprob(theta).exp() @ model.phi
    assert mean.numpy() == pytest.approx(model.phi[chosen].mean(0).numpy(), abs=1e-5)


def test_a_likeliest_theta_at_infinity_stays_within_the_ball(model):
    chosen = torch.tensor([7, 7])
    theta = most_likely(model, chosen)
    assert model.logprob(theta)[7].exp() > 1 - 1e-6
    assert theta.norm() <= model.bound
    tight = replace(model, bound=2.0)
    theta = most_likely(tight, chosen)
    assert theta.norm().item() == pytest.approx(2.0, rel=1e-3)
    # on the surface the gradient points outwards, along theta itself
    slope = model.phi[7] - model.logprob(theta).exp() @ model.phi
    cosine = slope @ theta / (slope.norm() * theta.norm())
    assert cosine.item() == pytest.approx(1, abs=1e-4)


def test_sft_fits_what_best_of_n_chose(model):
    seen = []

    class Watched(np.random.Generator):
        def choice(self, *args, **kwargs):
            seen.append((args, kwargs))
            return super().choice(*args, **kwargs)

    theta = best_of_n_sft(model, 3, 5, Watched(np.random.PCG64(0)))
    ((size,), options) = seen[0]
    base = model.base.numpy()
    assert size == 24
    assert options["size"] == 3
    law = best_of_n_law(np.exp(base) / np.exp(base).sum(), base, 5)
    assert options["p"] == pytest.approx(law)
    again = np.random.default_rng(np.random.PCG64(0)).choice(24, size=3, p=options["p"])
    assert theta.numpy() == pytest.approx(most_likely(model, torch.from_numpy(again)).numpy())


def test_sft_needs_as_many_samples_as_y_star_is_rare(model):
    rng = np.random.default_rng(0)
    p = model.star(model.phi[0])

    def share(n_samples):
        ended = [model.star(best_of_n_sft(model, 1, n_samples, rng)) >= 0.9 for _ in range(100)]
        return np.mean(ended)

    # one chosen completion: sharpened exactly where it is y*
    for n_samples in (2, 10, 40):
        want = 1 - (1 - p) ** n_samples
        assert share(n_samples) == pytest.approx(want, abs=4 * math.sqrt(want * (1 - want) / 100))


def test_pairs_are_linear_equations_of_the_optimum(model):
    first, second = [1, 2, 5, 8, 13], [4, 9, 20, 21, 3]
    theta = square_loss_fit(model, first, second)
    want = (1 + 1 / model.beta) * model.phi[0]
    assert model.beta * theta.numpy() == pytest.approx(model.beta * want.numpy(), abs=1e-4)
    # the loss as it is defined, term by term, is 0 there
    r, change = model.base, model.logprob(theta) - model.base
    residual = model.beta * (change[first] - change[second]) - (r[first] - r[second])
    assert residual.abs().max() < 1e-4


def test_optimism_lowers_the_second_completions_and_a_minus_would_not(model):
    first, second = [1, 2], [4, 9]
    weight = optimism_of(model, 10_000)
    plain = square_loss_fit(model, first, second)
    bold = square_loss_fit(model, first, second, optimism=weight)
    assert model.logprob(bold)[second].sum() < model.logprob(plain)[second].sum()

    def loss(theta):
        apart = model.phi[first] - model.phi[second]
        squares = (model.beta * apart @ theta - (1 + model.beta) * apart @ model.phi[0]).square()
        return squares.sum() + weight * model.logprob(theta)[second].sum()

    assert loss(bold) < loss(plain)


@pytest.mark.parametrize("rounds", [10, 1000])
def test_the_weight_of_the_optimism_by_hand(model, rounds):
    """beta / (alpha (V + R)^2) on the squares and beta on the log-probs, over one another."""
    largest = -model.base.min().item() + 2
    cover = 4 * math.log(1 + rounds)
    alpha = model.beta / largest * math.sqrt((cover + math.log(10)) / (cover * rounds))
    assert optimism_of(model, rounds) == pytest.approx(alpha * largest**2)


def test_both_square_losses_end_within_few_rounds_and_say_so_when_not(model):
    for explore in (True, False):
        rounds = rounds_until_sharpened(model, DELTA, generator(3), max_rounds=400, explore=explore)
        assert rounds is not None
        assert 1 <= rounds <= 20
    assert rounds_until_sharpened(model, 1e-9, generator(3), max_rounds=1, explore=False) is None


def test_exploration_draws_from_the_policy_and_the_base_alone_without(model, monkeypatch):
    laws = []
    draw = torch.multinomial

    def watched(law, *args, **kwargs):
        laws.append(law)
        return draw(law, *args, **kwargs)

    monkeypatch.setattr(torch, "multinomial", watched)
    rounds_until_sharpened(model, 1e-6, generator(), max_rounds=3, explore=True, optimism=0.1)
    assert len(laws) == 6
    base = model.base.exp()
    # the first policy is the base; y' is always the base's
    for law in (laws[0], *laws[1::2]):
        assert law.numpy() == pytest.approx(base.numpy())
    assert (laws[2] - base).abs().max() > 0.01
    laws.clear()
    rounds_until_sharpened(model, 1e-6, generator(), max_rounds=3, explore=False)
    assert all((law - base).abs().max() < 1e-12 for law in laws)


def test_bad_input_is_refused(model):
    with pytest.raises(InputError, match=r"`delta` must be in \(0, 1\), got 1.0"):
        LinearSoftmax.of(model.phi, 1.0)
    with pytest.raises(InputError, match=r"`delta` must be in \(0, 1\)"):
        rounds_until_sharpened(model, 0.0, generator(), max_rounds=1)
