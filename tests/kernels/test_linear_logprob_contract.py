"""What `linear_logprob` promises besides its numbers, and inputs that break other scorers."""

import doctest
import importlib
import mmap
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.oracle import (
    DIFFERENTIABLE,
    assert_matches_fp64,
    has_nothing,
    head_problem,
    values,
    values_and_gradients,
)
from sharpen_kernels import TokenStats, _cpu_library, linear_logprob
from sharpen_kernels import _linear_logprob_cpu as native
from sharpen_kernels import _linear_logprob_torch as blocked
from sharpen_kernels._checks import INTERPRETED
from sharpen_kernels._head import Head, Transform
from sharpen_kernels._state import Pairs, finish
from sharpen_kernels.stats import NAMES, Wanted

OP = torch.ops.sharpen.linear_logprob


class LiveBytes(TorchDispatchMode):
    """The peak, in bytes, of what the ops under this mode have made and still hold."""

    def __init__(self):
        super().__init__()
        self.holders, self.live, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        taken = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if is_tensor(x)}
        for x in filter(is_tensor, tree_leaves(out)):
            storage = x.untyped_storage()
            key = storage._cdata
            if key not in self.holders:
                if key in taken:
                    continue  # a view of an input
                self.holders[key] = 0
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
            self.holders[key] += 1
            weakref.finalize(x, self.release, key, storage.nbytes())
        return out

    def release(self, key, nbytes):
        self.holders[key] -= 1
        if self.holders[key] == 0:
            del self.holders[key]
            self.live -= nbytes


def is_tensor(x):
    return isinstance(x, torch.Tensor)


def is_float(x):
    return is_tensor(x) and x.is_floating_point()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_native_workspace_is_bounded(dtype):
    if _cpu_library.load() is None:
        pytest.skip("no C++ kernel on this machine")
    # partials of all rows at once would be 115 MiB
    problem = head_problem(10_000, 40_000, 8, dtype=dtype)
    head = Head(problem["weight"], None, Transform(1.0, None, 40_000))
    pairs = Pairs.of(problem["target"], None, 10_000)
    with LiveBytes() as forward:
        native.forward(problem["hidden"], head, pairs, Wanted(NAMES))
    assert forward.peak < 24 * 2**20
    # in fp32 the logits are 20 MiB and the weight 128 MiB
    problem = head_problem(640, 8000, 4096, dtype=dtype)
    head = Head(problem["weight"], None, Transform(1.0, None, 8000))
    pairs = Pairs.of(problem["target"], None, 640)
    with LiveBytes() as backward:
        outputs = native.backward(
            {"logprob": torch.ones(640)},
            torch.ones(4, 640),
            problem["hidden"],
            head,
            pairs,
            (True, True, False),
        )
    held = sum(x.nbytes for x in outputs if x is not None)
    wide = 640 * 4096 * 4 if dtype == torch.bfloat16 else 0  # the gradient of hidden in fp32
    assert backward.peak - held - wide < 64 * 2**20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_cpu_workspace_is_bounded(dtype):
    # in fp32 the logits are 84 MiB and the weight 80 MiB
    problem = head_problem(550, 40_000, 512, dtype=dtype)
    hidden = problem["hidden"]
    head = Head(problem["weight"], None, Transform(1.0, None, 40_000))
    pairs = Pairs.of(problem["target"], None, 550)
    with LiveBytes() as forward:
        part, _ = blocked.forward(hidden, head, pairs, Wanted(NAMES))
    state = finish(part).state()
    grads = {str(name): torch.ones(550) for name in DIFFERENTIABLE}
    with LiveBytes() as backward:
        outputs = blocked.backward(grads, state, hidden, head, pairs, (True, True, False))
    held = sum(x.nbytes for x in outputs if x is not None)
    assert forward.peak < 32 * 2**20
    assert backward.peak - held < 64 * 2**20


