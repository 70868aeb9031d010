import math

import pytest
import torch

from sharpen.sampling.smc import effective_size, log_mean, systematic

W = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.0, 1.0, 0.0, 1.0]], dtype=torch.float64)


def test_effective_size_and_mean_by_hand():
    # 1 / (.01 + .04 + .09 + .16) and two equal ones
    assert effective_size(W.log()).tolist() == pytest.approx([1 / 0.3, 2.0])
    assert log_mean(W.log()).exp().tolist() == pytest.approx([0.25, 0.5])
    shifted = effective_size(W.log() - 1000)
    assert shifted.tolist() == pytest.approx([1 / 0.3, 2.0])


@pytest.mark.parametrize(
    ("u", "want"),
    [
        # points (i + u) / 4 against the sums .1 .3 .6 1 and 0 .5 .5 1
        (0.2, [[0, 2, 2, 3], [1, 1, 3, 3]]),
        (0.9, [[1, 2, 3, 3], [1, 1, 3, 3]]),
    ],
)
def test_systematic_by_hand(u, want):
    assert systematic(W.log(), torch.full((2,), u).double(), 4).tolist() == want


@pytest.mark.parametrize("n", [3, 4, 50])
def test_systematic_draws_floor_or_ceil_and_n_w_on_average(n):
    counts = []
    for u in (torch.arange(400).double() + 0.5) / 400:
        chosen = systematic(W[:1].log(), u[None], n)
        counts.append(torch.bincount(chosen[0], minlength=4))
    counts = torch.stack(counts).double()
    want = n * W[0]
    assert (counts - want).abs().max() < 1
    torch.testing.assert_close(counts.mean(0), want, atol=0.01, rtol=0)


def test_nothing_without_weight_is_drawn_at_the_edges():
    log_weight = torch.tensor([[-math.inf, 0.0, -math.inf]]).double()
    for u in (1e-300, 1 - 2**-53):
        assert systematic(log_weight, torch.tensor([u]).double(), 5).tolist() == [[1] * 5]


def test_where_none_weighs_all_weigh_the_same():
    log_weight = torch.full((1, 3), -math.inf).double()
    assert systematic(log_weight, torch.tensor([0.5]).double(), 3).tolist() == [[0, 1, 2]]
    assert log_mean(log_weight).tolist() == [-math.inf]
    assert effective_size(log_weight).tolist() == [0.0]
