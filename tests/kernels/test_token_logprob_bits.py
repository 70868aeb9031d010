"""A row of `token_logprob` has the same bits in any batch, in any company, for any statistics."""

import itertools
import math

import pytest
import torch

from logit_oracle import logit_problem, values, values_and_gradient
from sharpen_kernels._checks import INTERPRETED
from sharpen_kernels.stats import NAMES
from sharpen_kernels.token_logprob import token_logprob

# several blocks of rows of `small_tiles`, and ragged; the interpreter is slow
R = 6 if INTERPRETED else 20


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def problem(request, device):
    return logit_problem(R, 300, dtype=request.param, device=device)


def assert_same_bits(got, want):
    for name, x in got.items():
        assert torch.equal(x, want[name]), f"{name}: {(x != want[name]).sum()} values differ"


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("tiles", ["small", "whole"])
def test_same_bits_in_any_batch_at_any_offset(problem, n, tiles, request):
    if tiles == "small":
        request.getfixturevalue("small_tiles")
    whole = values_and_gradient(token_logprob, problem, NAMES[1:2])
    whole |= values(problem)
    for start in {0, R - n}:
        kept = slice(start, start + n)
        part = {name: problem[name][kept] for name in ("logits", "target")} | {"rows": None}
        assert_same_bits(values(part), {name: x[kept] for name, x in whole.items()})


def test_same_bits_of_a_long_row_with_any_threads(device):
    problem = logit_problem(4, 40_000, device=device)
    alone = {name: x[2:3] for name, x in values(problem).items()}
    torch.set_num_threads(2)
    try:
        for kept in (slice(2, 3), slice(1, 4)):
            part = {name: problem[name][kept] for name in ("logits", "target")} | {"rows": None}
            at = 2 - kept.start
            got = {name: x[at : at + 1] for name, x in values(part).items()}
            assert_same_bits(got, alone)
    finally:
        torch.set_num_threads(1)


@pytest.mark.usefixtures("small_tiles")
def test_same_bits_in_any_company_and_order(problem, device):
    want = values(problem)
    order = torch.randperm(R, device=device)
    shuffled = problem | {"rows": order, "target": problem["target"][order]}
    assert_same_bits(values(shuffled), {name: x[order] for name, x in want.items()})
    for other in (0.0, 1e4):
        problem["logits"][:4] = other
        problem["logits"][5:] = -other
        assert_same_bits(
            {name: x[4:5] for name, x in values(problem).items()},
            {name: x[4:5] for name, x in want.items()},
        )


@pytest.mark.usefixtures("small_tiles")
def test_same_bits_with_any_subset_of_statistics(device):
    problem = logit_problem(1, 300, device=device)
    every = values(problem)
    alone = [(name,) for name in NAMES]
    but_one = [tuple(name for name in NAMES if name != left_out) for left_out in NAMES]
    pairs = [] if INTERPRETED else list(itertools.combinations(NAMES, 2))
    for stats in alone + but_one + pairs:
        assert_same_bits(values(problem, stats), every)


@pytest.mark.usefixtures("small_tiles")
def test_same_bits_twice_and_without_padding(problem, device):
    want = values_and_gradient(token_logprob, problem)
    assert_same_bits(values_and_gradient(token_logprob, problem), want)
    wide = torch.cat([problem["logits"], torch.full((R, 84), math.nan, device=device)], dim=1)
    got = values_and_gradient(
        token_logprob, problem | {"logits": wide.to(problem["logits"].dtype)}, vocab_size=300
    )
    assert (got["dlogits"][:, 300:] == 0).all()
    got["dlogits"] = got["dlogits"][:, :300]
    assert_same_bits(got, want)