@pytest.mark.parametrize("stat", DIFFERENTIABLE)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 0.5}], ids=str)
@pytest.mark.usefixtures("small_segments")
def test_gradcheck(stat, options, device):
    problem = head_problem(3, 130, 4, S=5, device=device, bias=True)
    leaves = tuple(problem[x].double().requires_grad_() for x in ("hidden", "weight", "bias"))
    target, rows = problem["target"], problem["rows"]

    def fn(hidden, weight, bias):
        call = {"hidden": hidden, "weight": weight, "bias": bias, "target": target, "rows": rows}
        return values(call, (stat,), **options)[stat]

    assert torch.autograd.gradcheck(fn, leaves, fast_mode=True)


@pytest.mark.parametrize("S", [None, 6])
def test_opcheck(S, device):
    problem = head_problem(4, 50, 8, S=S, device=device, bias=True)
    names = ("hidden", "weight", "target", "rows", "bias")
    mask = torch.arange(50, device=device) % 3 > 0
    fixed = [*(problem[name] for name in names), mask]
    leaves = [x.clone().requires_grad_() if is_float(x) else x for x in fixed]
    options = (0.7, 9.0, 50, -100)
    torch.library.opcheck(OP, (*leaves, *options, ",".join(NAMES), 0.5, 4))
    numbers = "logprob,entropy,is_greedy"
    found, *_, state = OP(*fixed, *options, numbers, 2.0, 20)
    bwd = (torch.ones_like(found), state, *fixed, *options, numbers, [True, False, True])
    torch.library.opcheck(torch.ops.sharpen.linear_logprob_bwd, bwd)


def test_traces_without_a_graph_break(device):
    problem = head_problem(4, 50, 8, device=device)

    def gradient(fn):
        hidden = problem["hidden"].clone().requires_grad_()
        return torch.autograd.grad(fn(hidden), hidden)[0]

    def loss(hidden):
        found = linear_logprob(**problem | {"hidden": hidden}, stats=("logprob", "entropy"))
        assert found.logprob is not None
        assert found.entropy is not None
        return found.logprob.sum() + found.entropy.sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert torch.equal(gradient(compiled), gradient(loss))


def test_each_device_takes_its_own_route(device, monkeypatch):
    from sharpen_kernels import _linear_logprob_triton as fused

    taken = []
    for module, route in ((fused, "triton"), (native, "native"), (blocked, "torch")):
        forward = module.forward
        monkeypatch.setattr(
            module, "forward", lambda *a, _f=forward, _r=route: taken.append(_r) or _f(*a)
        )
    problem = head_problem(2, 9, 4, device=device)
    values(problem)
    values(problem | {name: problem[name].double() for name in ("hidden", "weight")})
    plain = "native" if _cpu_library.load() else "torch"
    assert taken == ["triton" if INTERPRETED or device == "cuda" else plain, "torch"]


def test_docstring_example_runs():
    module = importlib.import_module("sharpen_kernels.linear_logprob")
    assert doctest.testmod(module) == doctest.TestResults(failed=0, attempted=3)


def test_token_stats_are_frozen():
    with pytest.raises(AttributeError, match="cannot assign"):
        TokenStats().logprob = torch.zeros(1)  # pyright: ignore[reportAttributeAccessIssue]


