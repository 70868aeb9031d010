"""`segment_reduce` against loops over fp64 NumPy rows; its gradients, op contract and messages."""

import importlib
import itertools

import numpy as np
import pytest
import torch

from sharpen_kernels import TokenStats, segment_reduce
from sharpen_kernels import _segment_reduce_triton as fused
from sharpen_kernels._checks import INTERPRETED
from sharpen_kernels.segment_reduce import GROUP_NAMES, SEQUENCE_NAMES

op = importlib.import_module("sharpen_kernels.segment_reduce")  # not the function of that name
NAN, INF = float("nan"), float("inf")
# empty first, last and in the middle; one value; a tile of 64 and one more; several tiles
LENGTHS = [0, 1, 2, 9, 10, 11, 0, 37, 100, 64, 65, 150, 3, 0]
GROUPS = [0, 0, 4, 5, 7, 14]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setitem(fused.SEQUENCE, "BLOCK", 64)
    monkeypatch.setitem(fused.WINDOW, "BLOCK", 64)
    monkeypatch.setitem(fused.GROUP, "BLOCK", 32)
    monkeypatch.setattr(op, "BLOCK_ELEMENTS", 200)


def loop_sequence(x, window):
    """Every statistic of one sequence, straight from the definitions."""
    L = len(x)
    every = {"sum": x.sum(), "mean": x.sum() / max(L, 1), "count": L}
    every["min"] = np.nan if np.isnan(x).any() else min(x, default=np.inf)
    every["all"] = np.nan if np.isnan(x).any() else float((x != 0).all())
    w = window if isinstance(window, int) else int(window * L)
    w = min(max(w, 1), max(L, 1))
    means = np.array([x[i : i + w].sum() / w for i in range(L - w + 1)] if L else [0.0])
    lost = np.isnan(x).any() or np.isnan(means).any()
    lowest = np.sort(means)[: max(1, len(means) // 10)]
    every["lowest_window"] = np.nan if lost else means.min()
    every["bottom_windows"] = np.nan if lost else lowest.sum() / len(lowest)
    every["tail_window"] = np.nan if np.isnan(x).any() else means[-1]
    return every


def loop_group(x, counts, temperature):
    """Every statistic of one group: of the scores `x` where `counts`."""
    best, n = -1, counts.sum()
    for i in range(len(x)):
        if counts[i] and not np.isnan(x[i]) and (best < 0 or x[i] > x[best]):
            best = i
    kept = x[counts]
    every = {"argmax": best, "max": x[best] if best >= 0 else np.nan}
    mean = kept.sum() / n if n else np.nan
    std = np.sqrt(((kept - mean) ** 2).sum() / max(n - 1, 1)) if n else np.nan
    shift = x[best] if best >= 0 and x[best] > -np.inf else 0.0
    mass = np.exp((kept - shift) / temperature).sum()
    every |= {"mean": mean, "std": std}
    every["log_mean_exp"] = shift + temperature * np.log(mass / n) if n else np.nan
    every["advantage"] = np.where(counts, (x - mean) / (std + 1e-4), 0.0)
    every["weights"] = np.where(counts, np.exp((x - shift) / temperature) / mass, 0.0)
    return every


def collate(rows, names):
    per_row = {name: [np.atleast_1d(row[name]) for row in rows] for name in names}
    return {name: np.concatenate(x) for name, x in per_row.items()}


def oracle(x, offsets, groups, *, window=0.1, by="sum", temperature=1.0, valid=None):
    """All statistics of sequences and of groups, by name, in fp64."""
    runs = [x[a:b] for a, b in itertools.pairwise(offsets)]
    sequences = collate([loop_sequence(run, window) for run in runs], SEQUENCE_NAMES)
    eligible = np.diff(offsets) > 0
    eligible = eligible if valid is None else eligible & valid
    # groups reduce what sequences return: numbers rounded to the dtype of the values
    score = sequences[by].astype(np.float32).astype(float)
    rows = [
        loop_group(score[a:b], eligible[a:b], temperature) for a, b in itertools.pairwise(groups)
    ]
    return sequences, collate(rows, GROUP_NAMES)


def problem(device, lengths=LENGTHS, groups=GROUPS):
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    x = -torch.rand(int(offsets[-1]), device=device).square() * 9
    x[::7] = 0.0
    return x, offsets, torch.tensor(groups, device=device)


def reduce(x, offsets, groups, **options):
    """All statistics of the one column `x`, as dicts of tensors."""
    found = segment_reduce(
        {"x": x}, offsets, groups, stats=SEQUENCE_NAMES, group_stats=GROUP_NAMES, **options
    )
    return vars(found.sequences["x"]), vars(found.groups["x"])


def assert_matches_loops(x, offsets, groups, *, ulps=1, **options):
    got = reduce(x, offsets, groups, **options)
    if "valid" in options:
        options["valid"] = options["valid"].cpu().numpy()
    arrays = (x.double().cpu().numpy(), offsets.tolist(), groups.tolist())
    with np.errstate(all="ignore"):
        want = oracle(*arrays, **options)
    for mine, loops in zip(got, want, strict=True):
        for name, y in mine.items():
            truth = torch.from_numpy(loops[name])
            assert y.shape == truth.shape, name
            eps = 0.0 if y.dtype == torch.int64 else ulps * torch.finfo(y.dtype).eps
            torch.testing.assert_close(
                y.cpu().double(),
                truth.double(),
                rtol=eps,
                atol=eps / 8,
                equal_nan=True,
                msg=lambda text, name=name: f"{name}: {text}",
            )
    return got


@pytest.mark.parametrize("window", [1, 3, 70, 500, 0.1, 0.35, 1.0])
def test_every_statistic_matches_the_loops(window, device):
    assert_matches_loops(*problem(device), window=window)


@pytest.mark.parametrize("offset", [0.0, 9.0])
def test_values_of_any_sign(offset, device):
    x, offsets, groups = problem(device, [5, 70, 1], [0, 3])
    assert_matches_loops(2 * torch.randn_like(x) + offset, offsets, groups, ulps=4, by="min")


@pytest.mark.parametrize("by", SEQUENCE_NAMES)
@pytest.mark.parametrize("temperature", [0.1, 3.0])
def test_groups_reduce_any_statistic(by, temperature, device):
    valid = torch.arange(len(LENGTHS), device=device) % 3 != 1
    # exponents as large as 1e5 carry their own rounding into the weights
    options = {"by": by, "temperature": temperature, "valid": valid, "window": 4}
    assert_matches_loops(*problem(device), ulps=4, **options)


def test_large_groups_of_ragged_sequences(device):
    lengths = torch.randint(0, 4, (90,), device=device).tolist()
    assert_matches_loops(*problem(device, lengths, [0, 77, 77, 90]), ulps=4, by="mean")


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("window", [3, 0.1])
def test_what_is_not_finite_stays_in_its_sequence_and_group(bad, window, device):
    x, offsets, groups = problem(device)
    clean = reduce(x, offsets, groups, window=window, by="mean")
    x[offsets[8] + 40] = bad
    got = assert_matches_loops(x, offsets, groups, window=window, by="mean")
    others = [n for n in range(len(LENGTHS)) if n != 8]
    for name, y in got[0].items():
        assert torch.equal(y[others], clean[0][name][others]), name
        if bad != bad and name != "count":
            assert y[8].isnan(), name
    for name, y in got[1].items():
        kept = slice(0, 7) if len(y) == len(LENGTHS) else slice(0, 4)
        torch.testing.assert_close(y[kept], clean[1][name][kept], rtol=0, atol=0, equal_nan=True)


def test_both_infinities_make_nan_where_they_meet(device):
    x, offsets, groups = problem(device)
    x[offsets[8] + 40] = INF
    x[offsets[8] + 42] = -INF
    got, _ = assert_matches_loops(x, offsets, groups, window=4)
    assert got["lowest_window"][8].isnan()
    assert got["tail_window"][8].isfinite()


def test_nan_is_never_chosen_and_empty_groups_have_no_choice(device):
    lengths, groups = [1, 1, 1, 0, 0, 1], [0, 3, 5, 5, 6]
    x, offsets, groups = problem(device, lengths, groups)
    x[:] = torch.tensor([-2.0, NAN, -1.0, NAN], device=device)
    _, got = assert_matches_loops(x, offsets, groups)
    assert got["argmax"].tolist() == [2, -1, -1, -1]
    assert got["max"][0] == -1.0
    assert got["mean"].isnan().all()


def test_tie_goes_to_the_first_and_one_member_has_no_spread(device):
    x = torch.tensor([-1.0, -1.0, -INF, -INF, 5.0], device=device)
    offsets = torch.arange(6, device=device)
    _, got = reduce(x, offsets, torch.tensor([0, 2, 4, 5], device=device))
    assert got["argmax"].tolist() == [0, 0, 0]
    assert got["max"].tolist() == [-1.0, -INF, 5.0]
    assert got["std"][[0, 2]].tolist() == [0.0, 0.0]
    assert got["advantage"][[0, 1, 4]].tolist() == [0.0, 0.0, 0.0]
    assert got["weights"][[0, 1, 4]].tolist() == [0.5, 0.5, 1.0]
    assert got["log_mean_exp"].tolist() == [-1.0, -INF, 5.0]


def test_tie_across_tiles_goes_to_the_first(device):
    x, offsets = torch.zeros(70, device=device), torch.arange(71, device=device)
    x[:3] = -1.0
    _, got = reduce(x, offsets, torch.tensor([0, 70], device=device))
    assert got["argmax"].tolist() == [3]
    x[0], x[32] = NAN, 1.0  # one lane of the tile
    _, got = reduce(x, offsets, torch.tensor([0, 70], device=device))
    assert got["argmax"].tolist() == [32]


def test_hand_worked(device):
    x = torch.tensor([-1.0, -3.0, -2.0, 0.0, -4.0], device=device)
    offsets = torch.tensor([0, 4, 5], device=device)
    got, of_group = reduce(x, offsets, torch.tensor([0, 2], device=device), window=2, by="mean")
    want = {
        "sum": [-6, -4],
        "mean": [-1.5, -4],
        "min": [-3, -4],
        "count": [4, 1],
        "all": [0, 1],
        "lowest_window": [-2.5, -4],
        "bottom_windows": [-2.5, -4],
        "tail_window": [-1, -4],
    }
    assert {name: y.tolist() for name, y in got.items()} == want
    assert of_group["mean"].tolist() == [-2.75]
    assert of_group["std"].item() == pytest.approx(2.5 / 2**0.5)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_empty(lengths, device):
    x, offsets, groups = problem(device, lengths, [0, len(lengths)])
    got, of_group = reduce(x, offsets, groups)
    n = len(lengths)
    assert got["sum"].tolist() == got["mean"].tolist() == got["tail_window"].tolist() == [0.0] * n
    assert got["min"].tolist() == [INF] * n
    assert got["all"].tolist() == [1.0] * n
    assert of_group["argmax"].tolist() == [-1]
    assert of_group["weights"].tolist() == [0.0] * n


def test_values_outside_every_sequence_count_nowhere(device):
    x, offsets, groups = problem(device)
    edged = torch.cat([x.new_full((3,), NAN), x, x.new_full((2,), NAN)])
    for got, want in zip(
        reduce(edged, offsets + 3, groups), reduce(x, offsets, groups), strict=True
    ):
        for name, y in got.items():
            torch.testing.assert_close(y, want[name], rtol=0, atol=0, equal_nan=True)


def test_same_bits_in_any_batch(device):
    x, offsets, groups = problem(device)
    whole, of_group = reduce(x, offsets, groups, window=0.2)
    for n in range(len(LENGTHS)):
        run = x[offsets[n] : offsets[n + 1]].clone()
        alone = torch.tensor([0, len(run)], device=device)
        got, _ = reduce(run, alone, torch.tensor([0, 1], device=device), window=0.2)
        for name, y in got.items():
            assert torch.equal(y, whole[name][n : n + 1]), name
    last = slice(GROUPS[-2], GROUPS[-1])
    run = x[offsets[last.start] :]
    moved = offsets[last.start :] - offsets[last.start]
    _, got = reduce(run, moved, torch.tensor([0, len(moved) - 1], device=device))
    for name, y in got.items():
        kept = of_group[name][last] if len(y) > 1 else of_group[name][-1:]
        assert torch.equal(y, kept), name


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
        {"x": x},
        offsets,
        torch.tensor([0, 3], device=device),
        stats=SEQUENCE_NAMES,
        group_stats=GROUP_NAMES,
    )
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
        {"x": torch.zeros(10, device=device)},
        offsets,
        groups,
        stats=("count", "tail_window"),
        group_stats=("max", "weights"),
        by="mean",
    )
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
