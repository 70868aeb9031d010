"""What `segment_reduce` promises besides its numbers: gradients, op contract, columns, messages."""

import importlib

import pytest
import torch

from sharpen_kernels import TokenStats, segment_reduce
from sharpen_kernels._checks import INTERPRETED
from sharpen_kernels.segment_reduce import GROUP_NAMES, SEQUENCE_NAMES

op = importlib.import_module("sharpen_kernels.segment_reduce")  # not the function of that name
OFFSETS = [1, 4, 4, 9]  # value 0 and value 9 are in no sequence


def set_fields(found):
    return {name for name, x in vars(found).items() if x is not None}


@pytest.mark.parametrize("stat", ["sum", "mean"])
def test_gradcheck(stat):
    offsets = torch.tensor(OFFSETS)

    def fn(x):
        columns = {"a": x, "b": 2 * x}
        found = segment_reduce(columns, offsets, stats=("min", stat)).sequences
        return [getattr(found[name], stat) for name in columns]

    leaf = torch.randn(10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fn, leaf)


def test_gradient_of_the_mean_by_hand(device):
    x = torch.zeros(10, device=device, requires_grad=True)
    found = segment_reduce({"x": x}, torch.tensor(OFFSETS, device=device), stats=("mean",))
    (dx,) = torch.autograd.grad(found.sequences["x"].mean.sum(), x)
    assert dx.tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, *[1 / 5] * 5, 0])


def test_only_sum_and_mean_carry_a_gradient(device):
    x = torch.randn(10, device=device, requires_grad=True)
    offsets = torch.tensor(OFFSETS, device=device)
    found = segment_reduce(
        {"x": x}, offsets, torch.tensor([0, 3], device=device),
        stats=SEQUENCE_NAMES, group_stats=GROUP_NAMES,
    )  # fmt: skip
    fields = vars(found.sequences["x"]) | vars(found.groups["x"])
    assert {name for name, y in fields.items() if y.requires_grad} == {"sum"}
    assert found.sequences["x"].mean.requires_grad


@pytest.mark.parametrize(("S", "offsets"), [(0, [0]), (0, [0, 0, 0]), (5, [0]), (5, [2, 2])])
def test_empty_keeps_the_graph(S, offsets, device):
    x = torch.zeros(S, device=device, requires_grad=True)
    found = segment_reduce({"x": x}, torch.tensor(offsets, device=device), stats=("sum", "mean"))
    loss = found.sequences["x"].sum.sum() + found.sequences["x"].mean.sum()
    assert torch.autograd.grad(loss, x)[0].tolist() == [0.0] * S


def test_columns_of_token_stats_are_reduced_apart(device):
    logprob, greedy = torch.randn(10, device=device), torch.ones(10, device=device)
    ids = torch.arange(10, device=device)
    lists = torch.zeros(10, 3, device=device)
    tokens = TokenStats(logprob=logprob, is_greedy=greedy, top1=ids, topk=lists)
    offsets = torch.tensor(OFFSETS, device=device)
    found = segment_reduce(tokens, offsets, stats=("sum", "all"))
    assert set(found.sequences) == {"logprob", "is_greedy"}
    assert found.groups == {}
    assert found.sequences["is_greedy"].all.tolist() == [1.0, 1.0, 1.0]
    alone = segment_reduce({"x": logprob}, offsets, stats=("sum",)).sequences["x"].sum
    assert torch.equal(found.sequences["logprob"].sum, alone)


def test_only_what_was_asked_is_there(device):
    offsets, groups = (torch.tensor(x, device=device) for x in (OFFSETS, [0, 3]))
    found = segment_reduce(
        {"x": torch.zeros(10, device=device)}, offsets, groups,
        stats=("count", "tail_window"), group_stats=("max", "weights"), by="mean",
    )  # fmt: skip
    assert set_fields(found.sequences["x"]) == {"count", "tail_window"}
    assert set_fields(found.groups["x"]) == {"max", "weights"}
    assert found.sequences["x"].count.tolist() == [3, 0, 5]


