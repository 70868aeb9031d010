"""`linear_logprob` against fp64, judged beside PyTorch's own fp32: chosen and drawn calls, bits."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.oracle import (
    DIFFERENTIABLE,
    assert_as_accurate,
    assert_matches_fp64,
    head_problem,
    values,
    values_and_gradients,
)
from sharpen_kernels import _linear_logprob_cpu as native
from sharpen_kernels._checks import INTERPRETED, exact_matmul
from sharpen_kernels.linear_logprob import linear_logprob, linear_logprob_reference
from sharpen_kernels.stats import NAMES

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# one of everything; ragged against every tile; a block of rows and one more; whole tiles;
# a segment of 4096 columns and a ragged second one; on fewer rows PyTorch's largest error is luck
SHAPES = [(1, 1, 1), (13, 31, 7), (65, 129, 33), (128, 64, 64), (20, 4225, 24)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("R", "V", "D"), SHAPES)
def test_as_accurate_as_torch(R, V, D, dtype, device):
    assert_matches_fp64(head_problem(R, V, D, dtype=dtype, device=device))


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter runs the GPU's kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("R", "V", "D"), [(65, 129, 33), (20, 4225, 24)])
def test_as_accurate_as_torch_where_the_cpu_has_no_kernel(R, V, D, dtype, monkeypatch):
    monkeypatch.setattr(native, "takes", lambda hidden, head: False)
    problem = head_problem(R, V, D, S=2 * R, dtype=dtype, bias=True)
    assert_matches_fp64(problem, softcap=9.0, temperature=0.8)


@pytest.mark.parametrize("V", [32_001, 151_665])
def test_vocabulary_of_a_real_model(V, device):
    # Llama 2 with a padding token; Qwen 2.5 without the padding of its head
    assert_matches_fp64(head_problem(2, V, 16, device=device))


@pytest.mark.parametrize("D", [31, 127, 129, 255, 257, 1000])
def test_ragged_depth(D, device):
    assert_matches_fp64(head_problem(64, 65, D, dtype=torch.bfloat16, device=device))


@pytest.mark.usefixtures("small_segments")
def test_rank_counts_what_a_sort_would(device):
    problem = head_problem(1, 300, 8, device=device)
    problem["weight"] = torch.randint(-1, 2, (300, 8), device=device).float()  # many ties
    problem["hidden"][:] = 1.0
    z = problem["hidden"] @ problem["weight"].T
    order = z[0].sort(descending=True, stable=True).indices
    problem |= {"target": order, "rows": torch.zeros_like(order)}
    got = values(problem, ("rank", "is_greedy", "topk_id"), k=32)
    assert got["rank"].tolist() == [float(i) for i in range(1, 301)]
    assert torch.equal(got["is_greedy"], (got["rank"] == 1).float())
    assert torch.equal(got["topk_id"][7], order[:32])


@pytest.mark.parametrize("stat", NAMES)
def test_each_statistic_alone(stat, device):
    assert_matches_fp64(head_problem(6, 70, 20, device=device, bias=True), stats=(stat,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("small_segments")
def test_many_segments(dtype, device):
    assert_matches_fp64(head_problem(5, 700, 40, dtype=dtype, device=device, bias=True))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"softcap": 5.0},
        {"temperature": 2.5, "softcap": 30.0},
        {"vocab_size": 150},
        {"vocab_size": 65, "temperature": 1e3, "softcap": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_options(options, bias, device):
    problem = head_problem(9, 200, 48, device=device, bias=bias)
    problem["target"] %= options.get("vocab_size", 200)
    assert_matches_fp64(problem, **options)


def test_order_is_bias_softcap_temperature(device):
    problem = {
        "hidden": torch.ones(1, 1, device=device),
        "weight": torch.tensor([[1.0], [2.0]], device=device),
        "bias": torch.tensor([3.0, 0.0], device=device),
        "target": torch.tensor([0], device=device),
    }
    got = values(problem, ("logprob",), softcap=5.0, temperature=2.0)
    z = 5 * torch.tanh(torch.tensor([4.0, 2.0]) / 5) / 2
    torch.testing.assert_close(got["logprob"].cpu(), z.log_softmax(0)[:1])


@pytest.mark.parametrize("S", [1, 40, 200])
@pytest.mark.usefixtures("small_segments")
def test_rows_in_any_order_with_repeats(S, device):
    problem = head_problem(70, 300, 24, S=S, device=device, bias=True)
    assert_matches_fp64(problem)


def test_row_with_no_pair_gets_no_gradient(device):
    problem = head_problem(4, 50, 8, S=6, device=device)
    problem["rows"] = torch.tensor([3, 0, 0, 3, 0, 1], device=device)
    got = assert_matches_fp64(problem, stats=DIFFERENTIABLE)
    assert (got["dhidden"][2] == 0).all()


def test_rows_equal_gathered_hidden(device):
    problem = head_problem(5, 90, 16, S=12, device=device)
    gathered = problem | {"hidden": problem["hidden"][problem["rows"]], "rows": None}
    want = values(gathered)
    for name, x in values(problem).items():
        assert torch.equal(x, want[name]), name


def test_mixed_dtypes_multiply_in_the_wider(device):
    problem = head_problem(5, 90, 16, device=device, bias=True)
    problem["hidden"] = problem["hidden"].to(torch.bfloat16)
    assert_matches_fp64(problem)


def test_fp64_in_fp64_out(device):
    problem = head_problem(5, 90, 16, S=11, device=device, bias=True)
    problem |= {name: problem[name].double() for name in ("hidden", "weight", "bias")}
    got = assert_matches_fp64(problem, softcap=10.0)
    ids = {"top1", "topk_id"}
    assert {x.dtype for name, x in got.items() if name not in ids} == {torch.float64}
    assert {got[name].dtype for name in ids} == {torch.int64}


def test_hand_worked_uniform_row(device):
    V = 8
    problem = head_problem(1, V, 4, device=device)
    problem["hidden"][:] = 0
    problem["target"][:] = 3
    found = values(problem, k=V)
    ids, topk = found.pop("topk_id"), found.pop("topk")
    got = {name: x.item() for name, x in found.items()}
    assert got["logprob"] == pytest.approx(-math.log(V))
    assert got["lse"] == pytest.approx(math.log(V))
    assert got["entropy"] == pytest.approx(math.log(V))
    assert got["self_certainty"] == pytest.approx(0, abs=1e-6)
    assert got["sum_p2"] == got["renyi"] == pytest.approx(1 / V)
    assert got["varentropy"] == pytest.approx(0, abs=1e-6)
    assert got["margin"] == 0.0
    # all tie: the lowest column is first
    assert got["is_greedy"] == got["top1"] == 0.0
    assert got["rank"] == 4.0
    assert ids.tolist() == [list(range(V))]
    assert topk.tolist() == [[got["logprob"]] * V]
    assert got["topk_mean"] == pytest.approx(-math.log(V))


@pytest.mark.usefixtures("small_segments")
def test_greedy_ties_go_to_the_lowest_column(device):
    problem = head_problem(1, 400, 8, device=device)
    tied = [130, 140, 300]  # within a tile, and across segments
    problem["weight"][tied] = 9 * problem["hidden"][0]
    problem["rows"] = torch.zeros(4, dtype=torch.int64, device=device)
    problem["target"] = torch.tensor([*tied, 0], device=device)
    got = values(problem, k=5)
    assert got["is_greedy"].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert got["top1"].tolist() == [130] * 4
    assert got["margin"].tolist() == [0.0] * 4
    assert got["rank"][:3].tolist() == [1.0, 2.0, 3.0]
    assert got["topk_id"][0, :3].tolist() == tied


def test_gradient_reaches_only_what_asks(device):
    problem = head_problem(4, 60, 8, device=device, bias=True)
    problem["weight"].requires_grad_()
    values(problem)["logprob"].sum().backward()
    assert problem["weight"].grad is not None
    assert problem["hidden"].grad is None
    assert problem["bias"].grad is None


def test_only_the_differentiable_carry_a_gradient(device):
    problem = head_problem(4, 60, 8, device=device)
    problem["hidden"].requires_grad_()
    got = values(problem)
    assert {name for name, x in got.items() if x.requires_grad} == set(DIFFERENTIABLE)


def test_tied_weight_adds_both_gradients(device):
    problem = head_problem(4, 60, 8, device=device)
    tokens = torch.tensor([5, 6, 7, 5], device=device)

    def gradient(fn, dtype):
        tied = problem["weight"].to(dtype).requires_grad_()
        x = torch.nn.functional.embedding(tokens, tied)
        found = values(problem | {"hidden": x, "weight": tied}, ("logprob",), fn=fn)
        return torch.autograd.grad(found["logprob"].sum(), tied)[0]

    got = gradient(linear_logprob, torch.float32)
    low = gradient(linear_logprob_reference, torch.float32)
    truth = gradient(linear_logprob_reference, torch.float64)
    assert_as_accurate("dtied", got, low, truth)


# the interpreter takes a second where a kernel takes microseconds
EXAMPLES = 12 if INTERPRETED else 60
fixed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def calls(draw, dtypes=(torch.float32, torch.float16, torch.bfloat16)):
    """Arguments of `head_problem`, then options of the op."""
    V = draw(st.integers(1, 300))
    sizes = {"R": draw(st.integers(1, 140)), "V": V, "D": draw(st.integers(1, 70))}
    sizes["S"] = draw(st.none() | st.integers(1, 30))
    sizes |= {"dtype": draw(st.sampled_from(dtypes)), "bias": draw(st.booleans())}
    options = {
        "temperature": draw(st.sampled_from([1.0, 0.3, 4.0])),
        "softcap": draw(st.sampled_from([None, 3.0, 30.0])),
        "vocab_size": draw(st.none() | st.integers(1, V)),
        "renyi_order": draw(st.sampled_from([2.0, 0.5, 4.0])),
        "k": draw(st.integers(1, 32)),
    }
    return sizes, options, draw(st.sampled_from([0.0, 0.1, 0.9])), draw(st.integers(0, 2**31))


@given(call=calls())
@fixed
@pytest.mark.usefixtures("small_segments")
def test_any_call_is_as_accurate_as_torch(device, call):
    sizes, options, share_masked, seed = call
    torch.manual_seed(seed)
    problem = head_problem(**sizes, device=device)
    S, n_columns = len(problem["target"]), options["vocab_size"] or sizes["V"]
    problem["target"] %= n_columns
    odd = torch.rand(S, device=device)
    problem["target"][odd < 0.1] = -100
    problem["target"][odd > 0.95] = n_columns
    if share_masked:
        mask = torch.rand(sizes["V"], device=device) > share_masked
        mask[torch.randint(n_columns, ())] = True
        options = options | {"vocab_mask": mask}
    # a wrong formula or column is off by thousands of these
    assert_matches_fp64(problem, ulps=8, **options)


@given(call=calls(dtypes=(torch.float32, torch.bfloat16)), data=st.data())
@fixed
@pytest.mark.usefixtures("small_segments")
def test_any_part_of_a_batch_has_the_bits_of_the_whole(device, call, data):
    sizes, options, _, seed = call
    torch.manual_seed(seed)
    problem = head_problem(**sizes | {"S": None}, device=device)
    stats = tuple(data.draw(st.sets(st.sampled_from(NAMES), min_size=1)))
    start = data.draw(st.integers(0, sizes["R"] - 1))
    stop = data.draw(st.integers(start + 1, sizes["R"]))
    part = problem | {name: problem[name][start:stop] for name in ("hidden", "target")}
    whole = values(problem, **options)
    for name, x in values(part, stats, **options).items():
        assert torch.equal(x.nan_to_num(), whole[name][start:stop].nan_to_num()), name


ANY_DTYPE = [torch.float32, torch.bfloat16]
R = 1030  # more than a block of rows on every route, and ragged


@pytest.fixture(params=ANY_DTYPE, ids=str)
def problem(request, device):
    # 40 is no multiple of a tile
    return head_problem(R, 300, 40, dtype=request.param, device=device, bias=True)


def rows_of(problem, start, stop):
    return problem | {name: problem[name][start:stop] for name in ("hidden", "target")}


def assert_same_bits(got, want):
    for name, x in got.items():
        assert torch.equal(x, want[name]), f"{name}: {(x != want[name]).sum()} values differ"


@pytest.mark.parametrize("n", [1, 7, 128, 1000])
@pytest.mark.usefixtures("small_segments")
def test_any_batch_at_any_offset(problem, n):
    whole = values(problem)
    for start in (0, min(63, R - n), R - n):
        part = values(rows_of(problem, start, start + n))
        assert_same_bits(part, {name: x[start : start + n] for name, x in whole.items()})


@pytest.mark.usefixtures("small_segments")
def test_any_company_of_rows(problem):
    alone = values(rows_of(problem, 5, 6))
    for other in (0.0, 1e4):
        problem["hidden"][:5] = other
        problem["hidden"][6:] = -other
        assert_same_bits({name: x[5:6] for name, x in values(problem).items()}, alone)


@pytest.mark.usefixtures("small_segments")
def test_any_order_of_pairs(problem, device):
    order = torch.randperm(R, device=device)
    shuffled = problem | {"rows": order, "target": problem["target"][order]}
    assert_same_bits(values(shuffled), {name: x[order] for name, x in values(problem).items()})


@pytest.mark.usefixtures("small_segments")
def test_any_subset_of_statistics(device):
    problem = head_problem(5, 140, 40, device=device)
    every = values(problem)
    for n in (1, 2, len(NAMES) - 1):
        for stats in itertools.combinations(NAMES, n):
            assert_same_bits(values(problem, stats), every)


@pytest.mark.usefixtures("small_segments")
def test_twice(problem):
    assert_same_bits(
        values_and_gradients(linear_logprob, problem), values_and_gradients(linear_logprob, problem)
    )


def test_padding_of_the_vocabulary(device):
    problem = head_problem(9, 300, 40, device=device)
    wide = problem | {"weight": torch.cat([problem["weight"], torch.randn(84, 40, device=device)])}
    assert_same_bits(values(wide, vocab_size=300), values(problem))


def test_products_stay_exact_under_autocast(device):
    x = torch.randn(3, 3, device=device)
    with torch.autocast(device, torch.bfloat16), exact_matmul(torch.device(device)):
        assert (x @ x).dtype == torch.float32


def test_whatever_the_precision_settings_say(device):
    problem = head_problem(70, 300, 40, device=device)
    want = values_and_gradients(linear_logprob, problem)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast(device, torch.bfloat16):
            got = values_and_gradients(linear_logprob, problem)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert_same_bits(got, want)