x, w, t = torch.zeros(3, 4), torch.zeros(9, 4), torch.zeros(3, dtype=torch.int64)
BAD = [
    ({"hidden": x[0]}, ValueError, r"`hidden` must be 2-D, got shape \(4,\); unsqueeze"),
    ({"hidden": x[None]}, ValueError, r"`hidden` must be 2-D, got .*; flatten the leading"),
    ({"hidden": x.int()}, TypeError, r"`hidden` must be one of .* got torch.int32; convert it"),
    ({"weight": w.T}, ValueError, r"`weight` must have shape \(V, D\)=\(4, 4\), got \(4, 9\)"),
    ({"target": t[:2]}, ValueError, r"`target` must have shape \(R\)=\(3,\), got \(2,\)"),
    ({"target": t[None]}, ValueError, r"`target` must be 1-D, got .* call `.flatten\(\)`"),
    ({"target": t.int()}, TypeError, r"`target` must be one of torch.int64, got torch.int32; con"),
    ({"rows": t[:2]}, ValueError, r"`rows` must have shape \(S\)=\(3,\), got \(2,\)"),
    ({"rows": t.float()}, TypeError, r"`rows` must be one of torch.int64, got torch.float32"),
    ({"bias": x[0]}, ValueError, r"`bias` must have shape \(V\)=\(9,\), got \(4,\)"),
    ({"bias": w[:, 0].int()}, TypeError, r"`bias` must be one of .* got torch.int32"),
    ({"weight": w.to("meta")}, ValueError, r"`weight` must be on cpu as `hidden` is, got meta"),
    ({"temperature": 0.0}, ValueError, r"`temperature` must be finite and above 0, got 0.0; for"),
    ({"temperature": float("nan")}, ValueError, r"`temperature` must be finite"),
    ({"softcap": -1.0}, ValueError, r"`softcap` must be finite and above 0, got -1.0; None"),
    ({"vocab_size": 10}, ValueError, r"`vocab_size` must be in 1\.\.9, .* got 10"),
    ({"vocab_size": 0}, ValueError, r"`vocab_size` must be in 1\.\.9, .* got 0"),
    ({"stats": "logprob"}, ValueError, r"`stats` must be a tuple of names .* got 'logprob'"),
    ({"stats": ("perplexity",)}, ValueError, r"`stats` must .* \('logprob', 'lse', 'entropy'"),
    ({"stats": ()}, ValueError, r"`stats` must be a tuple of names"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for *_, m in BAD])
def test_errors_say_name_wanted_got_fix(change, error, message):
    with pytest.raises(error, match=message):
        linear_logprob(**{"hidden": x, "weight": w, "target": t} | change)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "masked",
    [slice(0, 128), slice(128, 256), slice(256, 300), slice(1, None), slice(0, 299), slice(0, 1)],
    ids=["first segment", "middle", "last", "all but first", "all but last", "first column"],
)
@pytest.mark.parametrize("by", ["bias", "vocab_mask", "vocab_mask, softcap"])
@pytest.mark.usefixtures("small_segments")
def test_masked_vocabulary(masked, by, device):
    problem = head_problem(5, 300, 16, device=device, bias=True)
    mask = torch.ones(300, dtype=torch.bool, device=device)
    mask[masked] = False
    kept = mask.nonzero()[:, 0]
    problem["target"] = kept[torch.arange(5, device=device) % len(kept)]
    options = {}
    if by == "bias":
        problem["bias"][masked] = -INF
    else:
        options = {"vocab_mask": mask, "temperature": 0.7}
        options |= {"softcap": 5.0} if "softcap" in by else {}
    got = assert_matches_fp64(problem, **options)
    assert (got["dweight"][masked] == 0).all()
    assert (got["dbias"][masked] == 0).all()
    assert (got["entropy"] >= 0).all()
    assert mask[got["top1"]].all()
    assert set(got["topk_id"].unique().tolist()) <= {-1, *kept.tolist()}


@pytest.mark.parametrize("by", ["bias", "vocab_mask"])
@pytest.mark.usefixtures("small_segments")
def test_fully_masked_row_has_no_distribution(by, device):
    problem = head_problem(3, 300, 16, device=device, bias=True)
    options = {}
    if by == "bias":
        problem["bias"][:] = -INF
    else:
        options["vocab_mask"] = torch.zeros(300, dtype=torch.bool, device=device)
    got = values(problem, **options)
    assert got["lse"].tolist() == [-INF] * 3
    for name in set(NAMES) - {"lse"}:
        assert all(has_nothing(got[name])), name


