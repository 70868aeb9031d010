"""Shards of a head, merged: any cut gives the statistics of the whole."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.oracle import assert_as_accurate, head_problem, values
from sharpen_kernels import Partials, merge, partials, ranks_ahead
from sharpen_kernels import _linear_logprob_chunk as chunked
from sharpen_kernels.linear_logprob import linear_logprob, linear_logprob_reference
from sharpen_kernels.stats import NAMES


@pytest.fixture(autouse=True)
def _several_segments_a_shard(monkeypatch):
    monkeypatch.setattr(chunked, "SEGMENT_ELEMENTS", 1)


def shards(problem, sizes, vocab_mask=None):
    """Start, and arguments of `partials`, of each shard; no mask where all its columns count."""
    for start, stop in itertools.pairwise(itertools.accumulate(sizes, initial=0)):
        own = {name: problem[name] for name in ("weight", "bias")} | {"vocab_mask": vocab_mask}
        own = {name: None if x is None else x[start:stop] for name, x in own.items()}
        if own["vocab_mask"] is not None and own["vocab_mask"].all():
            own["vocab_mask"] = None
        yield start, problem | own


def whole(problem, sizes, stats=NAMES, *, vocab_mask=None, vocab_size=None, **options):
    """Statistics through packed partials of each shard."""
    cuts = list(shards(problem, sizes, vocab_mask))
    vocab_size = sum(sizes) if vocab_size is None else vocab_size
    asked = {"vocab_size": vocab_size, "stats": stats, **options}
    parts = [partials(**own, start=start, **asked) for start, own in cuts]
    sent = [(part.pack(), part.start, part.stop) for part in parts]
    merged = merge([parts[-1].unpack(*part) for part in sent])
    again = {name: options[name] for name in ("temperature", "softcap") if name in options}
    ahead = torch.zeros_like(problem["target"])
    for start, own in cuts:
        own = {name: own[name] for name in ("hidden", "weight", "bias", "vocab_mask")}
        ahead += ranks_ahead(**own, merged=merged, start=start, **again)
    return merged.finish(ahead if "rank" in stats else None)


def assert_whole_matches_fp64(problem, sizes, **options):
    got = vars(whole(problem, sizes, **options))
    wide = {name: problem[name] for name in ("hidden", "weight", "bias")}
    low, truth = (
        values(
            problem | {n: None if x is None else x.to(dtype) for n, x in wide.items()},
            fn=linear_logprob_reference, **options,
        )
        for dtype in (torch.float32, torch.float64)
    )  # fmt: skip
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
    got = vars(whole(problem, [30, 1, 40, 19], k=32))
    want = values(problem, fn=linear_logprob_reference, k=32)
    for name in ("top1", "topk_id", "rank", "is_greedy", "margin"):
        assert torch.equal(got[name], want[name]), name
    assert (want["margin"] == 0).sum() > 5


def test_rank_1_is_greedy():
    problem = head_problem(1, 150, 8, S=150)
    problem |= {"rows": torch.zeros(150, dtype=torch.int64), "target": torch.arange(150)}
    got = whole(problem, [70, 80])
    assert torch.equal(got.rank == 1, got.is_greedy == 1)
    assert sorted(got.rank.tolist()) == list(range(1, 151))


def test_targets_outside_or_ignored_and_nan_rows_are_as_in_one_piece():
    problem = head_problem(7, 90, 8)
    problem["target"] = torch.tensor([3, 89, -100, 90, -1, 2**62, -(2**63)])
    problem["hidden"][1] = float("nan")
    got, want = vars(whole(problem, [30, 60])), values(problem)
    for name in NAMES:
        torch.testing.assert_close(got[name], want[name], equal_nan=True, msg=name)
    assert got["logprob"].isnan().tolist() == [False, True, False, True, True, True, True]


def test_an_ignored_target_may_be_a_column():
    problem = head_problem(3, 90, 8)
    problem["target"] = torch.tensor([0, 40, 5])
    got = whole(problem, [30, 60], ("logprob", "rank"), ignore_index=40)
    assert got.logprob[1] == got.rank[1] == 0
    assert (got.logprob[[0, 2]] < 0).all()


def test_no_column_left_is_nothing():
    problem = head_problem(2, 6, 4)
    got = whole(problem, [3, 3], ("lse", "entropy", "top1"), vocab_mask=torch.zeros(6).bool())
    assert got.lse.tolist() == [-float("inf")] * 2
    assert got.entropy.isnan().all()
    assert got.top1.tolist() == [-1, -1]


@pytest.mark.parametrize(("R", "S"), [(0, 0), (0, 3), (3, 0)])
def test_empty(R, S):
    problem = head_problem(max(R, 1), 9, 4, S=S)
    problem["hidden"] = problem["hidden"][:R]
    got, want = vars(whole(problem, [4, 5], k=3)), values(problem, k=3)
    for name in NAMES:
        torch.testing.assert_close(got[name], want[name], equal_nan=True, msg=name)


@pytest.mark.parametrize("start", [2**24 + 1, 2**31 + 1, 2**40 + 1])
def test_ids_survive_packing_exactly(start):
    problem = head_problem(3, 8, 4)
    problem["target"] += start
    part = partials(
        **problem, start=start, vocab_size=2**41, stats=("top1", "topk_id", "is_greedy"), k=2
    )
    again = part.unpack(part.pack(), part.start, part.stop)
    assert again.state.column.tolist() == part.state.column.tolist()
    assert again.state.best_column.tolist() == part.state.best_column.tolist()
    assert (again.state.column >= start).all()
    assert torch.equal(again.chosen, part.chosen)


def test_a_pack_is_a_few_floats_a_row_and_one_a_pair():
    problem = head_problem(5, 90, 8, S=11)
    of = {"logprob": 2, "entropy": 3, "self_certainty": 4, "is_greedy": 4, "topk": 2 + 3 * 4}
    for name, floats in of.items():
        packed = partials(**problem, start=0, vocab_size=90, stats=(name,), k=4).pack()
        assert packed.dtype == torch.float32
        assert packed.shape == (floats * 5 + 11,), name


def test_one_shard_has_the_bits_of_the_whole():
    problem = head_problem(5, 200, 8, S=9, bias=True)
    want = values(problem)
    for sizes in ([200], [200, 0], [0, 200, 0]):
        got = vars(whole(problem, sizes))
        assert all(torch.equal(got[name], want[name]) for name in NAMES)


def test_a_shard_keeps_no_graph():
    problem = head_problem(3, 20, 4)
    problem["hidden"].requires_grad_()
    assert not whole(problem, [5, 15]).logprob.requires_grad
    assert linear_logprob(**problem).logprob.requires_grad


def part(**change) -> Partials:
    problem = head_problem(3, 20, 4)
    call = {"start": 0, "vocab_size": 40, "stats": ("logprob",)} | change
    return partials(**problem, **call)


BAD = [
    (lambda: part(start=-1), r"`start` must be at least 0, got -1"),
    (lambda: part(vocab_size=0), r"`vocab_size` must be at least 1, got 0"),
    (lambda: part(vocab_mask=torch.ones(40).bool()), r"`vocab_mask` must have shape \(v\)=\(20,\)"),
    (lambda: part(vocab_mask=torch.ones(20).bool().to("meta")), r"`vocab_mask` must be on cpu"),
    (lambda: part().finish(), r"columns 0..39 to finish, got 0..19; `merge` those"),
    (lambda: part(start=20).finish(), r"columns 0..39 to finish, got 20..39"),
    (lambda: part(vocab_size=20, stats=("rank",)).finish(), r"`ahead` must be .* `ranks_ahead`"),
    (lambda: merge([]), r"`parts` must hold partials of at least one shard, got none"),
    (lambda: merge([part(start=20), part()]), r"before 40 followed by one from 0; sort them"),
    (lambda: merge([part(), part(start=20, vocab_size=39)]), r"`parts` must be of one call, got"),
    (lambda: part().unpack(torch.zeros(8), 0, 20), r"`packed` must have shape \(n\)=\(9,\)"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_errors_say_name_wanted_got_fix(call, message):
    with pytest.raises(ValueError, match=message):
        call()
