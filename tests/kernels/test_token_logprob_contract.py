"""What `token_logprob` promises besides its numbers, and logits that break other scorers."""

import mmap

import pytest
import torch

from helpers.logit_oracle import (
    DIFFERENTIABLE,
    assert_matches_fp64,
    logit_problem,
    values,
    values_and_gradient,
)
from sharpen_kernels import _token_logprob_torch as blocked
from sharpen_kernels import token_logprob
from sharpen_kernels._checks import INTERPRETED
from sharpen_kernels.stats import NAMES, Wanted

OP = torch.ops.sharpen.token_logprob


@pytest.mark.parametrize("stat", DIFFERENTIABLE)
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "temperature": 0.6}], ids=str)
def test_gradcheck(stat, options):
    problem = logit_problem(3, 11, S=7)
    mask = torch.ones(11, dtype=torch.bool)
    mask[3] = False
    problem["target"][[0, 2, 3]] = 5
    problem["target"] %= 10
    problem["target"][1] = -100
    problem["target"][problem["target"] == 3] = 4  # masked: its log-prob is -inf

    def fn(logits):
        call = problem | {"logits": logits}
        return values(call, (stat,), vocab_mask=mask, vocab_size=10, **options)[stat]

    leaf = problem["logits"].double().requires_grad_()
    assert torch.autograd.gradcheck(fn, leaf)


@pytest.mark.parametrize("S", [None, 6])
@pytest.mark.parametrize("stats", ["logprob,entropy,is_greedy", "lse,top1,topk_id", "topk,rank"])
def test_opcheck(S, stats, device):
    problem = logit_problem(4, 50, S=S, device=device)
    logits, target, rows = problem["logits"], problem["target"], problem["rows"]
    mask = torch.arange(50, device=device) != 9
    options = (0.7, 9.0, 48, -100)
    leaf = logits.clone().requires_grad_()
    torch.library.opcheck(OP, (leaf, target, rows, mask, *options, stats, 3.0, 2))
    found, *_, state = OP(logits, target, rows, mask, *options, stats, 3.0, 2)
    numbers = ",".join(Wanted(tuple(stats.split(","))).numbers)
    bwd = (torch.ones_like(found), state, logits, target, rows, mask, *options, numbers)
    torch.library.opcheck(torch.ops.sharpen.token_logprob_bwd, bwd)


def test_traces_without_a_graph_break(device):
    problem = logit_problem(4, 50, device=device)

    def loss(logits):
        found = token_logprob(logits, problem["target"], stats=("logprob", "entropy", "top1"))
        assert found.logprob is not None
        assert found.entropy is not None
        return found.logprob.sum() + found.entropy.sum()

    def gradient(fn):
        leaf = problem["logits"].clone().requires_grad_()
        return torch.autograd.grad(fn(leaf), leaf)[0]

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert torch.equal(gradient(compiled), gradient(loss))


def test_each_device_takes_its_own_route(device, monkeypatch):
    from sharpen_kernels import _cpu_library
    from sharpen_kernels import _token_logprob_cpu as native
    from sharpen_kernels import _token_logprob_triton as fused

    taken = []
    for module, route in ((fused, "triton"), (native, "C++"), (blocked, "torch")):
        for step in ("forward", "backward"):
            fn = getattr(module, step)
            note = (route, step)
            monkeypatch.setattr(
                module, step, lambda *a, _fn=fn, _note=note: taken.append(_note) or _fn(*a)
            )
    problem = logit_problem(2, 9, device=device)
    own = "torch" if _cpu_library.load() is None else "C++"
    if INTERPRETED or device == "cuda":
        own = "triton"
    for logits in (problem["logits"], problem["logits"].double()):
        leaf = logits.requires_grad_()
        values(problem | {"logits": leaf}, ("logprob",))["logprob"].sum().backward()
    assert taken == [(r, step) for r in (own, "torch") for step in ("forward", "backward")]


