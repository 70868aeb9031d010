"""Losses against numbers worked by hand, finite differences, and optima on enumerable models."""

import math

import pytest
import torch

from sharpen.training.groups import Batch, Group
from sharpen.training.losses import (
    Dpo,
    Likelihood,
    Square,
    dpo_loss,
    nll,
    sequence_sums,
    square_loss,
    xpo_loss,
)
from sharpen.training.xpo import optimism_weight

# three completions of 2, 1 and 3 tokens; sums -3, -4, -6
LOGPROB = torch.tensor([-1.0, -2.0, -4.0, -1.0, -2.0, -3.0], dtype=torch.float64)
OFFSETS = torch.tensor([0, 2, 3, 6])
REFERENCE = torch.tensor([-2.0, -5.0, -4.0], dtype=torch.float64)
REWARD = torch.tensor([-2.0, -5.0, -4.5], dtype=torch.float64)
PAIRS = torch.tensor([[0, 1], [2, 1]])
WEIGHT = torch.tensor([0.25, 0.75, 0.5], dtype=torch.float64)


def test_sums_of_tokens():
    assert sequence_sums(LOGPROB, OFFSETS).tolist() == [-3, -4, -6]
    assert sequence_sums(LOGPROB.float(), OFFSETS).dtype == torch.float64


def test_nll_by_hand():
    total = 0.25 * 3 + 0.75 * 4 + 0.5 * 6
    got = nll(LOGPROB, OFFSETS, WEIGHT, per="sequence").item()
    assert got == pytest.approx(total / 1.5, rel=1e-15)
    got = nll(LOGPROB, OFFSETS, WEIGHT, per="token").item()
    assert got == pytest.approx(total / (0.25 * 2 + 0.75 * 1 + 0.5 * 3), rel=1e-15)


def test_square_loss_by_hand():
    # log-ratios -1, 1, -2; differences -2, -3; of rewards 3, 0.5
    log_ratio = sequence_sums(LOGPROB, OFFSETS) - REFERENCE
    got = square_loss(log_ratio, REWARD, PAIRS, beta=0.5).item()
    assert got == pytest.approx(((-1 - 3) ** 2 + (-1.5 - 0.5) ** 2) / 2, rel=1e-15)


def test_xpo_loss_adds_what_base_samples_would_gain():
    logprob = sequence_sums(LOGPROB, OFFSETS)
    got = xpo_loss(logprob, REFERENCE, REWARD, PAIRS, beta=0.5, optimism=0.1).item()
    # both pairs have the second completion as y'
    assert got == pytest.approx(10 + 0.1 * -4, rel=1e-15)


def test_dpo_loss_by_hand():
    log_ratio = sequence_sums(LOGPROB, OFFSETS) - REFERENCE
    got = dpo_loss(log_ratio, PAIRS, beta=0.5).item()
    want = (math.log(1 + math.exp(1.0)) + math.log(1 + math.exp(1.5))) / 2
    assert got == pytest.approx(want, rel=1e-15)


OBJECTIVES = {
    "nll-token": Likelihood("token"),
    "nll-sequence": Likelihood("sequence"),
    "square": Square(0.7),
    "xpo": Square(0.7, optimism=0.3),
    "dpo": Dpo(0.7),
}
BATCH = Batch.of(
    [
        Group(
            [1],
            [[1, 2], [3]],
            weight=[0.2, 0.8],
            reference=[-2.0, -5.0],
            reward=[-2.0, -5.0],
            pairs=[(0, 1)],
        ),
        Group(
            [2],
            [[1, 2, 3], [4]],
            weight=[1.0, 0.0],
            reference=[-4.0, -1.0],
            reward=[-4.5, -1.0],
            pairs=[(1, 0), (0, 1)],
        ),
    ]
)


# sums -3 -4 | -6 -0.5, log-ratios -1 1 | -2 0.5; pairs (0, 1), (3, 2), (2, 3)
VALUES = {
    "nll-token": (Likelihood("token"), (0.2 * 3 + 0.8 * 4 + 6) / (0.2 * 2 + 0.8 * 1 + 3)),
    "nll-sequence": (Likelihood("sequence"), (0.2 * 3 + 0.8 * 4 + 6) / 2),
    "square": (Square(0.5), ((-1 - 3) ** 2 + (1.25 - 3.5) ** 2 + (-1.25 + 3.5) ** 2) / 3),
    "xpo": (Square(0.5, 0.3), (16 + 2 * 2.25**2) / 3 + 0.3 * (-4 - 6 - 0.5) / 3),
    "dpo": (Dpo(0.5), sum(math.log(1 + math.exp(x)) for x in (1, -1.25, 1.25)) / 3),
}


