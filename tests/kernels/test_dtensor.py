"""`linear_logprob` of DTensors and under FSDP2, on two gloo ranks."""

import re

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from helpers.oracle import head_problem, values_and_gradients
from helpers.two_ranks import (
    Model,
    Ranks,
    assert_found_matches_fp64,
    score_dtensors,
    score_on_mesh,
    train_step,
)
from sharpen_kernels import linear_logprob
from sharpen_kernels.stats import NAMES

WHOLE, ROWS = [Replicate()], [Shard(0)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(tmp_path_factory.mktemp("gloo"))
    yield ranks
    ranks.close()


@pytest.mark.parametrize("others", [(), ("hidden", "target", "rows")], ids=["tensor", "dtensor"])
@pytest.mark.parametrize("layout", [WHOLE, ROWS], ids=str)
def test_whole_or_cut_by_rows(layout, others, ranks):
    problem = head_problem(24, 61, 24, S=40, bias=True)
    options = {"vocab_mask": torch.arange(61) % 7 != 3, "temperature": 0.8}
    layouts = {"weight": layout, "bias": layout} | dict.fromkeys(others, WHOLE)
    (first, of_first), (second, of_second) = ranks.call(
        score_dtensors, problem, layouts, NAMES, options
    )
    assert_found_matches_fp64(first, problem, NAMES, **options)
    assert all(torch.equal(x, second[name]) for name, x in first.items())
    for n, found in zip((31, 30), (of_first, of_second), strict=True):
        assert found["dweight"] == (tuple(layout), (61 if layout == WHOLE else n, 24))
        assert found["dbias"] == (tuple(layout), (61 if layout == WHOLE else n,))
        if others:
            assert found["dhidden"] == (tuple(WHOLE), (24, 24))


def test_a_rank_may_be_without_rows(ranks):
    problem = head_problem(3, 1, 8, bias=True)
    layouts = {"weight": ROWS, "bias": ROWS}
    (first, _), (second, of_second) = ranks.call(score_dtensors, problem, layouts, NAMES, {})
    assert of_second["dweight"] == (tuple(ROWS), (0, 8))
    want = values_and_gradients(linear_logprob, problem)
    for name, x in first.items():
        torch.testing.assert_close(x, want[name], msg=name)
        assert torch.equal(x, second[name]), name


BAD = [
    (
        (2,),
        {"weight": [Shard(1)]},
        r"`weight` must be replicated, or .* got \(Shard\(dim=1\),\) ov",
    ),
    ((2, 1), {"weight": [*WHOLE, *ROWS]}, r"`weight` must be .* over a mesh of shape \(2, 1\); ga"),
    ((2,), {"weight": ROWS, "hidden": ROWS}, r"`hidden` must be whole on every rank, got \(Shard"),
    ((2,), {"hidden": [Shard(1)]}, r"`hidden` must be whole on every rank, got \(Shard\(dim=1"),
    ((2,), {"weight": WHOLE, "bias": ROWS}, r"`bias` must be whole on every rank, got \(Shard"),
    ((2,), {"weight": ROWS, "bias": WHOLE}, r"`bias` must be laid out as `weight` is, \(Shard"),
    ((2,), {"weight": ROWS}, r"`bias` must be a DTensor laid out as `weight` is, .* got a tensor"),
]


@pytest.mark.parametrize(("shape", "layouts", "message"), BAD, ids=[m for *_, m in BAD])
def test_other_layouts_are_refused(shape, layouts, message, ranks):
    problem = head_problem(4, 10, 4, bias=True)
    for error in ranks.errors(score_on_mesh, problem, layouts, shape):
        assert error is not None
        assert error[0] is ValueError
        assert re.search(message, error[1])


def tokens_and_model():
    model = Model(40, 8)
    return torch.randint(40, (10,)), torch.randint(40, (10,)), model


def test_fsdp_has_the_gradients_of_one_process(ranks):
    tokens, target, model = tokens_and_model()
    found = ranks.call(train_step, model.state_dict(), tokens, target, False)
    loss = model(tokens, target)
    loss.backward()
    torch.testing.assert_close(found[0][0] + found[1][0], loss.detach())
    for _, grads in found:
        for name, x in model.named_parameters():
            # FSDP averages over ranks
            torch.testing.assert_close(2 * grads[name], x.grad, msg=name)


def test_fsdp_of_the_head_alone_says_to_unshard(ranks):
    tokens, target, model = tokens_and_model()
    for error in ranks.errors(train_step, model.state_dict(), tokens, target, True):
        assert error is not None
        assert "must be the same on every rank, got others" in error[1]
        assert "`module.unshard()`" in error[1]
