import random

import pytest
import torch

from sharpen import Scores, best_of_n
from sharpen.errors import InputError
from sharpen.selection import inference_time_pessimism, pessimistic_best_of_n
from sharpen.selection.pessimism import water_level
from sharpen_kernels import TokenStats

NAN, INF = float("nan"), float("inf")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def of_one_token(logprob, P=1):
    """P prompts with the same completions of one token each."""
    return Scores.of(TokenStats(logprob=logprob.float().repeat(P)), [[1] * len(logprob)] * P)


def mean_rise(rewards, level, beta):
    return sum(max(0.0, (x - level) / beta) for x in rewards) / len(rewards)


@pytest.mark.parametrize(
    ("rewards", "beta", "want"),
    [
        ([1.0, 0.0, -5.0], 1.0, -1.0),  # 2 + 1
        ([1.0, 0.0, -5.0], 0.25, 0.25),  # 3 x 0.25 above the first alone
        ([1.0, 0.0, -5.0], 100.0, -4 / 3 - 100),  # all of them
        ([3.0], 2.0, 1.0),
        ([3.0, -INF], 2.0, -1.0),  # the one counts, and adds nothing
        ([2.0, 2.0, 2.0], 0.5, 1.5),
    ],
)
def test_hand_worked_levels(rewards, beta, want):
    assert water_level(rewards, beta) == pytest.approx(want)
    assert water_level(rewards[::-1], beta) == pytest.approx(want)


@pytest.mark.parametrize("beta", [1e-3, 0.1, 1.0, 30.0])
def test_the_level_solves_its_equation(beta):
    rng = random.Random(0)
    for n in (1, 2, 5, 50):
        for offset in (0.0, 1e6):
            rewards = [offset + rng.choice([rng.gauss(0, 3), 1.0]) for _ in range(n)]
            level = water_level(rewards, beta)
            assert mean_rise(rewards, level, beta) == pytest.approx(1, rel=1e-6)
            assert level < max(rewards)


@pytest.mark.parametrize("rewards", [[], [-INF], [1.0, NAN], [1.0, INF]])
def test_rewards_without_a_level_are_refused(rewards):
    with pytest.raises(InputError, match=r"`rewards` must be finite or -inf, not all -inf"):
        water_level(rewards, 1.0)


def test_one_batch_weights_are_the_rises_above_the_level():
    choice = pessimistic_best_of_n(
        Scores.from_logprobs([[[-1.0], [-2.0], [-7.0]], [[-5.0], [-5.0]]]),
        beta=1.0,
        generator=seeded(),
    )
    # the level of the first prompt is -3
    assert choice.weight.tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0.5, 0.5])
    assert choice.effective_samples.tolist() == pytest.approx([9 / 5, 2])


def test_one_batch_is_best_of_n_at_small_beta_and_uniform_at_large():
    scores = Scores.from_logprobs((-30 * torch.rand(20, 9, 1)).tolist())
    small = pessimistic_best_of_n(scores, beta=1e-9, generator=seeded())
    assert torch.equal(small.chosen, best_of_n(scores))
    large = pessimistic_best_of_n(scores, beta=1e9, generator=seeded())
    assert large.weight.tolist() == pytest.approx([1 / 9] * 180, rel=1e-5)


@pytest.mark.parametrize("beta", [0.2, 1.0])
@pytest.mark.parametrize("n", [2, 4])
def test_two_batches_follow_the_law_of_rejection_sampling(beta, n):
    # three outcomes of base probability p and reward r; n - 1 draws are tried, the n-th is kept
    P = 8000
    p, r = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.6, 0.9])
    first = torch.tensor([0, 0, 1, 2, 1])
    level = water_level(r[first].tolist(), beta)
    accept = ((r - level).clamp(min=0) / (1.0 - level)).double()
    a = (p * accept).sum()
    refused = (1 - a) ** (n - 1)
    want = p * accept / a * (1 - refused) + refused * p

    drawn = torch.multinomial(p, n * P, replacement=True)
    found = inference_time_pessimism(
        of_one_token(p.log()[first], P),
        Scores.of(TokenStats(logprob=p.log()[drawn]), [[1] * n] * P),
        (r[first].repeat(P), r[drawn]),
        beta=beta,
        reward_max=1.0,
        # not the seed of the draws: the same uniforms would decide both
        generator=seeded(1),
    )
    got = torch.bincount(drawn[found.chosen + n * torch.arange(P)], minlength=3) / P
    # four standard errors
    assert (got - want).abs().max() < 4 * 0.5 / P**0.5
    assert abs(found.accepted.double().mean() - (1 - refused)) < 4 * 0.5 / P**0.5
    assert found.level.tolist() == pytest.approx([level] * P)


def test_where_none_is_accepted_the_last_eligible_one_is_taken():
    first = Scores.from_logprobs([[[-1.0]], [[]], [[-1.0]]])
    second = Scores.from_logprobs([[[-9.0], [-8.0], []], [[-9.0], [-8.0]], [[]]])
    found = inference_time_pessimism(first, second, beta=1.0, generator=seeded())
    assert found.chosen.tolist() == [1, 1, -1]
    assert found.accepted.tolist() == [False, False, False]
    assert found.level.isnan().tolist() == [False, True, False]


def test_the_last_one_is_never_tried():
    # certain to be accepted were it tried: at the level of -1 and beta, w = M
    scores = Scores.from_logprobs([[[0.0]]])
    found = inference_time_pessimism(scores, scores, beta=1.0, generator=seeded())
    assert found.chosen.tolist() == [0]
    assert found.accepted.tolist() == [False]


def test_bad_settings_are_refused():
    scores = of_one_token(torch.tensor([-1.0, -2.0]))
    for beta in (0.0, -1.0, INF, NAN):
        for run in (pessimistic_best_of_n, lambda s, **o: inference_time_pessimism(s, s, **o)):
            with pytest.raises(InputError, match=r"`beta` must be finite and above 0, got"):
                run(scores, beta=beta, generator=seeded())
    certainty = torch.tensor([0.5, 2.0])
    with pytest.raises(InputError, match=r"`reward_max` .* at least every reward, got 0.0 .* 2.0"):
        inference_time_pessimism(
            scores, scores, (certainty, certainty), beta=1.0, generator=seeded()
        )
    with pytest.raises(
        InputError, match=r"`second` must hold .* same prompts as `first`, 1, got 2"
    ):
        inference_time_pessimism(
            scores, of_one_token(torch.zeros(1), P=2), beta=1.0, generator=seeded()
        )
    with pytest.raises(InputError, match=r"`rewards` must be finite or -inf"):
        pessimistic_best_of_n(scores, torch.tensor([INF, 0.0]), beta=1.0, generator=seeded())