def test_a_softcap_caps_a_bias_of_minus_infinity_and_a_mask_masks(device):
    problem = head_problem(2, 50, 8, device=device, bias=True)
    problem["bias"][7] = -INF
    finite = problem | {"bias": problem["bias"].clamp(min=-1e30)}
    mask = torch.arange(50, device=device) != 9
    for options in ({}, {"vocab_mask": mask}):
        got = values(problem, softcap=3.0, **options)
        want = values(finite, softcap=3.0, **options)
        assert torch.equal(got["self_certainty"], want["self_certainty"])
        assert got["entropy"].isfinite().all()


def test_padded_vocabulary_is_never_read(device):
    problem = head_problem(5, 200, 16, device=device, bias=True)
    problem["weight"][150:] = NAN
    problem["bias"][150:] = NAN
    problem["target"] %= 150
    got = values_and_gradients(linear_logprob, problem, vocab_size=150)
    assert (got["dweight"][150:] == 0).all()
    cut = problem | {name: problem[name][:150] for name in ("weight", "bias")}
    want = values_and_gradients(linear_logprob, cut)
    for name in (*NAMES, "dhidden"):
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("offset", [-1e4, -120.0, 120.0, 1e4])
def test_offset_of_all_logits(offset, device):
    problem = head_problem(5, 200, 16, device=device, bias=True)
    problem["bias"] += offset
    got = assert_matches_fp64(problem)
    assert (got["entropy"] >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [30.0, 3e3])
