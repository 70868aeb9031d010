"""The C++ route: which tensors take it, its values, its bits."""

import pytest
import torch

from helpers.oracle import assert_matches_fp64, head_problem, values, values_and_gradients
from sharpen_kernels import _cpu_library, linear_logprob
from sharpen_kernels import _linear_logprob_cpu as native
from sharpen_kernels._checks import INTERPRETED
from sharpen_kernels._head import Head, Transform
from sharpen_kernels.linear_logprob import linear_logprob_reference
from sharpen_kernels.stats import DIFFERENTIABLE, NAMES

needs_library = pytest.mark.skipif(
    INTERPRETED or _cpu_library.load() is None,
    reason="the C++ kernel is not used here: no compiler, no AVX2, or Triton's interpreter",
)
PRODUCTS = {
    "AMX": [torch.float32, torch.bfloat16, torch.float16],
    "ONEDNN": [torch.float32, torch.bfloat16],
    "FMA": [torch.float32, torch.bfloat16, torch.float16],
}


@pytest.fixture(
    params=[(kind, dtype) for kind, dtypes in PRODUCTS.items() for dtype in dtypes],
    ids=lambda p: f"{p[0]}-{p[1]}",
)
def dtype(request, monkeypatch):
    """Each dtype, multiplied by each kind of product that takes it."""
    name, dtype = request.param
    kind = getattr(_cpu_library, name)
    library = _cpu_library.load()
    assert library is not None
    if kind > library.products:
        pytest.skip(f"no products by {name} on this CPU")
    monkeypatch.setattr(library, "products", kind)
    return dtype


def same(got, want):
    return all(torch.equal(x, want[name]) for name, x in got.items())


@needs_library
def test_as_accurate_as_torch_on_a_large_vocabulary(dtype):
    assert_matches_fp64(head_problem(70, 20_000, 48, dtype=dtype, bias=True))


@needs_library
# several chunks of the depth, ragged ones, several blocks of the depth
@pytest.mark.parametrize("D", [600, 257, 1057])
def test_waves_passes_and_chunks(dtype, D, small_segments):
    assert_matches_fp64(head_problem(140, 200, D, dtype=dtype, bias=True), softcap=8.0)


@needs_library
def test_more_rows_than_one_task_of_backward_adds_up(dtype):
    problem = head_problem(1100, 130, 24, dtype=dtype, bias=True)
    problem["target"][100:300] = -100  # whole blocks of rows that no gradient reaches
    got = assert_matches_fp64(problem, DIFFERENTIABLE)
    assert (got["dhidden"][100:300] == 0).all()


@needs_library
def test_ignored_row_of_nan_leaves_gradients_clean(dtype):
    problem = head_problem(70, 130, 24, dtype=dtype, bias=True)
    problem["target"][::3] = -100
    want = values_and_gradients(linear_logprob, problem)
    problem["hidden"][::3] = float("nan")
    assert same(values_and_gradients(linear_logprob, problem), want)


@needs_library
@pytest.mark.parametrize(
    "options",
    [
        {"vocab_size": 130},
        {"softcap": 8.0, "temperature": 0.7, "renyi_order": 0.5},
        {"vocab_size": 390, "softcap": 8.0, "temperature": 1.3, "k": 32, "renyi_order": 3.0},
    ],
    ids=str,
)
@pytest.mark.usefixtures("small_segments")
def test_options_and_a_mask_over_pairs_of_few_rows(dtype, options):
    problem = head_problem(70, 400, 40, S=150, dtype=dtype, bias=True)
    V = options.get("vocab_size", 400)
    problem["target"] %= V
    mask = torch.rand(400) < 0.4
    mask[64:128] = False  # a segment
    mask[problem["target"]] = True
    got = assert_matches_fp64(problem, vocab_mask=mask, **options)
    for name in ("dweight", "dbias"):
        assert (got[name][:V][~mask[:V]] == 0).all()
        assert (got[name][V:] == 0).all()


