"""`linear_logprob` by the vendor's GEMM: the same contract as the other routes, block by block."""

import pytest
import torch

from helpers.oracle import assert_matches_fp64, head_problem, values
from sharpen_kernels import _linear_logprob_op as op
from sharpen_kernels._checks import INTERPRETED
from sharpen_kernels._head import Head, Transform

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1"
)
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def route(monkeypatch, device):
    """Every call takes the vendor's GEMM, in blocks of 4 rows and segments of 128 columns."""
    if device == "cpu" and not INTERPRETED:
        pytest.skip("Triton kernels run on a GPU or under TRITON_INTERPRET=1")
    from sharpen_kernels import _linear_logprob_vendor as vendor

    monkeypatch.setattr(vendor, "BLOCK_R", 4)
    monkeypatch.setattr(vendor, "ALIGN_V", 128)
    monkeypatch.setattr(vendor, "WORKSPACE", 512)
    monkeypatch.setattr(op, "route_of", lambda hidden, head: vendor)
    return vendor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "softcap": 9.0},
        {"vocab_size": 250, "k": 3, "renyi_order": 0.5},
    ],
    ids=str,
)
def test_as_accurate_as_torch(options, dtype, device):
    problem = head_problem(5, 300, 24, S=9, dtype=dtype, device=device, bias=True)
    problem["target"] %= options.get("vocab_size", 300)
    assert_matches_fp64(problem, **options)


@pytest.mark.parametrize(("R", "V", "D"), [(1, 1, 8), (4, 128, 1), (5, 129, 31)])
def test_ragged_shapes(R, V, D, device):
    names = ("logprob", "lse", "entropy", "top1", "rank", "topk_id")
    assert_matches_fp64(head_problem(R, V, D, device=device), names, k=2)


def test_mixed_dtypes(device):
    problem = head_problem(3, 200, 16, device=device)
    problem["hidden"] = problem["hidden"].bfloat16()
    assert_matches_fp64(problem, ("logprob", "entropy"))


def test_masked_columns_are_not_there(device):
    problem = head_problem(5, 300, 16, device=device, bias=True)
    mask = torch.ones(300, dtype=torch.bool, device=device)
    mask[100:270] = False  # a whole segment of 128 among them
    problem["target"] %= 100
    only = problem | {"weight": problem["weight"][mask], "bias": problem["bias"][mask]}
    names = ("logprob", "lse", "entropy", "self_certainty", "margin", "rank", "topk")
    want = values(only, names, softcap=9.0)
    for name, x in values(problem, names, softcap=9.0, vocab_mask=mask).items():
        torch.testing.assert_close(x, want[name], msg=name)


def test_ties_across_segments_go_to_the_lowest_column(device):
    problem = head_problem(1, 300, 16, device=device)
    tied = [7, 130, 290]
    problem["weight"][tied] = 2 * problem["hidden"][0]
    problem |= {"target": torch.tensor(tied, device=device)}
    problem["rows"] = torch.zeros_like(problem["target"])
    got = values(problem, ("is_greedy", "rank", "margin", "topk_id"), k=3)
    assert got["is_greedy"].tolist() == [1.0, 0.0, 0.0]
    assert got["rank"].tolist() == [1.0, 2.0, 3.0]
    assert got["margin"].tolist() == [0.0] * 3
    assert got["topk_id"].tolist() == [tied] * 3


def test_same_bits_in_any_batch_and_with_any_statistic(device):
    problem = head_problem(9, 300, 24, device=device)
    names = ("logprob", "entropy", "self_certainty", "rank", "topk")
    want = values(problem, names)
    for kept in (slice(0, 1), slice(3, 9)):
        part = {name: x[kept] if name in ("hidden", "target") else x for name, x in problem.items()}
        for name, x in values(part, names).items():
            assert torch.equal(x, want[name][kept]), name
    for name in names:
        assert torch.equal(values(problem, (name,))[name], want[name]), name


def test_nan_stays_in_its_row_and_outside_is_nan(device):
    problem = head_problem(6, 200, 16, device=device)
    problem["hidden"][2, 3] = NAN
    problem["target"] = torch.tensor([1, 2, 3, 200, -1, -100], device=device)
    got = values(problem, ("logprob", "entropy", "topk_mean"))
    for name, x in got.items():
        assert x.isnan().tolist() == [False, False, True, True, True, False], name
        assert x[5] == 0


def test_the_workspace_does_not_grow(route, device):
    problem = head_problem(9, 300, 16, device=device)
    head = Head(problem["weight"], None, Transform(1.0, None, 300))
    pairs = op.Pairs.of(problem["target"], None, 9)
    memory = {x.logits.tensors[0].data_ptr() for x in route._blocks(problem["hidden"], head, pairs)}
    assert len(memory) == 1