def test_huge_logits(scale, dtype, device):
    problem = head_problem(9, 200, 64, dtype=dtype, device=device)
    problem["hidden"] *= scale
    got = values(problem)
    assert got["logprob"].isfinite().all()
    assert_matches_fp64(problem, stats=("logprob", "lse"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.usefixtures("small_segments")
def test_logprob_is_never_positive(dtype, device):
    problem = head_problem(300, 300, 32, dtype=dtype, device=device)
    # every row all but certain of its target, where two ways to the target's logit would differ
    problem["weight"] = 4 * problem["hidden"]
    problem["target"] = torch.arange(300, device=device)
    got = values(problem, ("logprob",))
    assert (got["logprob"] <= 0).all()
    assert (got["logprob"] > -1e-3).sum() > 200


def test_ignored_target_is_zero_and_others_outside_are_nan(device):
    problem = head_problem(6, 50, 8, device=device)
    problem["target"] = torch.tensor([1, -100, -1, 40, 50, 2], device=device)
    got = values(problem, vocab_size=40)
    for name, x in got.items():
        is_id = not x.is_floating_point()
        assert has_nothing(x) == [False, is_id, True, True, True, False], name
        assert (x[1] == (-1 if is_id else 0)).all(), name
    assert values(problem, ignore_index=1)["logprob"][0] == 0


def test_target_and_row_outside_get_no_gradient(device):
    problem = head_problem(3, 50, 8, S=6, device=device)
    problem["rows"] = torch.tensor([0, 1, 9, -1, 1, 2], device=device)
    problem["target"] = torch.tensor([1, 7, 2, 3, 99, -100], device=device)
    got = values_and_gradients(linear_logprob, problem, stats=DIFFERENTIABLE)
    assert got["logprob"].isnan().tolist() == [False, False, True, True, True, False]
    fine = problem | {name: problem[name][:2] for name in ("rows", "target")}
    leaves = [problem[name].clone().requires_grad_() for name in ("hidden", "weight")]
    both = []
    for part in (problem, fine):
        call = part | dict(zip(("hidden", "weight"), leaves, strict=True))
        both.append(torch.autograd.grad(values(call)["logprob"][:2].sum(), leaves))
    for got, want in zip(*both, strict=True):
        assert torch.equal(got, want)
    assert (both[0][0][2] == 0).all()


def test_masked_target_is_minus_infinity_with_a_finite_gradient(device):
    problem = head_problem(2, 50, 8, device=device, bias=True)
    problem["target"] = torch.tensor([4, 5], device=device)
    problem["bias"][4] = -INF
    got = values_and_gradients(linear_logprob, problem, stats=("logprob",))
    assert got["logprob"][0] == -INF
    assert got["logprob"][1].isfinite()
    for name in ("dhidden", "dweight", "dbias"):
        assert got[name].isfinite().all(), name
    assert (got["dweight"][4] == 0).all()
    assert got["dbias"][4] == 0


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.usefixtures("small_segments")
def test_nan_stays_in_its_row(poison, device):
    problem = head_problem(5, 300, 16, device=device)
    clean = values(problem)
    problem["hidden"][2, 3] = poison
    got = values(problem)
    others = [0, 1, 3, 4]
    for name in NAMES:
        assert has_nothing(got[name])[2], name
        assert torch.equal(got[name][others], clean[name][others]), name


def test_ignored_row_of_nan_leaves_gradients_clean(device):
    problem = head_problem(4, 60, 8, device=device, bias=True)
    problem["target"][1] = -100
    want = values_and_gradients(linear_logprob, problem)
    problem["hidden"][1] = NAN
    got = values_and_gradients(linear_logprob, problem)
    assert (got["dhidden"][1] == 0).all()
    for name, x in got.items():
        assert torch.equal(x, want[name]), name


@pytest.mark.parametrize(("R", "S"), [(0, None), (0, 0), (5, 0)])
def test_empty_keeps_the_graph(R, S, device):
    problem = head_problem(R, 50, 8, device=device, bias=True)
    if S is not None:
        problem["target"] = problem["rows"] = torch.zeros(S, dtype=torch.int64, device=device)
    got = values_and_gradients(linear_logprob, problem)
    for name in NAMES:
        assert got[name].shape[0] == 0
    for name in ("dhidden", "dweight", "dbias"):
        assert (got[name] == 0).all(), name


def test_pairs_of_no_rows_are_nan(device):
    problem = head_problem(0, 50, 8, device=device)
    problem["rows"] = torch.zeros(2, dtype=torch.int64, device=device)
    problem["target"] = torch.tensor([3, -100], device=device)
    assert values(problem)["logprob"].isnan().tolist() == [True, False]


@pytest.mark.parametrize("layout", ["transposed", "every other row", "every other column"])
@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_strides(name, layout, device):
    problem = head_problem(6, 90, 10, device=device, bias=True)
    want = values_and_gradients(linear_logprob, problem)
    x = problem[name]
    if layout == "transposed":
        problem[name] = x.T.contiguous().T if x.ndim == 2 else x.flip(0).flip(0)
    elif layout == "every other row":
        problem[name] = x.repeat_interleave(2, dim=0)[::2]
    else:
        problem[name] = x.repeat_interleave(2, dim=-1)[..., ::2]
    got = values_and_gradients(linear_logprob, problem)
    for key, value in got.items():
        torch.testing.assert_close(value, want[key], msg=key)


@pytest.mark.parametrize("S", [None, 9])
def test_strided_targets_and_rows(S, device):
    problem = head_problem(6, 90, 10, S=S, device=device)
    want = values_and_gradients(linear_logprob, problem)
    for name in ("target", "rows"):
        if problem[name] is not None:
            problem[name] = problem[name].repeat_interleave(2)[::2]
    got = values_and_gradients(linear_logprob, problem)
    for name, x in got.items():
        assert torch.equal(x, want[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_offsets_beyond_2_to_the_31(dtype, device):
    if device == "cuda":
        far = torch.zeros(2**31 + 64, dtype=dtype, device=device)
    else:
        # pages of an anonymous map exist once touched; 0x4000 reserves no swap for the rest
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        far = torch.frombuffer(mmap.mmap(-1, 2 * (2**31 + 64), flags=flags), dtype=dtype)
    problem = head_problem(3, 3, 16, dtype=dtype, device=device)
    want = values(problem)
    for name in ("weight", "hidden"):
        view = far.as_strided((3, 16), (2**30 + 8, 1))
        view.copy_(problem[name])
        got = values(problem | {name: view})
        for stat in NAMES:
            assert torch.equal(got[stat], want[stat]), stat
