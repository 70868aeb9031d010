"""`token_logprob` against fp64, judged beside PyTorch's own fp32: chosen and drawn calls, bits."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from helpers.logit_oracle import assert_matches_fp64, logit_problem, values, values_and_gradient
from helpers.oracle import assert_as_accurate
from sharpen_kernels._checks import INTERPRETED
from sharpen_kernels.stats import NAMES
from sharpen_kernels.token_logprob import token_logprob, token_logprob_reference

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
        "logprob": [0],
        "lse": problem["logits"][0].tolist(),
        "entropy": [0],
        "self_certainty": [0],
        "is_greedy": [1],
        "varentropy": [0],
        "sum_p2": [1],
        "renyi": [1],
        "top1": [0],
        "margin": [math.inf],
        "rank": [1],
        "topk": [0, -math.inf],
        "topk_id": [0, -1],
        "topk_mean": [0],
    }


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
        "logprob": -2 * log2,
        "lse": 2 * log2,
        "entropy": 1.5 * log2,
        "self_certainty": 5 / 3 * log2 - math.log(3),
        "is_greedy": 0.0,
        "varentropy": 0.25 * log2**2,
        "sum_p2": 3 / 8,
        "renyi": 5 / 32,
        "top1": 1,
        "margin": log2,
        "rank": 3.0,
        "topk": [-log2, -2 * log2],
        "topk_id": [1, 0],
        "topk_mean": -1.5 * log2,
    }
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


INF = float("inf")
# those whose value does not hang on the last bit of a logit, which a mask may leave few of
NUMBERS = tuple(name for name in NAMES if name not in ("margin", "topk", "topk_id", "topk_mean"))


@st.composite
def calls(draw):
    """Shapes, options and masks of a call; no row without a column."""
    R, V = draw(st.integers(1, 3)), draw(st.integers(1, 290))
    n_columns = draw(st.integers(1, V))
    options = {
        "vocab_size": n_columns,
        "temperature": draw(st.sampled_from([1.0, 0.3, 2.0])),
        "softcap": draw(st.sampled_from([None, 8.0])),
        "renyi_order": draw(st.sampled_from([0.5, 2.0, 3.0])),
        "stats": tuple(draw(st.sets(st.sampled_from(NUMBERS), min_size=1))),
    }
    kept = draw(st.sets(st.integers(0, n_columns - 1), min_size=1))
    return {
        "R": R,
        "V": V,
        "S": draw(st.integers(1, 4)),
        "seed": draw(st.integers(0, 99)),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16])),
        "mask": draw(st.sampled_from(["none", "logits", "vocab_mask"])),
        "kept": sorted(kept),
        "pad": draw(st.integers(0, 3)),
        "offset": draw(st.sampled_from([0.0, -90.0, 40.0])),
        "options": options,
    }


@settings(
    max_examples=12 if INTERPRETED else 60,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(call=calls())
@pytest.mark.usefixtures("small_tiles")
def test_any_call(call, device):
    torch.manual_seed(call["seed"])
    R, V, kept, options = call["R"], call["V"], call["kept"], dict(call["options"])
    # rows that begin at any address
    problem = logit_problem(R, V + call["pad"], S=call["S"], device=device)
    # a cap makes ties of what is far out
    offset = call["offset"] if options["softcap"] is None else 0.0
    logits = (problem["logits"] + offset).to(call["dtype"])[:, call["pad"] :]
    mask = torch.zeros(V, dtype=torch.bool, device=device)
    mask[kept] = True
    if call["mask"] == "none":
        problem["target"] %= options["vocab_size"]
    else:
        problem["target"] = torch.tensor(kept, device=device)[problem["target"] % len(kept)]
    if call["mask"] == "logits":
        logits = logits.masked_fill(~mask, -INF)
    if call["mask"] == "vocab_mask":
        options["vocab_mask"] = mask
    problem["logits"] = logits
    got = values_and_gradient(token_logprob, problem, **options)
    low = values_and_gradient(token_logprob_reference, problem, dtype=torch.float32, **options)
    truth = values_and_gradient(token_logprob_reference, problem, dtype=torch.float64, **options)
    # one value may be right by luck: two units in the last place of the largest logit are not
    largest = max(1.0, logits[logits.isfinite()].abs().max().item()) / options["temperature"]
    for name, x in got.items():
        finite = truth[name][truth[name].isfinite()].double()
        size = max(1.0, finite.abs().sum().item())
        eps = torch.finfo(x.dtype if x.is_floating_point() else torch.float32).eps
        assert_as_accurate(name, x, low[name], truth[name], floor=2 * eps * largest * size)


# several blocks of rows of `small_tiles`, and ragged; the interpreter is slow
R = 6 if INTERPRETED else 20


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def problem(request, device):
    return logit_problem(R, 300, dtype=request.param, device=device)


def assert_same_bits(got, want):
    for name, x in got.items():
        assert torch.equal(x, want[name]), f"{name}: {(x != want[name]).sum()} values differ"


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("tiles", ["small", "whole"])
def test_same_bits_in_any_batch_at_any_offset(problem, n, tiles, request):
    if tiles == "small":
        request.getfixturevalue("small_tiles")
    whole = values_and_gradient(token_logprob, problem, NAMES[1:2])
    whole |= values(problem)
    for start in {0, R - n}:
        kept = slice(start, start + n)
        part = {name: problem[name][kept] for name in ("logits", "target")} | {"rows": None}
        assert_same_bits(values(part), {name: x[kept] for name, x in whole.items()})


def test_same_bits_of_a_long_row_with_any_threads(device):
    problem = logit_problem(4, 40_000, device=device)
    alone = {name: x[2:3] for name, x in values(problem).items()}
    torch.set_num_threads(2)
    try:
        for kept in (slice(2, 3), slice(1, 4)):
            part = {name: problem[name][kept] for name in ("logits", "target")} | {"rows": None}
            at = 2 - kept.start
            got = {name: x[at : at + 1] for name, x in values(part).items()}
            assert_same_bits(got, alone)
    finally:
        torch.set_num_threads(1)


@pytest.mark.usefixtures("small_tiles")
def test_same_bits_in_any_company_and_order(problem, device):
    want = values(problem)
    order = torch.randperm(R, device=device)
    shuffled = problem | {"rows": order, "target": problem["target"][order]}
    assert_same_bits(values(shuffled), {name: x[order] for name, x in want.items()})
    for other in (0.0, 1e4):
        problem["logits"][:4] = other
        problem["logits"][5:] = -other
        assert_same_bits(
            {name: x[4:5] for name, x in values(problem).items()},
            {name: x[4:5] for name, x in want.items()},
        )


@pytest.mark.usefixtures("small_tiles")
def test_same_bits_with_any_subset_of_statistics(device):
    problem = logit_problem(1, 300, device=device)
    every = values(problem)
    alone = [(name,) for name in NAMES]
    but_one = [tuple(name for name in NAMES if name != left_out) for left_out in NAMES]
    pairs = [] if INTERPRETED else list(itertools.combinations(NAMES, 2))
    for stats in alone + but_one + pairs:
        assert_same_bits(values(problem, stats), every)


@pytest.mark.usefixtures("small_tiles")
def test_same_bits_twice_and_without_padding(problem, device):
    want = values_and_gradient(token_logprob, problem)
    assert_same_bits(values_and_gradient(token_logprob, problem), want)
    wide = torch.cat([problem["logits"], torch.full((R, 84), math.nan, device=device)], dim=1)
    got = values_and_gradient(
        token_logprob, problem | {"logits": wide.to(problem["logits"].dtype)}, vocab_size=300
    )
    assert (got["dlogits"][:, 300:] == 0).all()
    got["dlogits"] = got["dlogits"][:, :300]
    assert_same_bits(got, want)