@needs_library
@pytest.mark.parametrize("V", [5, 300, 1500])
def test_ties_of_whole_numbers(dtype, V):
    # exact in any precision, and hundreds of columns share a value; a row with many pairs
    problem = head_problem(70, V, 6, S=300, dtype=dtype)
    problem["hidden"] = torch.randint(-2, 3, (70, 6)).to(dtype)
    problem["weight"] = torch.randint(-1, 2, (V, 6)).to(dtype)
    problem["rows"][100:] = 3
    mask = torch.rand(V) < 0.9
    mask[0] = True
    for k in (1, 20, 32):
        found = values(problem, NAMES, vocab_mask=mask, k=k)
        exact = problem | {name: problem[name].double() for name in ("hidden", "weight")}
        want = values(exact, NAMES, fn=linear_logprob_reference, vocab_mask=mask, k=k)
        for name in ("is_greedy", "top1", "topk_id", "rank", "margin"):
            assert torch.equal(found[name].double(), want[name].double()), name
        torch.testing.assert_close(found["topk"], want["topk"].float())


@needs_library
@pytest.mark.usefixtures("small_segments")
def test_segments_far_apart(dtype):
    problem = head_problem(9, 400, 16, dtype=dtype, bias=True)
    steps = torch.tensor([0.0, -3000.0, 60.0, -1e4, 5.0, 60.0, -80.0])
    problem["bias"] += steps.repeat_interleave(64)[:400].to(dtype)
    assert_matches_fp64(problem, renyi_order=0.01)


@needs_library
@pytest.mark.parametrize("D", [15, 300, 1100])
def test_same_bits_with_any_number_of_threads(dtype, D):
    problem = head_problem(150, 1500, D, dtype=dtype, bias=True)
    want = values_and_gradients(linear_logprob, problem)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        try:
            assert same(values_and_gradients(linear_logprob, problem), want)
        finally:
            torch.set_num_threads(1)


@needs_library
def test_near_certain_row_has_a_clean_gradient(dtype):
    # p of the target is all but 1: the gradient is 1 - p, which only the same logits can give
    problem = head_problem(64, 300, 32, dtype=dtype)
    problem["weight"][:64] = 3 * problem["hidden"]
    problem["target"] = torch.arange(64)
    got = assert_matches_fp64(problem, stats=("logprob",))
    certain = got["logprob"] == 0
    assert certain.sum() > 20
    assert got["dhidden"][certain].abs().max() < 1e-5


@needs_library
@pytest.mark.parametrize("large", ["hidden", "weight"])
def test_bf16_gradient_that_cancels(large):
    # 300 terms of 64 / 300 against one of -64: p rounded to bf16 would leave 0.1 of what is 0
    problem = head_problem(300, 300, 8, dtype=torch.bfloat16)
    problem["hidden"][:] = problem["weight"][:] = 0
    problem[large][:] = 64
    problem["target"] = torch.arange(300)
    leaf = problem["weight" if large == "hidden" else "hidden"].requires_grad_()
    linear_logprob(**problem).logprob.sum().backward()
    assert leaf.grad.abs().max() < 2e-3


@needs_library
def test_same_bits_from_strided_rows(dtype):
    problem = head_problem(70, 300, 40, dtype=dtype)
    want = values(problem)
    for name in ("hidden", "weight"):
        x = problem[name]
        wide = torch.cat([x, torch.full_like(x, float("nan"))], dim=1)
        assert same(values(problem | {name: wide[:, :40]}), want)


@needs_library
@pytest.mark.parametrize("name", ["PARTIALS_BYTES", "HIDDEN_BYTES", "MIN_CHUNK"])
def test_same_bits_in_any_passes_and_chunks_of_rows(dtype, name, monkeypatch):
    problem = head_problem(300, 700, 40, dtype=dtype)
    want = values(problem)
    monkeypatch.setattr(native, name, 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert same(values(problem), want)


@needs_library
def test_a_bias_that_is_a_negative_view():
    problem = head_problem(5, 90, 8, bias=True)
    view = problem | {"bias": torch._neg_view(-problem["bias"])}
    assert same(values(view), values(problem))


@needs_library
def test_takes_what_it_multiplies_as_it_is(monkeypatch):
    x, w = torch.zeros(3, 8), torch.zeros(9, 8)

    def takes(x, w):
        return native.takes(x, Head(w, None, Transform(1.0, None, 9)))

    assert takes(x, w)
    assert takes(x.bfloat16(), w.bfloat16())
    assert takes(x[:, :4], w[::2, :4])
    assert takes(x.half(), w.half())
    assert not takes(x.double(), w.double())
    assert not takes(x.bfloat16(), w)
    assert not takes(x, torch.zeros(8, 9).T)
    assert not takes(torch.zeros(8, 3).T, w)
    assert not takes(x[:, :0], w[:, :0])
    assert not takes(torch._neg_view(x), w)
    assert not takes(x, torch._neg_view(w))
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not takes(x, w)