@pytest.mark.parametrize("name", VALUES)
def test_objectives_of_a_batch_by_hand(name):
    logprob = torch.tensor([-1.0, -2.0, -4.0, -1.0, -2.0, -3.0, -0.5], dtype=torch.float64)
    objective, want = VALUES[name]
    assert objective(logprob, BATCH).item() == pytest.approx(want, rel=1e-14)
    assert objective(logprob.float(), BATCH).item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_those_of_finite_differences(name):
    generator = torch.Generator().manual_seed(0)
    logprob = -3 * torch.rand(7, generator=generator, dtype=torch.float64)
    objective = OBJECTIVES[name]
    assert torch.autograd.gradcheck(lambda x: objective(x, BATCH), logprob.requires_grad_())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_gradient_reaches_the_reference_and_every_part_counts(name):
    objective, logprob = OBJECTIVES[name], torch.linspace(-1, -3, 7, dtype=torch.float64)
    (slope,) = torch.autograd.grad(objective(x := logprob.requires_grad_(), BATCH), x)
    # within a completion all tokens have one slope
    assert slope[0] == slope[1]
    assert slope[3] == slope[4] == slope[5]
    assert (slope != 0).sum() == (6 if name.startswith("nll") else 7)


# an enumerable "language": one token of six, so l is a log-softmax
BASE = torch.tensor([-0.3, -1.0, -2.0, 0.5, 0.1, -4.0], dtype=torch.float64).log_softmax(0)
ALL_PAIRS = torch.combinations(torch.arange(6), 2)


@pytest.mark.parametrize("beta", [0.25, 1.0, 3.0])
def test_square_loss_is_zero_at_the_power_distribution(beta):
    power = ((1 + 1 / beta) * BASE).log_softmax(0)
    assert square_loss(power - BASE, BASE, ALL_PAIRS, beta=beta).item() < 1e-28
    # and of another reward at pi_base exp(r / beta)
    reward = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, 0.25], dtype=torch.float64)
    tilted = (BASE + reward / beta).log_softmax(0)
    assert square_loss(tilted - BASE, reward, ALL_PAIRS, beta=beta).item() < 1e-28
    off = ((1 + 1.1 / beta) * BASE).log_softmax(0)
    assert square_loss(off - BASE, BASE, ALL_PAIRS, beta=beta).item() > 1e-3


def minimised(loss):
    theta = BASE.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta],
        max_iter=200,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
    )

    def closure():
        optimizer.zero_grad()
        value = loss(theta.log_softmax(0))
        value.backward()
        return value

    optimizer.step(closure)
    return theta.detach().log_softmax(0)


def test_minimising_the_square_loss_sharpens_to_the_power_distribution():
    found = minimised(lambda logprob: square_loss(logprob - BASE, BASE, ALL_PAIRS, beta=0.5))
    torch.testing.assert_close(found, (3 * BASE).log_softmax(0), atol=1e-6, rtol=0)


def test_optimism_moves_mass_off_what_the_base_model_draws():
    # y' is always the base's favourite
    pairs = torch.tensor([[0, 3], [1, 3], [2, 3], [4, 3], [5, 3]])

    def fitted(optimism):
        return minimised(lambda x: xpo_loss(x, BASE, BASE, pairs, beta=1.0, optimism=optimism))

    plain, bold = fitted(0.0), fitted(0.2)
    torch.testing.assert_close(plain, (2 * BASE).log_softmax(0), atol=1e-6, rtol=0)
    assert bold[3] < plain[3] - 0.01
    # stationary: 2 e[q] / 5 = optimism p[q], so every other token gains on the favourite
    error = (bold - 2 * BASE)[pairs[:, 0]] - (bold - 2 * BASE)[3]
    want = 5 / 2 * 0.2 * bold.exp()[pairs[:, 0]]
    torch.testing.assert_close(error, want, atol=1e-6, rtol=0)


def test_xpo_is_the_proofs_objective_on_the_scale_of_the_square():
    alpha, value, reward_bound, beta = 0.01, 3.0, 4.0, 0.7
    logprob = torch.linspace(-1, -3, 6, dtype=torch.float64)
    other = logprob.flip(0) - 0.3
    n = len(ALL_PAIRS)

    def proof(policy):
        error = square_loss(policy - BASE, BASE, ALL_PAIRS, beta=beta) * n
        scale = beta / (alpha * (value + reward_bound) ** 2)
        return beta * policy[ALL_PAIRS[:, 1]].sum() + scale * error

    def ours(policy):
        optimism = optimism_weight(alpha, value, reward_bound)
        return xpo_loss(policy, BASE, BASE, ALL_PAIRS, beta=beta, optimism=optimism)

    factor = alpha * (value + reward_bound) ** 2 / beta / n
    for policy in (logprob, other):
        assert ours(policy).item() == pytest.approx(factor * proof(policy).item(), rel=1e-12)
