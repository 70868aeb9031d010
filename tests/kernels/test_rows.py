"""The merge law: partials of any cut of the columns give the statistics of the whole."""

import itertools

import pytest
import torch

from sharpen_kernels._linear_logprob_torch import _partial
from sharpen_kernels._rows import Pairs, finish, merge
from sharpen_kernels.stats import NAMES

INF = float("inf")


def cut(z, *edges):
    edges = [0, *edges, z.shape[1]]
    parts = [_partial(z[:, a:b].clone(), a, list(NAMES)) for a, b in itertools.pairwise(edges)]
    whole = parts[0]
    for part in parts[1:]:
        whole = merge(whole, part)
    return finish(whole)._asdict()


@pytest.mark.parametrize("edges", [(1,), (5,), (9,), (3, 4, 8)], ids=str)
@pytest.mark.parametrize("masked", [(), (0,), (0, 1, 2, 3, 4), (9,), tuple(range(1, 10))], ids=str)
def test_any_cut_gives_the_whole(edges, masked):
    z = 3 * torch.randn(6, 10, dtype=torch.float64)
    z[:, list(masked)] = -INF
    got, want = cut(z, *edges), cut(z)
    for name, x in got.items():
        torch.testing.assert_close(x, want[name], msg=name)


def test_hand_worked():
    rows = cut(torch.tensor([[0.0, torch.log(torch.tensor(3.0)), -INF]]), 1, 2)
    p = torch.tensor([0.25, 0.75])
    torch.testing.assert_close(rows["top"] + rows["log_mass"], torch.tensor([4.0]).log())
    torch.testing.assert_close(rows["entropy"], -(p * p.log()).sum()[None])
    torch.testing.assert_close(rows["self_certainty"], -(2 * p).log().mean()[None])
    assert rows["n_valid"].tolist() == [2.0]
    assert rows["greedy"].tolist() == [1]


def test_all_masked_has_no_mass():
    rows = cut(torch.full((1, 4), -INF), 2)
    assert (rows["top"] + rows["log_mass"]).tolist() == [-INF]
    assert rows["entropy"].isnan().all()


def test_pairs_are_sorted_by_row_and_back():
    rows, target = torch.tensor([2, 0, 2, 7, -1]), torch.arange(5)
    pairs = Pairs.of(target, rows, 3)
    assert pairs.target.tolist() == [4, 1, 0, 2, 3]
    assert pairs.first.tolist() == [1, 2, 2, 4]
    assert pairs.spans(3, 2) == [slice(1, 2), slice(2, 4)]
    x = torch.randn(2, 5)
    assert torch.equal(pairs.unsort(pairs.sort(x)), x)
