"""The fused route of `linear_logprob` alone: its kernels in tiles so small that all edges show."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.oracle import (
    DIFFERENTIABLE,
    assert_matches_fp64,
    head_problem,
    values,
    values_and_gradients,
)
from sharpen_kernels import _tiles, linear_logprob
from sharpen_kernels._checks import INTERPRETED
from sharpen_kernels.stats import NAMES

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="needs a GPU, or TRITON_INTERPRET=1",
)

TINY = {"BLOCK_R": 16, "BLOCK_V": 16, "BLOCK_D": 16, "SEGMENT": 32, "GROUP_R": 2}
TINY |= {"PIECES": 2, "PASS_PIECES": 1, "num_warps": 4, "route": "fused"}
EVERYTHING = {"temperature": 0.7, "softcap": 9.0, "renyi_order": 0.5, "k": 5}


@pytest.fixture
def tiles(monkeypatch):
    """A function that changes every tile of the table."""
    table = _tiles.tile

    def change(**fields):
        found = TINY | fields
        monkeypatch.setattr(_tiles, "tile", lambda *a: dataclasses.replace(table(*a), **found))

    change()
    return change


@pytest.fixture
def programs(monkeypatch):
    """A function that sets how many programs share the units of work."""
    from sharpen_kernels import _linear_logprob_triton as fused

    def change(n):
        monkeypatch.setattr(fused, "_programs", lambda call, units, device: min(n, units))

    change(3)
    return change


def rich_problem(R, V, D, S, device, dtype=torch.float32):
    """A bias, masked columns, several pairs a row, and ties of the maximum."""
    problem = head_problem(R, V, D, S=S, device=device, dtype=dtype, bias=True)
    return problem, {"vocab_mask": torch.arange(V, device=device) % 7 != 3}


def assert_same_bits(got, want):
    for name, x in got.items():
        torch.testing.assert_close(x, want[name], rtol=0, atol=0, equal_nan=True, msg=name)


# one of everything; a block and one more on every axis; whole tiles, segments and blocks of D;
# fewer rows than a block under many segments
@pytest.mark.parametrize(
    ("R", "V", "D"), [(1, 1, 1), (17, 33, 17), (32, 64, 32), (3, 150, 8)], ids=str
)
@pytest.mark.parametrize("pairs", [False, True], ids=["a pair a row", "any pairs"])
@pytest.mark.usefixtures("tiles", "programs")
def test_every_statistic_and_gradient(R, V, D, pairs, device):
    problem, mask = rich_problem(R, V, D, 2 * R if pairs else None, device)
    assert_matches_fp64(problem, **EVERYTHING, **mask)
    assert_matches_fp64(problem | {"bias": None}, vocab_size=(V + 1) // 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("tiles", "programs")
def test_half_precision(dtype, device):
    problem, mask = rich_problem(19, 70, 24, None, device, dtype)
    assert_matches_fp64(problem, **mask)


@pytest.mark.parametrize("n", [1, 2, 10_000])
def test_bits_do_not_depend_on_the_number_of_programs(n, tiles, programs, device):
    problem, mask = rich_problem(33, 103, 20, 40, device)
    want = values(problem, **mask)
    programs(n)
    assert_same_bits(values(problem, **mask), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_descriptors_and_pointers_agree_bit_for_bit(dtype, tiles, programs, device):
    from sharpen_kernels import _linear_logprob_triton as fused

    problem, mask = rich_problem(18, 70, 40, 30, device, dtype)
    tiles(tma=True)
    assert fused._by_tma(problem["hidden"])
    want = values_and_gradients(linear_logprob, problem, **mask)
    tiles(tma=False)
    assert_same_bits(values_and_gradients(linear_logprob, problem, **mask), want)
    tiles(tma=True)
    # amid what must not be read; on 16 bytes, and one element further on
    for start in (8, 1):
        aside = {}
        for name in ("hidden", "weight"):
            x = problem[name]
            wide = x.new_full((x.shape[0] + 2, x.shape[1] + 16), float("nan"))
            aside[name] = wide[1:-1, start : start + x.shape[1]]
            aside[name].copy_(x)
            assert fused._by_tma(aside[name]) == (start == 8)
        assert_same_bits(values_and_gradients(linear_logprob, problem | aside, **mask), want)


def test_what_the_copy_engine_cannot_read():
    from sharpen_kernels import _linear_logprob_triton as fused

    x = torch.zeros(16, 32)
    assert fused._by_tma(x)
    assert not fused._by_tma(x.T)
    assert not fused._by_tma(x[:, ::2])
    assert not fused._by_tma(torch.zeros(16, 31))
    assert not fused._by_tma(x[:1].expand(16, 32))


@pytest.mark.parametrize("budget", ["PARTIALS_BYTES", "PASS_BYTES"])
def test_passes_of_few_rows_change_no_bit(budget, tiles, programs, monkeypatch, device):
    from sharpen_kernels import _linear_logprob_triton as fused

    for S in (None, 40):
        problem, mask = rich_problem(34, 40, 20, S, device)
        want = values(problem, **mask)
        with monkeypatch.context() as patch:
            patch.setattr(fused, budget, 1)
            assert_same_bits(values(problem, **mask), want)


@pytest.mark.parametrize("S", [None, 40])
def test_gradients_in_many_passes_and_waves(S, tiles, programs, monkeypatch, device):
    from sharpen_kernels import _linear_logprob_triton as fused

    monkeypatch.setattr(fused, "GRADIENT_BYTES", 1)  # 32 rows by 16 columns
    problem, mask = rich_problem(35, 40, 20, S, device)
    assert_matches_fp64(problem, stats=DIFFERENTIABLE, softcap=20.0, **mask)


@pytest.mark.usefixtures("tiles", "programs")
def test_rank_and_topk_over_ties(device):
    problem = head_problem(2, 90, 8, device=device)
    tied = [5, 15, 16, 40, 80]  # within a tile, in the next one, and in later segments
    problem["weight"][tied] = 9 * problem["hidden"][0]
    problem["rows"] = torch.zeros(5, dtype=torch.int64, device=device)
    problem["target"] = torch.tensor(tied[::-1], device=device)
    got = values(problem, ("rank", "topk", "topk_id", "logprob", "margin", "is_greedy"), k=6)
    assert got["rank"].tolist() == [5, 4, 3, 2, 1]
    assert got["is_greedy"].tolist() == [0, 0, 0, 0, 1]
    assert got["topk_id"][0].tolist()[:5] == tied
    assert torch.equal(got["topk"][:, 0], got["logprob"])
    assert (got["margin"] == 0).all()


@pytest.mark.usefixtures("tiles", "programs")
def test_first_of_topk_is_the_greedy_logprob(device):
    problem, mask = rich_problem(20, 103, 24, None, device)
    top1 = values(problem, ("top1",), **mask)["top1"]
    got = values(problem | {"target": top1}, **mask)
    assert (got["is_greedy"] == 1).all()
    assert (got["rank"] == 1).all()
    assert torch.equal(got["topk"][:, 0], got["logprob"])
    assert torch.equal(got["topk_id"][:, 0], top1)
    torch.testing.assert_close(got["topk"][:, 0] - got["topk"][:, 1], got["margin"])


class NoSync(TorchDispatchMode):
    """Fails at what would wait for a GPU."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not name.startswith(self.WAITS), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("S", [None, 30])
