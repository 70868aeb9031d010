import math

import pytest
import torch

from sharpen import Scores, best_of_n
from sharpen.errors import InputError
from sharpen.selection import soft_best_of_n
from sharpen.selection.best_of_n import draw_by_weight, effective_samples, soft_weights
from sharpen_kernels import TokenStats

INF = float("inf")


def of_one_token(*prompts, valid=None):
    return Scores.from_logprobs([[[x] for x in logprobs] for logprobs in prompts], valid)


def one_prompt(logprob):
    """One prompt, one token a completion."""
    return Scores.of(TokenStats(logprob=logprob), [[1] * len(logprob)])


def soft(scores, reward="logprob", *, temperature, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return soft_best_of_n(scores, reward, temperature=temperature, generator=generator)


def test_hand_worked_weights():
    thirds = of_one_token([math.log(0.2), math.log(0.1)], [-1.0, -5.0], valid=[[True] * 2] * 2)
    assert soft_weights(thirds, "logprob", 1.0)[:2].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert soft_weights(thirds, "logprob", 0.5)[:2].tolist() == pytest.approx([4 / 5, 1 / 5])
    assert soft_weights(thirds, "logprob", 2.0)[2:].tolist() == pytest.approx(
        [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))]
    )


def test_ineligible_completions_weigh_nothing_and_infinite_ones_their_limit():
    scores = of_one_token([-1.0, -1.0, -1.0], [-INF, -INF], valid=[[True, False, True], [True] * 2])
    assert soft_weights(scores, "logprob", 1.0).tolist() == [0.5, 0, 0.5, 0.5, 0.5]
    reward = torch.tensor([INF, 0.0, 1.0, -INF, 3.0])
    assert soft_weights(scores, reward, 1.0).tolist() == [1, 0, 0, 0, 1]


def test_temperatures_near_the_ends_are_best_of_n_and_uniform():
    scores = Scores.from_logprobs((-2000 * torch.rand(20, 9, 1)).tolist())
    assert torch.equal(soft(scores, temperature=1e-9).chosen, best_of_n(scores))
    assert soft(scores, temperature=1e9).weight.tolist() == pytest.approx([1 / 9] * 180, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 1 / 3])
def test_samples_of_the_model_are_weighted_into_its_power_distribution(temperature):
    p = torch.tensor([0.4, 0.25, 0.25, 0.1])
    drawn = torch.multinomial(p, 40_000, replacement=True)
    weight_N = soft_weights(one_prompt(p.log()[drawn]), "logprob", temperature)
    got = torch.zeros(4, dtype=torch.float64).index_add(0, drawn, weight_N)
    want = p.double() ** (1 + 1 / temperature)
    assert 0.5 * (got - want / want.sum()).abs().sum() < 0.01
    assert 0.5 * (p - want / want.sum()).abs().sum() > 0.1


def test_the_draw_follows_the_weights():
    P = 6000
    scores = Scores.of(
        TokenStats(logprob=torch.tensor([0.5, 0.125, 0.25]).log().repeat(P)), [[1] * 3] * P
    )
    found = soft(scores, temperature=1.0)
    share = torch.bincount(found.chosen, minlength=3) / P
    want = found.weight[:3]
    assert want.tolist() == pytest.approx([4 / 7, 1 / 7, 2 / 7])
    # three standard errors
    assert (share - want).abs().max() < 3 * 0.5 / P**0.5


def test_the_same_seed_draws_the_same_and_prompts_draw_apart():
    scores = Scores.of(TokenStats(logprob=torch.zeros(400)), [[1] * 10] * 40)
    first = soft(scores, temperature=1.0).chosen
    assert torch.equal(soft(scores, temperature=1.0).chosen, first)
    assert not torch.equal(soft(scores, temperature=1.0, seed=1).chosen, first)
    assert len(set(first.tolist())) > 5


@pytest.mark.parametrize(
    ("u", "want"), [(0.0, 1), (0.4999, 1), (0.5, 3), (0.5001, 3), (1 - 2**-53, 3)], ids=str
)
def test_the_edges_of_a_draw_miss_weights_of_zero(monkeypatch, u, want):
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([u], dtype=torch.float64))
    weight = torch.tensor([0.0, 0.7, 0.0, 0.7, 0.0], dtype=torch.float64)
    assert draw_by_weight(weight, torch.tensor([0, 5]), torch.Generator()).tolist() == [want]


def test_a_draw_that_rounds_to_the_whole_weight_takes_the_last_that_has_any(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([0.9], dtype=torch.float64))
    # the smallest number there is: 0.9 of it is itself
    weight = torch.tensor([0.0, 5e-324, 0.0], dtype=torch.float64)
    assert draw_by_weight(weight, torch.tensor([0, 3]), torch.Generator()).tolist() == [1]


def test_effective_samples():
    groups = torch.tensor([0, 4, 4, 6, 7, 9])
    weight = torch.tensor([0.25] * 4 + [3.0, 1.0] + [0.0] + [1e-200, 1e-200], dtype=torch.float64)
    got = effective_samples(weight, groups).tolist()
    assert got == pytest.approx([4, 0, 16 / 10, 0, 2])
    scores = of_one_token([-1.0, -2.0, -4.0])
    w = torch.tensor([-1.0, -2.0, -4.0]).double().mul(2).exp()
    want = (w.sum() ** 2 / (w**2).sum()).item()
    assert soft(scores, temperature=0.5).effective_samples.tolist() == pytest.approx([want])


@pytest.mark.parametrize("temperature", [0.0, -1.0, INF, float("nan")])
def test_temperatures_out_of_range_are_refused(temperature):
    with pytest.raises(InputError, match=r"`temperature` must be finite and above 0, got"):
        soft(of_one_token([-1.0]), temperature=temperature)
