"""Inputs that break other scorers: masks, padding, offsets, bad targets, NaN, far strides."""

import mmap

import pytest
import torch

from helpers.oracle import (
    DIFFERENTIABLE,
    assert_matches_fp64,
    has_nothing,
    head_problem,
    values,
    values_and_gradients,
)
from sharpen_kernels import linear_logprob
from sharpen_kernels.stats import NAMES

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
