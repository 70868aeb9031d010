"""Shards of a head, merged: any cut gives the statistics of the whole."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.oracle import assert_as_accurate, head_problem, values
from sharpen_kernels import _linear_logprob_torch as blocked
from sharpen_kernels import vocab_parallel
from sharpen_kernels._head import Head, Transform
from sharpen_kernels.linear_logprob import linear_logprob_reference
from sharpen_kernels.stats import NAMES, Wanted


@pytest.fixture(autouse=True)
def _several_segments_a_shard(monkeypatch):
    monkeypatch.setattr(blocked, "SEGMENT_ELEMENTS", 1)


def shards(problem, sizes, vocab_mask, vocab_size, temperature=1.0, softcap=None):
    """Each shard of the head; no mask where all its columns count."""
    for start, stop in itertools.pairwise(itertools.accumulate(sizes, initial=0)):
        whole = problem["weight"], problem["bias"], vocab_mask
        weight, bias, mask = (None if x is None else x[start:stop] for x in whole)
        mask = None if mask is None or mask.all() else mask
        transform = Transform(temperature, softcap, vocab_size, mask)
        yield vocab_parallel._Shard.of(start, Head(weight, bias, transform))


def call_of(problem, vocab_size, stats=NAMES, renyi_order=2.0, k=20, ignore_index=-100):
    """What the shards of a call have in common."""
    target, rows, R = problem["target"], problem["rows"], len(problem["hidden"])
    wanted = Wanted(tuple(stats), renyi_order, k)
    return vocab_parallel._Call(target, rows, R, vocab_size, ignore_index, wanted)


def whole(problem, sizes, stats=NAMES, *, vocab_mask=None, vocab_size=None, **options):
    """Statistics by name, through the packed state of each shard."""
    vocab_size = sum(sizes) if vocab_size is None else vocab_size
    of_head = {n: options.pop(n) for n in ("temperature", "softcap") if n in options}
    call = call_of(problem, vocab_size, stats, **options)
    cuts = list(shards(problem, sizes, vocab_mask, vocab_size, **of_head))
    hidden = problem["hidden"]
    parts = [shard.read(hidden, call) for shard in cuts]
    sent = [part.pack() for part in parts]
    merged = vocab_parallel._merged([parts[-1].unpack(x) for x in sent], call.wanted.renyi_order)
    ahead = sum(shard.ahead(hidden, call, merged.chosen) for shard in cuts)
    found, _ = merged.values(ahead if "rank" in stats else None, call)
    return found.by_name(call.wanted)


def assert_whole_matches_fp64(problem, sizes, **options):
    got = whole(problem, sizes, **options)
    wide = {name: problem[name] for name in ("hidden", "weight", "bias")}
    low, truth = (
        values(
            problem | {n: None if x is None else x.to(dtype) for n, x in wide.items()},
            fn=linear_logprob_reference,
            **options,
        )
        for dtype in (torch.float32, torch.float64)
    )
    for name in NAMES:
        assert_as_accurate(name, got[name], low[name], truth[name])


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 2, 30, 63, 64, 65, 130]), min_size=1, max_size=5),
    padding=st.integers(0, 200),
    masked=st.sampled_from(["nothing", "some", "first shard", "last shard"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    forks=st.booleans(),
    options=st.sampled_from([{}, {"temperature": 0.7, "softcap": 5.0}, {"renyi_order": 0.5}]),
)
def test_any_cut_gives_the_whole(sizes, padding, masked, dtype, forks, options):
    V = sum(sizes) + (sum(sizes) == 0)
    sizes = [*sizes, V - sum(sizes)]
    vocab_size = max(1, V - padding)
    torch.manual_seed(V)
    problem = head_problem(9, V, 17, S=16 if forks else None, dtype=dtype, bias=True)
    problem["target"] %= vocab_size
    mask = torch.ones(V, dtype=torch.bool)
    if masked == "some":
        mask = torch.rand(V) < 0.5
    elif masked != "nothing":
        side = slice(0, sizes[0]) if masked == "first shard" else slice(V - sizes[-2], V)
        mask[side] = False
    mask[0] |= not mask[:vocab_size].any()
    assert_whole_matches_fp64(
        problem, sizes, vocab_mask=mask, vocab_size=vocab_size, k=5, **options
    )


def small_integers(R, V, D):
    """A problem whose logits are exact in fp32, with many ties."""
    problem = head_problem(R, V, D)
    for name in ("hidden", "weight"):
        problem[name] = torch.randint(-2, 3, problem[name].shape).float()
    return problem


def test_ties_across_an_edge_go_to_the_lowest_column():
    problem = small_integers(20, 90, 3)
    got = whole(problem, [30, 1, 40, 19], k=32)
    want = values(problem, fn=linear_logprob_reference, k=32)
    for name in ("top1", "topk_id", "rank", "is_greedy", "margin"):
        assert torch.equal(got[name], want[name]), name
    assert (want["margin"] == 0).sum() > 5


def test_rank_1_is_greedy():
    problem = head_problem(1, 150, 8, S=150)
    problem |= {"rows": torch.zeros(150, dtype=torch.int64), "target": torch.arange(150)}
    got = whole(problem, [70, 80])
    assert torch.equal(got["rank"] == 1, got["is_greedy"] == 1)
    assert sorted(got["rank"].tolist()) == list(range(1, 151))


def test_targets_outside_or_ignored_and_nan_rows_are_as_in_one_piece():
    problem = head_problem(7, 90, 8)
    problem["target"] = torch.tensor([3, 89, -100, 90, -1, 2**62, -(2**63)])
    problem["hidden"][1] = float("nan")
    got, want = whole(problem, [30, 60]), values(problem)
    for name in NAMES:
        torch.testing.assert_close(got[name], want[name], equal_nan=True, msg=name)
    assert got["logprob"].isnan().tolist() == [False, True, False, True, True, True, True]


def test_an_ignored_target_may_be_a_column():
    problem = head_problem(3, 90, 8)
    problem["target"] = torch.tensor([0, 40, 5])
    got = whole(problem, [30, 60], ("logprob", "rank"), ignore_index=40)
    assert got["logprob"][1] == got["rank"][1] == 0
    assert (got["logprob"][[0, 2]] < 0).all()


def test_no_column_left_is_nothing():
    problem = head_problem(2, 6, 4)
    got = whole(problem, [3, 3], ("lse", "entropy", "top1"), vocab_mask=torch.zeros(6).bool())
    assert got["lse"].tolist() == [-float("inf")] * 2
    assert got["entropy"].isnan().all()
    assert got["top1"].tolist() == [-1, -1]


@pytest.mark.parametrize(("R", "S"), [(0, 0), (0, 3), (3, 0)])
def test_empty(R, S):
    problem = head_problem(max(R, 1), 9, 4, S=S)
    problem["hidden"] = problem["hidden"][:R]
    got, want = whole(problem, [4, 5], k=3), values(problem, k=3)
    for name in NAMES:
        torch.testing.assert_close(got[name], want[name], equal_nan=True, msg=name)


def read(problem, start, vocab_size, stats, k=20):
    """What one shard knows."""
    call = call_of(problem, vocab_size, stats, k=k)
    head = Head(problem["weight"], problem["bias"], Transform(1.0, None, vocab_size))
    return vocab_parallel._Shard.of(start, head).read(problem["hidden"], call)


@pytest.mark.parametrize("start", [2**24 + 1, 2**31 + 1, 2**40 + 1])
def test_ids_survive_packing_exactly(start):
    problem = head_problem(3, 8, 4)
    problem["target"] += start
    part = read(problem, start, 2**41, ("top1", "topk_id", "is_greedy"), k=2)
    again = part.unpack(part.pack())
    assert again.state.column.tolist() == part.state.column.tolist()
    assert again.state.best_column.tolist() == part.state.best_column.tolist()
    assert (again.state.column >= start).all()
    assert torch.equal(again.chosen, part.chosen)


def test_a_pack_is_a_few_floats_a_row_and_one_a_pair():
    problem = head_problem(5, 90, 8, S=11)
    of = {"logprob": 2, "entropy": 3, "self_certainty": 4, "is_greedy": 4, "topk": 2 + 3 * 4}
    for name, floats in of.items():
        packed = read(problem, 0, 90, (name,), k=4).pack()
        assert packed.dtype == torch.float32
        assert packed.shape == (floats * 5 + 11,), name


def test_one_shard_has_the_bits_of_the_whole():
    problem = head_problem(5, 200, 8, S=9, bias=True)
    want = values(problem)
    for sizes in ([200], [200, 0], [0, 200, 0]):
        got = whole(problem, sizes)
        assert all(torch.equal(got[name], want[name]) for name in NAMES)