def test_nothing_waits_for_the_device(S, tiles, programs, device):
    from sharpen_kernels import _linear_logprob_triton as fused
    from sharpen_kernels._head import Head, Transform
    from sharpen_kernels._state import Pairs, finish
    from sharpen_kernels.stats import Wanted

    problem = head_problem(20, 70, 16, S=S, device=device)
    head = Head(problem["weight"], None, Transform(1.0, None, 70))
    hidden, target = problem["hidden"], problem["target"]
    grads = {name: torch.ones_like(target, dtype=torch.float32) for name in DIFFERENTIABLE}
    with NoSync():
        pairs = Pairs.of(target, problem["rows"], 20)
        part, chosen = fused.forward(hidden, head, pairs, Wanted(NAMES))
        fused.ranks(hidden, head, pairs, chosen)
        state = finish(part).state()
        found = fused.backward(grads, state, hidden, head, pairs, (True, True, False))
    assert all(x.isfinite().all() for x in found[:2])


def test_row_without_gradient_is_exactly_zero_whatever_it_holds(tiles, programs, device):
    problem, mask = rich_problem(20, 70, 16, None, device)
    problem["target"][3] = -100
    problem["target"][4] = 70
    clean = values_and_gradients(linear_logprob, problem, stats=DIFFERENTIABLE, **mask)
    problem["hidden"][3:5] = float("nan")
    got = values_and_gradients(linear_logprob, problem, stats=DIFFERENTIABLE, **mask)
    for name in ("dhidden", "dweight", "dbias"):
        assert torch.equal(got[name], clean[name]), name
    assert (got["dhidden"][3:5] == 0).all()
    assert (got["dweight"][3::7] == 0).all()
    assert (got["dbias"][3::7] == 0).all()