x, t, m = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), torch.ones(4, dtype=torch.bool)
BAD = [
    ({"logits": x[0]}, ValueError, r"`logits` must be 2-D, got shape \(4,\); unsqueeze"),
    ({"logits": x[None]}, ValueError, r"`logits` must be 2-D, got .*; flatten the leading"),
    ({"logits": x.int()}, TypeError, r"`logits` must be one of .* got torch.int32; convert it"),
    ({"target": t[:2]}, ValueError, r"`target` must have shape \(R\)=\(3,\), got \(2,\)"),
    ({"target": t[None]}, ValueError, r"`target` must be 1-D, got .* call `.flatten\(\)`"),
    ({"target": t.int()}, TypeError, r"`target` must be one of torch.int64, got torch.int32; con"),
    ({"target": t.to("meta")}, ValueError, r"`target` must be on cpu as `logits` is, got meta"),
    ({"rows": t[:2]}, ValueError, r"`rows` must have shape \(S\)=\(3,\), got \(2,\)"),
    ({"rows": t.float()}, TypeError, r"`rows` must be one of torch.int64, got torch.float32"),
    ({"vocab_mask": m[:3]}, ValueError, r"`vocab_mask` must have shape \(V\)=\(4,\), got \(3,\)"),
    ({"vocab_mask": t}, TypeError, r"`vocab_mask` must be one of torch.bool, got torch.int64"),
    ({"temperature": 0.0}, ValueError, r"`temperature` must be finite and above 0, got 0.0; for"),
    ({"softcap": -1.0}, ValueError, r"`softcap` must be finite and above 0, got -1.0; None"),
    ({"vocab_size": 5}, ValueError, r"`vocab_size` must be in 1\.\.4, the columns .* got 5"),
    ({"vocab_size": 0}, ValueError, r"`vocab_size` must be in 1\.\.4, .* got 0"),
    ({"stats": "logprob"}, ValueError, r"`stats` must be a tuple of names .* got 'logprob'"),
    ({"stats": ("perplexity",)}, ValueError, r"`stats` must .* 'top1', 'margin', 'rank', 'topk'"),
    ({"renyi_order": 0.0}, ValueError, r"`renyi_order` must be finite and above 0, got 0.0"),
    ({"k": 33}, ValueError, r"`k` must be in 1..32, got 33; for more, sort"),
    ({"stats": ()}, ValueError, r"`stats` must be a tuple of names"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for *_, m in BAD])
def test_errors_say_name_wanted_got_fix(change, error, message):
    with pytest.raises(error, match=message):
        token_logprob(**{"logits": x, "target": t} | change)


NAN, INF = float("nan"), float("inf")
IDS = ("top1", "topk_id")
# a margin is inf, and a list shorter than k, where few columns are left
OF_ANY_NUMBER = tuple(name for name in NAMES if name not in ("margin", "topk", "topk_id"))


def masked_problem(how, masked, device):
    """A problem over 300 columns, `masked` among them, and the options that go with it."""
    problem = logit_problem(5, 300, device=device)
    mask = torch.ones(300, dtype=torch.bool, device=device)
    mask[masked] = False
    kept = mask.nonzero()[:, 0]
    problem["target"] = kept[torch.arange(5, device=device) % len(kept)]
    if how == "logits":
        problem["logits"][:, masked] = -INF
        return problem, mask, {}
    problem["logits"][:, masked] = NAN
    return problem, mask, {"vocab_mask": mask}


@pytest.mark.parametrize("how", ["logits", "vocab_mask"])
@pytest.mark.parametrize(
    "masked",
    [slice(0, 128), slice(128, 256), slice(256, 300), slice(1, None), slice(0, 299), slice(0, 1)],
    ids=["first tile", "middle", "last", "all but first", "all but last", "first column"],
)
@pytest.mark.usefixtures("small_tiles")
def test_masked_vocabulary(how, masked, device):
    problem, mask, options = masked_problem(how, masked, device)
    got = values_and_gradient(token_logprob, problem, **options)
    assert (got["dlogits"][:, ~mask] == 0).all()
    assert (got["entropy"] >= 0).all()
    assert (got["varentropy"] >= 0).all()
    only = problem | {"logits": problem["logits"][:, mask]}
    only["target"] = (mask.cumsum(0) - 1)[problem["target"]]
    masked_gradient = got["dlogits"]
    got = assert_matches_fp64(only, OF_ANY_NUMBER)
    torch.testing.assert_close(masked_gradient[:, mask], got["dlogits"])
    for name, x in values(problem, OF_ANY_NUMBER, **options).items():
        want = mask.nonzero()[:, 0][got[name]] if name == "top1" else got[name]
        torch.testing.assert_close(x, want, msg=name)


@pytest.mark.usefixtures("small_tiles")
def test_margin_of_one_column_is_infinite(device):
    problem, _, options = masked_problem("vocab_mask", slice(1, None), device)
    assert values(problem, ("margin",), **options)["margin"].tolist() == [INF] * 5


