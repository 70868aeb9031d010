"""Values and gradients of `token_logprob`, judged beside PyTorch's own fp32."""

import math

import pytest
import torch

from logit_oracle import assert_matches_fp64, logit_problem, values
from sharpen_kernels._checks import INTERPRETED
from sharpen_kernels.stats import NAMES

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# a pair; ragged; a power of two on both sides; a whole tile and one more; Llama 2 with a token more
VOCABS = [2, 31, 127, 129, 1000, 4097, 32_001]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", VOCABS)
def test_as_accurate_as_torch(V, dtype, device):
    assert_matches_fp64(logit_problem(3, V, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_column_is_certain(dtype, device):
    problem = logit_problem(1, 1, dtype=dtype, device=device)
    got = {name: x.flatten().tolist() for name, x in values(problem, k=2).items()}
    assert got == {
        "logprob": [0], "lse": problem["logits"][0].tolist(), "entropy": [0],
        "self_certainty": [0], "is_greedy": [1], "varentropy": [0], "sum_p2": [1], "renyi": [1],
        "top1": [0], "margin": [math.inf], "rank": [1], "topk": [0, -math.inf],
        "topk_id": [0, -1], "topk_mean": [0],
    }  # fmt: skip


def test_vocabulary_of_qwen_2_5(device):
    assert_matches_fp64(logit_problem(2, 151_665, device=device))


@pytest.mark.parametrize("stat", NAMES)
def test_each_statistic_alone(stat, device):
    assert_matches_fp64(logit_problem(6, 70, device=device), stats=(stat,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"softcap": 5.0},
        {"temperature": 2.5, "softcap": 30.0},
        {"vocab_size": 250},
        {"vocab_size": 65, "temperature": 1e3, "softcap": 1.0},
        {"renyi_order": 0.5, "k": 3},
    ],
    ids=str,
)
@pytest.mark.usefixtures("small_tiles")
def test_options_over_many_tiles(options, dtype, device):
    problem = logit_problem(5, 300, S=9, dtype=dtype, device=device)
    problem["target"] %= options.get("vocab_size", 300)
    assert_matches_fp64(problem, **options)


def test_order_is_softcap_temperature_mask(device):
    problem = {"logits": torch.tensor([[4.0, 2.0, 9.0]], device=device), "rows": None}
    problem["target"] = torch.tensor([0], device=device)
    mask = torch.tensor([True, True, False], device=device)
    got = values(problem, ("logprob",), softcap=5.0, temperature=2.0, vocab_mask=mask)
    z = 5 * torch.tanh(torch.tensor([4.0, 2.0]) / 5) / 2
    torch.testing.assert_close(got["logprob"].cpu(), z.log_softmax(0)[:1])


def test_hand_worked(device):
    # p = 1/2, 1/4, 1/4: -log p is log 2 or 2 log 2
    problem = {"logits": torch.tensor([[0.0, math.log(2), 0.0]], device=device)}
    problem |= {"target": torch.tensor([2], device=device), "rows": None}
    log2 = math.log(2)
    want = {
        "logprob": -2 * log2, "lse": 2 * log2, "entropy": 1.5 * log2,
        "self_certainty": 5 / 3 * log2 - math.log(3), "is_greedy": 0.0,
        "varentropy": 0.25 * log2**2, "sum_p2": 3 / 8, "renyi": 5 / 32, "top1": 1, "margin": log2,
        "rank": 3.0, "topk": [-log2, -2 * log2], "topk_id": [1, 0], "topk_mean": -1.5 * log2,
    }  # fmt: skip
    for name, x in values(problem, renyi_order=3.0, k=2).items():
        assert x.squeeze().tolist() == pytest.approx(want[name], abs=2e-7), name


@pytest.mark.usefixtures("small_tiles")
def test_ties_go_to_the_lowest_column(device):
    logits = torch.randn(1, 400, device=device)
    tied = [130, 140, 300]  # within a tile, and across segments and tiles
    logits[0, tied] = 9.0
    target = torch.tensor([*tied, 0], device=device)
    rows = torch.zeros_like(target)
    got = values({"logits": logits, "target": target, "rows": rows})
    assert got["is_greedy"].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert got["top1"].tolist() == [130] * 4
    assert got["margin"].tolist() == [0.0] * 4
    assert got["rank"][:3].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.usefixtures("small_tiles")
def test_rank_counts_what_a_sort_would(device):
    logits = torch.randint(9, (1, 300), device=device).float()  # many ties
    place = torch.arange(0, 300, 11, device=device)
    target = logits[0].sort(descending=True, stable=True).indices[place]
    call = {"logits": logits, "target": target, "rows": torch.zeros_like(target)}
    got = values(call, ("rank", "is_greedy"))
    assert torch.equal(got["rank"], place + 1.0)
    assert torch.equal(got["is_greedy"], (got["rank"] == 1).float())


@pytest.mark.usefixtures("small_tiles")
def test_masked_columns_are_ahead_of_no_target(device):
    logits = torch.randn(1, 300, device=device)
    logits[0, [3, 140, 290]] = -math.inf
    target = torch.tensor([290, 140, 4], device=device)
    call = {"logits": logits, "target": target, "rows": torch.zeros_like(target)}
    want = 1.0 + (logits[0] > logits[0, 4]).sum().item()
    assert values(call, ("rank",))["rank"].tolist() == [298.0, 298.0, want]


def test_pairs_read_nothing_outside_rows_and_columns(device):
    if not (INTERPRETED or device == "cuda"):
        pytest.skip("a kernel's own guard: needs a GPU or TRITON_INTERPRET=1")
    from sharpen_kernels._head import Transform
    from sharpen_kernels._token_logprob_triton import Reading, ahead, put_chosen

    x = Reading(torch.randn(4, 50, device=device)[1:3], Transform(1.0, None, 50, None))
    row = torch.tensor([-1, 0, 2], device=device)
    low = torch.full((3,), -1e9, device=device)
    assert ahead(x, row, torch.zeros_like(row), 0, low).tolist() == [0, 50, 0]
    row = torch.tensor([-1, 0, 2, 1, 1], device=device)
    target = torch.tensor([10, 17, 10, 60, 9], device=device)
    chosen = torch.full((5,), math.nan, device=device)
    put_chosen(x, row, target, 10, chosen)
    assert chosen[1] == x.tensors[0][0, 7]
    assert chosen.isnan().tolist() == [True, False, True, True, True]


def test_top1_is_an_exact_id(device):
    got = values(logit_problem(4, 60, device=device), ("top1",))
    assert got["top1"].dtype == torch.int64
    assert not got["top1"].requires_grad


def test_varentropy_of_a_nearly_uniform_row(device):
    problem = logit_problem(2, 5000, device=device)
    problem["logits"] = problem["logits"] / 3e3 - 40
    problem["logits"][:, 7] += 6
    assert_matches_fp64(problem, ("varentropy", "entropy"))


def test_rows_equal_gathered_logits(device):
    problem = logit_problem(5, 90, S=12, device=device)
    gathered = problem | {"logits": problem["logits"][problem["rows"]], "rows": None}
    want = values(gathered)
    for name, x in values(problem).items():
        assert torch.equal(x, want[name]), name


def test_fp64_in_fp64_out(device):
    problem = logit_problem(5, 90, S=11, device=device)
    problem["logits"] = problem["logits"].double()
    got = assert_matches_fp64(problem, softcap=10.0)
    ids = {name for name, x in got.items() if x.dtype == torch.int64}
    assert ids == {"top1", "topk_id"}
    assert {x.dtype for name, x in got.items() if name not in ids} == {torch.float64}


def test_gradient_keeps_the_dtype_and_the_rest_carries_none(device):
    problem = logit_problem(4, 60, dtype=torch.bfloat16, device=device)
    leaf = problem["logits"].requires_grad_()
    got = values(problem)
    asks = {name for name, x in got.items() if x.requires_grad}
    assert asks == {"logprob", "lse", "entropy", "self_certainty"}
    got["logprob"].sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.bfloat16
