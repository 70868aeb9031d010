import math

import pytest
import torch

from sharpen.sampling.draw import NEAR_TIE_NATS, draw, exponential_noise, row_key


def keys(count, seed=0):
    return torch.tensor([row_key(seed, "prompt", i) for i in range(count)])


def test_noise_is_exponential():
    noise = exponential_noise(keys(500), 3, 400).double().flatten()
    n = noise.numel()
    assert (noise > 0).all()
    assert noise.mean().item() == pytest.approx(1, abs=4 / math.sqrt(n))
    # P(E > t) = exp(-t), at four standard errors
    for t in (0.01, 0.5, 2.0, 5.0):
        p = math.exp(-t)
        seen = (noise > t).double().mean().item()
        assert seen == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))


def test_noise_differs_by_key_step_and_token():
    noise = [exponential_noise(keys(50, seed), step, 60) for seed in (0, 1) for step in (0, 1)]
    together = torch.stack(noise).flatten()
    assert together.unique().numel() > 0.999 * together.numel()


def test_noise_of_a_token_does_not_depend_on_the_others():
    every = keys(9)
    whole = exponential_noise(every, 5, 100)
    assert torch.equal(exponential_noise(every[4:6], 5, 40), whole[4:6, :40])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_softmax(temperature):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, float("-inf")]]).repeat(20_000, 1)
    drawn = draw(logits, keys(20_000), 0, temperature=temperature, top_p=1.0)
    seen = torch.bincount(drawn.token, minlength=5) / 20_000
    want = (logits[0] / temperature).softmax(0)
    # four standard errors of a share of 20,000 draws
    assert ((seen - want).abs() <= 4 * (want * (1 - want) / 20_000).sqrt() + 1e-9).all()


@pytest.mark.parametrize(("top_p", "kept"), [(0.45, 1), (0.6, 2), (0.78, 2), (0.82, 3), (0.96, 4)])
def test_top_p_keeps_the_smallest_sufficient_set(top_p, kept):
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    drawn = draw(probs.log().repeat(4000, 1), keys(4000), 0, temperature=1.0, top_p=top_p).token
    seen = torch.bincount(drawn, minlength=4) / 4000
    want = probs.clone()
    want[kept:] = 0
    want /= want.sum()
    assert torch.equal(seen > 0, want > 0)
    assert (seen - want).abs().max().item() < 0.03


def test_top_p_smaller_than_any_token_is_greedy():
    logits = torch.randn(50, 20)
    drawn = draw(logits, keys(50), 0, temperature=1.0, top_p=1e-9)
    assert torch.equal(drawn.token, logits.argmax(1))


def test_temperature_zero_is_greedy():
    logits = torch.randn(50, 20)
    drawn = draw(logits, keys(50), 0, temperature=0.0, top_p=1.0)
    assert torch.equal(drawn.token, logits.argmax(1))


def test_a_greedy_tie_is_drawn_as_its_lowest_id():
    logits = torch.zeros(300, 64)
    logits[torch.arange(300), torch.arange(300) % 40 + 3] = -1.0
    logits[:, 2] = -1.0
    drawn = draw(logits, keys(300), 0, temperature=0.0, top_p=1.0)
    assert torch.equal(drawn.token, torch.zeros(300, dtype=torch.int64))
    assert drawn.is_near_tie.all()
    late = torch.full((1, 500), -2.0)
    late[0, [77, 301, 302]] = 1.0
    assert draw(late, keys(1), 0, temperature=0.0, top_p=1.0).token.tolist() == [77]


def test_near_ties_are_reported():
    logits = torch.tensor([[1.0, 1.0 + NEAR_TIE_NATS / 2, 0.0], [1.0, 1.1, 0.0]])
    drawn = draw(logits, keys(2), 0, temperature=0.0, top_p=1.0)
    assert drawn.is_near_tie.tolist() == [True, False]


def test_share_of_near_ties_is_what_the_docstring_says():
    logits = 3 * torch.randn(50_000, 30)
    drawn = draw(logits, keys(50_000), 0, temperature=1.0, top_p=1.0)
    assert drawn.is_near_tie.float().mean().item() < 3e-4


def test_edge_of_the_nucleus_is_a_near_tie_only_if_it_matters():
    # the third token is inside or outside by rounding alone
    logits = torch.tensor([0.5, 0.3, 0.2]).log().repeat(2000, 1)
    drawn = draw(logits, keys(2000), 0, temperature=1.0, top_p=0.8)
    clear = draw(logits, keys(2000), 0, temperature=1.0, top_p=0.9)
    wins = clear.token == 2
    assert wins.any()
    assert torch.equal(drawn.is_near_tie, wins | clear.is_near_tie)


def test_flips_hide_nowhere_but_in_near_ties():
    # noise ten times below the tolerance never changes a draw that was not reported
    torch.manual_seed(1)
    logits = 2 * torch.randn(20_000, 25)
    for top_p in (1.0, 0.9):
        how = {"temperature": 1.0, "top_p": top_p}
        drawn = draw(logits, keys(20_000), 7, **how)
        shaken = draw(logits + 2e-6 * torch.randn_like(logits), keys(20_000), 7, **how)
        flipped = drawn.token != shaken.token
        assert not (flipped & ~drawn.is_near_tie).any()
