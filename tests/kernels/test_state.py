"""The merge law: partials of any cut of the columns give the statistics of the whole."""

import itertools

import pytest
import torch

from sharpen_kernels._state import Pairs, finish, largest, merge, partial
from sharpen_kernels.stats import NAMES, Wanted

INF = float("inf")


def cut(z, *edges, order=2.0):
    wanted = Wanted(NAMES, order, 4)
    edges = [0, *edges, z.shape[1]]
    parts = [partial(z[:, a:b].clone(), a, wanted) for a, b in itertools.pairwise(edges)]
    whole = parts[0]
    for part in parts[1:]:
        whole = merge(whole, part, order)
    return finish(whole, order)._asdict()


@pytest.mark.parametrize("order", [0.3, 3.0])
@pytest.mark.parametrize("edges", [(1,), (5,), (9,), (3, 4, 8)], ids=str)
@pytest.mark.parametrize("masked", [(), (0,), (0, 1, 2, 3, 4), (9,), tuple(range(1, 10))], ids=str)
def test_any_cut_gives_the_whole(edges, masked, order):
    z = 3 * torch.randn(6, 10, dtype=torch.float64)
    z[:, list(masked)] = -INF
    got, want = cut(z, *edges, order=order), cut(z, order=order)
    for name, x in got.items():
        torch.testing.assert_close(x, want[name], msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_largest_are_those_of_a_stable_sort(dtype):
    z = torch.randint(-3, 4, (50, 40)).to(dtype) / 2  # many ties
    z[z == 0] *= -1.0  # -0 ties with 0
    z[:, ::7] = 0.0
    z[:, 5:9] = -INF
    values, columns = largest(z, 12)
    want, order = z.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, want[:, :12])
    assert torch.equal(columns, order[:, :12])


def test_hand_worked():
    rows = cut(torch.tensor([[0.0, torch.log(torch.tensor(3.0)), -INF]]), 1, 2)
    p = torch.tensor([0.25, 0.75])
    torch.testing.assert_close(rows["top"] + rows["log_mass"], torch.tensor([4.0]).log())
    torch.testing.assert_close(rows["entropy"], -(p * p.log()).sum()[None])
    torch.testing.assert_close(rows["self_certainty"], -(2 * p).log().mean()[None])
    assert rows["n_valid"].tolist() == [2.0]
    assert rows["top1"].tolist() == [1]
    assert rows["topk_id"].tolist() == [[1, 0, -1, -1]]
    torch.testing.assert_close(rows["topk"][0, :2], torch.tensor([0.75, 0.25]).log())
    torch.testing.assert_close(rows["topk_mean"], p.log().mean()[None])
    torch.testing.assert_close(rows["sum_p2"], torch.tensor([0.625]))
    torch.testing.assert_close(rows["renyi"], torch.tensor([0.625]))


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
    assert torch.equal(pairs.unsort(pairs.sort(x).T).T, x)
