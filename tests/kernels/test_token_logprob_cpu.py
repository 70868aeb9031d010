"""The two routes of `token_logprob` on a CPU: C++, and PyTorch where that cannot run."""

import pytest
import torch

from bench._measure import peak_extra_mib
from helpers.logit_oracle import assert_matches_fp64, logit_problem, values, values_and_gradient
from sharpen_kernels import _cpu_library, token_logprob
from sharpen_kernels import _token_logprob_cpu as native
from sharpen_kernels import _token_logprob_torch as blocked
from sharpen_kernels._checks import INTERPRETED
from sharpen_kernels._head import Transform
from sharpen_kernels._state import Pairs, finish
from sharpen_kernels.stats import NAMES, Wanted

needs_library = pytest.mark.skipif(
    INTERPRETED or _cpu_library.load() is None,
    reason="the C++ kernel is not used here: no compiler, no AVX2, or Triton's interpreter",
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [
    {},
    {"vocab_size": 130},
    {"temperature": 0.7, "renyi_order": 0.5},
    {"vocab_size": 390, "softcap": 8.0, "temperature": 1.3, "k": 32, "renyi_order": 3.0},
]


on_cpu = pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter runs the GPU's kernels")


@pytest.fixture(
    params=[pytest.param("C++", marks=needs_library), pytest.param("PyTorch", marks=on_cpu)]
)
def route(request, monkeypatch):
    """The module of each route, taken by the op."""
    if request.param == "PyTorch":
        monkeypatch.setattr(native, "takes", lambda logits: False)
        return blocked
    return native


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("small_tiles", "route")
def test_options_and_a_mask_over_pairs_of_few_rows(dtype, options):
    problem = logit_problem(20, 400, S=50, dtype=dtype)
    V = options.get("vocab_size", 400)
    problem["target"] %= V
    mask = torch.rand(400) < 0.4
    mask[64:128] = False  # a segment
    mask[problem["target"]] = True
    got = assert_matches_fp64(problem, vocab_mask=mask, **options)
    assert (got["dlogits"][:, :V][:, ~mask[:V]] == 0).all()
    assert (got["dlogits"][:, V:] == 0).all()


@pytest.mark.parametrize("V", [5, 300, 9000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("route")
def test_ties_of_whole_numbers(dtype, V):
    problem = logit_problem(7, V, S=40, dtype=dtype)
    problem["logits"] = torch.randint(-3, 4, (7, V)).to(dtype)
    z, row, target = problem["logits"].double(), problem["rows"], problem["target"]
    order = z.sort(descending=True, stable=True).indices
    rank = (order[row] == target[:, None]).nonzero()[:, 1] + 1
    got = values(problem, ("rank", "is_greedy", "top1", "topk_id"), k=5)
    assert got["rank"].tolist() == rank.tolist()
    assert torch.equal(got["is_greedy"], (rank == 1).float())
    assert torch.equal(got["top1"], order[row, 0])
    assert torch.equal(got["topk_id"], order[row][:, :5])


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [(1500, 1), (1, 31), (3000, 2)], ids=str)
def test_same_bits_with_any_threads_passes_and_strides(dtype, stride, monkeypatch):
    problem = logit_problem(31, 1500, dtype=dtype)
    monkeypatch.setattr(native, "SEGMENT", 256)
    want = values_and_gradient(token_logprob, problem)
    strided = torch.empty_strided((31, 1500), stride, dtype=dtype).copy_(problem["logits"])
    for threads, n_bytes in ((2, 2**22), (3, 1)):
        monkeypatch.setattr(native, "PARTIALS_BYTES", n_bytes)
        torch.set_num_threads(threads)
        try:
            got = values_and_gradient(token_logprob, problem | {"logits": strided})
        finally:
            torch.set_num_threads(1)
        assert all(torch.equal(x, want[name]) for name, x in got.items())


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_rounded_to_nearest(dtype):
    problem = logit_problem(5, 77, dtype=dtype)
    wide = problem | {"logits": problem["logits"].float()}
    got = values_and_gradient(token_logprob, problem)["dlogits"]
    assert torch.equal(got, values_and_gradient(token_logprob, wide)["dlogits"].to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_workspace_is_bounded(dtype, route):
    R, V = 300, 40_000  # 46 MiB in fp32
    logits = torch.zeros(R, V, dtype=dtype)
    pairs = Pairs.of(torch.zeros(R, dtype=torch.int64), None, R)
    read = Transform(1.0, None, V, None)

    def forward():
        return route.forward(logits, read, pairs, Wanted(NAMES))

    state = finish(forward()[0]).state()
    grads = torch.ones(4, R)

    def backward():
        return route.backward(grads, state, logits, read, pairs)

    assert peak_extra_mib(forward, "cpu") < 12
    assert peak_extra_mib(backward, "cpu") < 12 + logits.nbytes / 2**20