@pytest.mark.parametrize("how", ["logits", "vocab_mask"])
@pytest.mark.usefixtures("small_tiles")
def test_fully_masked_row_has_no_distribution(how, device):
    problem, _, options = masked_problem("logits", slice(1, None), device)
    problem["logits"][:, 0] = -INF
    if how == "vocab_mask":
        options = {"vocab_mask": torch.zeros(300, dtype=torch.bool, device=device)}
    got = values(problem, **options)
    assert got.pop("lse").tolist() == [-INF] * 5
    for name, x in got.items():
        assert (x == -1 if name in IDS else x.isnan()).all(), name


@pytest.mark.parametrize("offset", [-1e4, -120.0, 120.0, 1e4])
def test_offset_of_all_logits(offset, device):
    problem = logit_problem(5, 200, device=device)
    problem["logits"] += offset
    got = assert_matches_fp64(problem)
    assert (got["entropy"] >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [30.0, 3e3, 1e30])
@pytest.mark.usefixtures("small_tiles")
def test_huge_logits(scale, dtype, device):
    problem = logit_problem(5, 300, device=device)
    problem["logits"] = (problem["logits"] * scale).to(dtype)
    got = values_and_gradient(token_logprob, problem)
    for name, x in got.items():
        assert x.isfinite().all(), name
    assert_matches_fp64(problem, ("logprob", "lse", "margin", "top1", "rank"))


@pytest.mark.usefixtures("small_tiles")
def test_first_tiles_far_below_the_rest(device):
    problem = logit_problem(2, 300, device=device)
    want = values(problem | {"logits": problem["logits"][:, 150:], "target": problem["target"] % 9})
    # 64 of these, all at their own top: the sum of exp times the gap overflows fp32
    problem["logits"][:, :150] = -1e37
    problem["target"] = problem["target"] % 9 + 150
    got = values_and_gradient(token_logprob, problem)
    for name in ("logprob", "lse", "entropy", "varentropy", "sum_p2", "margin", "rank"):
        torch.testing.assert_close(got[name], want[name], msg=name)
    assert got["dlogits"].isfinite().all()


def test_largest_half_precision_logits(device):
    problem = logit_problem(3, 300, dtype=torch.float16, device=device)
    problem["logits"][:, 3] = 65504.0
    problem["logits"][:, 4] = -65504.0
    assert_matches_fp64(problem)


