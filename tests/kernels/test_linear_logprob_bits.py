"""A token's bits do not depend on its batch, its place, the other statistics, or the run."""

import itertools

import pytest
import torch

from oracle import head_problem, values, values_and_gradients
from sharpen_kernels._checks import exact_matmul
from sharpen_kernels.linear_logprob import linear_logprob
from sharpen_kernels.stats import NAMES

DTYPES = [torch.float32, torch.bfloat16]
R = 1030  # more than a block of rows on every route, and ragged


@pytest.fixture(params=DTYPES, ids=str)
def problem(request, device):
    # 40 is no multiple of a tile
    return head_problem(R, 300, 40, dtype=request.param, device=device, bias=True)


def rows_of(problem, start, stop):
    return problem | {name: problem[name][start:stop] for name in ("hidden", "target")}


def assert_same_bits(got, want):
    for name, x in got.items():
        assert torch.equal(x, want[name]), f"{name}: {(x != want[name]).sum()} values differ"


@pytest.mark.parametrize("n", [1, 7, 128, 1000])
@pytest.mark.usefixtures("small_segments")
def test_any_batch_at_any_offset(problem, n):
    whole = values(problem)
    for start in (0, min(63, R - n), R - n):
        part = values(rows_of(problem, start, start + n))
        assert_same_bits(part, {name: x[start : start + n] for name, x in whole.items()})


@pytest.mark.usefixtures("small_segments")
def test_any_company_of_rows(problem):
    alone = values(rows_of(problem, 5, 6))
    for other in (0.0, 1e4):
        problem["hidden"][:5] = other
        problem["hidden"][6:] = -other
        assert_same_bits({name: x[5:6] for name, x in values(problem).items()}, alone)


@pytest.mark.usefixtures("small_segments")
def test_any_order_of_pairs(problem, device):
    order = torch.randperm(R, device=device)
    shuffled = problem | {"rows": order, "target": problem["target"][order]}
    assert_same_bits(values(shuffled), {name: x[order] for name, x in values(problem).items()})


@pytest.mark.usefixtures("small_segments")
def test_any_subset_of_statistics(device):
    problem = head_problem(5, 140, 40, device=device)
    every = values(problem)
    for n in (1, 2, len(NAMES) - 1):
        for stats in itertools.combinations(NAMES, n):
            assert_same_bits(values(problem, stats), every)


@pytest.mark.usefixtures("small_segments")
def test_twice(problem):
    assert_same_bits(
        values_and_gradients(linear_logprob, problem), values_and_gradients(linear_logprob, problem)
    )


def test_padding_of_the_vocabulary(device):
    problem = head_problem(9, 300, 40, device=device)
    wide = problem | {"weight": torch.cat([problem["weight"], torch.randn(84, 40, device=device)])}
    assert_same_bits(values(wide, vocab_size=300), values(problem))


def test_products_stay_exact_under_autocast(device):
    x = torch.randn(3, 3, device=device)
    with torch.autocast(device, torch.bfloat16), exact_matmul(torch.device(device)):
        assert (x @ x).dtype == torch.float32


def test_whatever_the_precision_settings_say(device):
    problem = head_problem(70, 300, 40, device=device)
    want = values_and_gradients(linear_logprob, problem)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast(device, torch.bfloat16):
            got = values_and_gradients(linear_logprob, problem)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert_same_bits(got, want)
