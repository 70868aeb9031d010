"""The k best columns of `token_logprob`: exactly those of a stable sort, wherever they lie."""

import pytest
import torch

from helpers.logit_oracle import logit_problem, values
from sharpen_kernels.token_logprob import token_logprob_reference

INF = float("inf")
LISTS = ("topk", "topk_id", "topk_mean", "top1")


def assert_as_a_sort_finds_them(logits, k, **options):
    """Ids are those of a stable sort, log-probabilities those of the logits there."""
    problem = {"logits": logits, "rows": None}
    problem["target"] = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
    got = values(problem, (*LISTS, "lse"), k=k, **options)
    want = values(problem, LISTS, fn=token_logprob_reference, k=k, **options)
    assert torch.equal(got["topk_id"], want["topk_id"])
    assert torch.equal(got["topk_id"][:, 0], got["top1"])
    torch.testing.assert_close(got["topk"], want["topk"])
    torch.testing.assert_close(got["topk_mean"], want["topk_mean"])
    return got


# one run of columns, an edge of runs, of tiles and of segments; k above and below V
@pytest.mark.parametrize(("V", "k"), [(1, 32), (31, 32), (33, 1), (33, 32), (129, 20), (300, 3)])
@pytest.mark.usefixtures("small_tiles")
def test_any_size(V, k, device):
    assert_as_a_sort_finds_them(torch.randn(5, V, device=device), k)


@pytest.mark.parametrize("distinct", [1, 2, 9])
@pytest.mark.usefixtures("small_tiles")
def test_of_a_tie_the_lowest_columns_come_first(distinct, device):
    logits = torch.randint(distinct, (4, 300), device=device).float() - distinct // 2
    logits[logits == 0] *= -1.0  # -0 ties with 0
    logits[:, ::7] = 0.0
    assert_as_a_sort_finds_them(logits, 32)


@pytest.mark.usefixtures("small_tiles")
def test_a_tie_is_not_won_by_a_larger_neighbour(device):
    logits = torch.zeros(1, 300, device=device)
    logits[0, [290, 200, 130]] = torch.tensor([3.0, 2.0, 1.0], device=device)
    got = assert_as_a_sort_finds_them(logits, 6)
    assert got["topk_id"].tolist() == [[290, 200, 130, 0, 1, 2]]


@pytest.mark.parametrize("at", [range(20), range(131, 151), range(0, 300, 15), range(280, 300)])
@pytest.mark.usefixtures("small_tiles")
def test_wherever_they_lie(at, device):
    logits = torch.randn(2, 300, device=device) - 50
    logits[:, list(at)] += 100
    assert_as_a_sort_finds_them(logits, 20)


@pytest.mark.parametrize("how", ["logits", "vocab_mask"])
@pytest.mark.usefixtures("small_tiles")
def test_fewer_columns_than_asked_for(how, device):
    logits = torch.randn(2, 300, device=device)
    mask = torch.zeros(300, dtype=torch.bool, device=device)
    mask[[5, 200, 299]] = True
    options = {"vocab_mask": mask}
    if how == "logits":
        logits, options = logits.masked_fill(~mask, -INF), {}
    got = assert_as_a_sort_finds_them(logits, 5, **options)
    assert (got["topk_id"] == -1).sum(1).tolist() == [2, 2]
    assert got["topk"].isneginf().sum(1).tolist() == [2, 2]


@pytest.mark.usefixtures("small_tiles")
def test_of_the_logits_that_enter_the_distribution(device):
    logits = 9 * torch.randn(3, 300, device=device)
    options = {"softcap": 20.0, "temperature": 0.7, "vocab_size": 290}
    got = assert_as_a_sort_finds_them(logits, 8, **options)
    problem = {"logits": logits, "target": got["topk_id"][:, 0], "rows": None}
    found = values(problem, ("logprob",), **options)
    assert torch.equal(found["logprob"], got["topk"][:, 0])


@pytest.mark.usefixtures("small_tiles")
def test_asking_for_them_changes_no_other_bits(device):
    problem = logit_problem(4, 300, device=device)
    names = ("logprob", "entropy", "self_certainty", "margin", "rank")
    want = values(problem, names)
    got = values(problem, (*names, "topk"), k=3)
    for name in names:
        assert torch.equal(got[name], want[name]), name
    assert torch.equal(got["topk"], values(problem, ("topk",), k=9)["topk"][:, :3])
    one = {name: x[2:3] for name, x in problem.items() if x is not None} | {"rows": None}
    assert torch.equal(got["topk"][2:3], values(one, ("topk",), k=3)["topk"])