@pytest.mark.parametrize("options", [{}, {"softcap": 7.0, "temperature": 0.05}], ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_logprob_is_never_positive(options, device):
    problem = logit_problem(100, 150, device=device)
    # every row all but certain of its target
    problem["logits"].scatter_(1, problem["target"][:, None], 20.0)
    got = values(problem, ("logprob",), **options)
    assert (got["logprob"] <= 0).all()
    assert (got["logprob"] > -1e-3).sum() > 80


def test_ignored_target_is_zero_and_others_outside_are_nan(device):
    problem = logit_problem(6, 50, device=device)
    problem["target"] = torch.tensor([1, -100, -1, 40, 50, 2], device=device)
    for name, x in values(problem, vocab_size=40).items():
        if name in IDS:
            assert (x < 0).view(6, -1).all(1).tolist() == [False, True, True, True, True, False]
        else:
            nan = x.isnan().view(6, -1).all(1)
            assert nan.tolist() == [False, False, True, True, True, False], name
            assert (x[1] == 0).all(), name
    assert values(problem, ("logprob",), ignore_index=1)["logprob"][0] == 0


def test_target_and_row_outside_get_no_gradient(device):
    problem = logit_problem(3, 50, S=6, device=device)
    problem["rows"] = torch.tensor([0, 1, 9, -1, 1, 2], device=device)
    problem["target"] = torch.tensor([1, 7, 2, 3, 99, -100], device=device)
    got = values_and_gradient(token_logprob, problem, DIFFERENTIABLE)
    assert got["logprob"].isnan().tolist() == [False, False, True, True, True, False]
    assert values(problem, ("rank",))["rank"].isnan().tolist() == got["logprob"].isnan().tolist()
    assert got["dlogits"].isfinite().all()
    assert (got["dlogits"][2] == 0).all()


@pytest.mark.parametrize("how", ["logits", "vocab_mask"])
def test_masked_target_is_minus_infinity_and_ranks_last(how, device):
    problem, _, options = masked_problem(how, slice(4, 5), device)
    problem["target"][:2] = 4
    got = values_and_gradient(token_logprob, problem, **options)
    assert got["logprob"].isneginf().tolist() == [True, True, False, False, False]
    assert got["rank"][:2].tolist() == [300.0, 300.0]
    assert got["dlogits"].isfinite().all()
    assert (got["dlogits"][:, 4] == 0).all()
    alone = values_and_gradient(token_logprob, problem, ("logprob",), **options)
    assert (alone["dlogits"][:, 4] == 0).all()


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.usefixtures("small_tiles")
def test_nan_stays_in_its_row(poison, device):
    problem = logit_problem(5, 300, device=device)
    clean = values_and_gradient(token_logprob, problem)
    problem["logits"][2, 70] = poison
    got = values_and_gradient(token_logprob, problem)
    others = [0, 1, 3, 4]
    for name, x in got.items():
        assert torch.equal(x[others], clean[name][others]), name
    for name in NAMES:
        assert (got[name][2] == -1 if name in IDS else got[name][2].isnan()).all(), name


def test_ignored_row_of_nan_leaves_the_gradient_clean(device):
    problem = logit_problem(4, 60, device=device)
    problem["target"][1] = -100
    want = values_and_gradient(token_logprob, problem)
    problem["logits"][1] = NAN
    got = values_and_gradient(token_logprob, problem)
    assert (got["dlogits"][1] == 0).all()
    for name, x in got.items():
        assert torch.equal(x, want[name]), name


def test_row_with_no_pair_gets_no_gradient(device):
    problem = logit_problem(4, 50, S=6, device=device)
    problem["rows"] = torch.tensor([3, 0, 0, 3, 0, 1], device=device)
    assert (assert_matches_fp64(problem)["dlogits"][2] == 0).all()


@pytest.mark.parametrize(("R", "S"), [(0, None), (0, 0), (5, 0)])
def test_empty_keeps_the_graph(R, S, device):
    problem = logit_problem(R, 50, device=device)
    if S is not None:
        problem["target"] = problem["rows"] = torch.zeros(S, dtype=torch.int64, device=device)
    got = values_and_gradient(token_logprob, problem)
    assert got["dlogits"].shape == (R, 50)
    assert (got.pop("dlogits") == 0).all()
    assert {x.shape for x in got.values()} == {(0,), (0, 20)}


def test_pairs_of_no_rows_are_nan(device):
    problem = logit_problem(0, 50, device=device)
    problem["rows"] = torch.zeros(2, dtype=torch.int64, device=device)
    problem["target"] = torch.tensor([3, -100], device=device)
    got = values(problem, ("logprob", "top1"))
    assert got["logprob"].isnan().tolist() == [True, False]
    assert got["top1"].tolist() == [-1, -1]


@pytest.mark.parametrize("layout", ["transposed", "every other column", "unaligned", "sliced"])
def test_strides(layout, device):
    problem = logit_problem(6, 91, device=device)
    want = values_and_gradient(token_logprob, problem)
    x = problem["logits"]
    if layout == "transposed":
        view = x.T.contiguous().T
    elif layout == "every other column":
        view = x.repeat_interleave(2, dim=1)[:, ::2]
    elif layout == "unaligned":
        view = torch.cat([x.new_zeros(3), x.flatten()])[3:].view(6, 91)
    else:
        view = torch.cat([x.new_full((6, 5), NAN), x, x], dim=1)[:, 5:96]
    for name, got in values_and_gradient(token_logprob, problem | {"logits": view}).items():
        assert torch.equal(got, want[name]), name


def test_offsets_beyond_2_to_the_31(device):
    if device == "cuda":
        far = torch.zeros(2**31 + 64, dtype=torch.float16, device=device)
    else:
        # pages of an anonymous map exist once touched; 0x4000 reserves no swap for the rest
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        far = torch.frombuffer(mmap.mmap(-1, 2 * (2**31 + 64), flags=flags), dtype=torch.float16)
    problem = logit_problem(3, 16, dtype=torch.float16, device=device)
    want = values(problem)
    for strides in ((2**30 + 8, 1), (1, 2**27)):
        view = far.as_strided((3, 16), strides)
        view.copy_(problem["logits"])
        for stat, x in values(problem | {"logits": view}).items():
            assert torch.equal(x, want[stat]), stat