def test_fp64_in_fp64_out(device):
    x = torch.randn(10, device=device, dtype=torch.float64)
    found = segment_reduce({"x": x}, torch.tensor(OFFSETS, device=device))
    torch.testing.assert_close(found.sequences["x"].sum[0], x[1:4].sum(), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_sums_are_those_of_fp64(scale, device):
    x = scale * (100 + torch.randn(6000, device=device))
    found = segment_reduce({"x": x}, torch.tensor([0, 6000], device=device), stats=("sum", "mean"))
    total = x.double().sum()
    assert found.sequences["x"].sum[0] == total.float()
    assert found.sequences["x"].mean[0] == (total / 6000).float()


def test_opcheck(device):
    x = torch.randn(2, 10, device=device, requires_grad=True)
    offsets = torch.tensor(OFFSETS, device=device)
    args = (x, offsets, 0.5, True, "sum,mean")
    torch.library.opcheck(torch.ops.sharpen.segment_reduce, args)
    scores = torch.randn(2, 4, device=device)
    eligible = torch.tensor([True, False, True, True], device=device)
    args = (scores, eligible, torch.tensor([0, 2, 4], device=device), 0.5)
    torch.library.opcheck(torch.ops.sharpen.group_reduce, args)


def test_traces_without_a_graph_break(device):
    offsets = torch.tensor(OFFSETS, device=device)

    def loss(x):
        found = segment_reduce({"x": x}, offsets, stats=("mean",)).sequences["x"].mean
        return found.square().sum()

    x = torch.randn(10, device=device, requires_grad=True)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (got,), (want,) = (torch.autograd.grad(fn(x), x) for fn in (compiled, loss))
    assert torch.equal(got, want)


def test_each_device_takes_its_own_route(device, monkeypatch):
    from sharpen_kernels import _segment_reduce_triton as fused

    taken = []
    for module, route, prefix in ((fused, "triton", ""), (op, "torch", "_torch_")):
        for step in ("sequences", "groups"):
            fn, note = getattr(module, prefix + step), (route, step)
            monkeypatch.setattr(
                module, prefix + step, lambda *a, _fn=fn, _note=note: taken.append(_note) or _fn(*a)
            )
    offsets, groups = (torch.tensor(x, device=device) for x in (OFFSETS, [0, 3]))
    for dtype in (torch.float32, torch.float64):
        x = torch.zeros(10, device=device, dtype=dtype)
        segment_reduce({"x": x}, offsets, groups, group_stats=("max",))
    own = "triton" if INTERPRETED or device == "cuda" else "torch"
    assert taken == [(route, step) for route in (own, "torch") for step in ("sequences", "groups")]


def test_offsets_that_leave_the_values_are_cut_by_the_op(device):
    # what a GPU does with offsets that it could not check
    x = torch.ones(1, 4, device=device)
    bad = torch.tensor([-3, 2, 1, 99], device=device)
    got = torch.ops.sharpen.segment_reduce(x, bad, 1.0, False, "sum")
    assert got.flatten().tolist() == [2.0, 0.0, 2.0]


x, o = torch.zeros(10), torch.tensor([0, 4, 10])
BAD = [
    ({"values": {}}, ValueError, r"`values` must hold at least one statistic, got {}; score"),
    ({"values": {"a": x.half()}}, TypeError, r"`values.a` must be one of .* got torch.float16"),
    ({"values": {"a": x, "b": x[1:]}}, ValueError, r"`values.b` must have shape \(S\)=\(10,\)"),
    ({"values": {"a": x, "b": x.double()}}, TypeError, r"`values` must be of one dtype, got"),
    ({"offsets": o.int()}, TypeError, r"`offsets` must be one of torch.int64, got torch.int32"),
    ({"offsets": o[None]}, ValueError, r"`offsets` must be 1-D and not empty, got \(1, 3\)"),
    ({"offsets": o[:0]}, ValueError, r"`offsets` must be 1-D and not empty, got \(0,\)"),
    ({"offsets": o.flip(0)}, ValueError, r"`offsets` must never fall, .* got \[10, 4, 0\]; pass"),
    ({"offsets": o + 1}, ValueError, r"`offsets` must never fall, from 0 at least to 10 at most"),
    ({"group_offsets": o}, ValueError, r"`group_offsets` must never fall, .* to 2 at most"),
    ({"offsets": o.to("meta")}, ValueError, r"`offsets` must be on cpu as `values` is, got meta"),
    ({"stats": "sum"}, ValueError, r"`stats` must be names out of \('sum', .* got 'sum'"),
    ({"stats": ("median",)}, ValueError, r"`stats` must be names out of .* got \('median',\)"),
    ({"group_stats": ("sum",)}, ValueError, r"`group_stats` must be names out of \('argmax'"),
    ({"group_stats": ("max",)}, ValueError, r"`group_offsets` must be given for `group_stats`"),
    ({"by": "median"}, ValueError, r"`by` must be names out of"),
    ({"window": 0}, ValueError, r"`window` must be an int of at least 1 or a float .* got 0"),
    ({"window": 1.5}, ValueError, r"`window` must be an int of at least 1 or a float .* got 1.5"),
    ({"temperature": 0.0}, ValueError, r"`temperature` must be finite and above 0, got 0.0"),
    ({"valid": o > 0}, ValueError, r"`valid` must have shape \(N\)=\(2,\), got \(3,\)"),
    ({"valid": o[:2]}, TypeError, r"`valid` must be one of torch.bool, got torch.int64"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for *_, m in BAD])
def test_errors_say_name_wanted_got_fix(change, error, message):
    with pytest.raises(error, match=message):
        segment_reduce(**{"values": {"a": x}, "offsets": o} | change)
