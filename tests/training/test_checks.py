"""Losses refuse what has no optimum or no mean: one line that says what, and what it was."""

import inspect
import math

import pytest
import torch

from sharpen.errors import InputError
from sharpen.training.groups import Batch, Group
from sharpen.training.losses import Dpo, Likelihood, Square, dpo_loss, nll, square_loss, xpo_loss
from sharpen.training.xpo import optimism_weight, proof_alpha, regularised_value

NAN, INF = math.nan, math.inf
L = torch.tensor([-3.0, -4.0, -6.0], dtype=torch.float64)
PAIRS = torch.tensor([[0, 1], [2, 1]])
NONE = torch.zeros(0, 2, dtype=torch.int64)
TOKENS, OFFSETS = torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 2, 3])
YES = torch.ones(3, dtype=torch.bool)
LOSSES = {
    "square": lambda beta, pairs=PAIRS: square_loss(L, L, pairs, beta=beta),
    "xpo": lambda beta, pairs=PAIRS: xpo_loss(L, L, L, pairs, beta=beta, optimism=0.1),
    "dpo": lambda beta, pairs=PAIRS: dpo_loss(L, pairs, beta=beta),
}
VALUE = {"value": lambda beta: regularised_value(L, L, YES, beta=beta)}


def weights(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.0, -1.0, NAN, INF])
@pytest.mark.parametrize("loss", (LOSSES | VALUE).values(), ids=[*LOSSES, *VALUE])
def test_a_beta_without_an_optimum_is_refused(loss, beta):
    with pytest.raises(InputError, match=f"`beta` must be above 0 and finite, got {beta}; try 1."):
        loss(beta)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (NONE, r"be of shape \[Q, 2\] with Q at least 1, got \[0, 2\]"),
        (torch.tensor([[0, 3]]), r"hold indices in \[0, 3\), got 3"),
        (torch.tensor([[0, -1]]), r"hold indices in \[0, 3\), got -1"),
    ],
    ids=["none", "high", "low"],
)
def test_pairs_of_nothing_are_refused(name, pairs, message):
    with pytest.raises(InputError, match=f"`pairs` must {message}"):
        LOSSES[name](1.0, pairs)


def test_pairs_are_looked_at_on_the_cpu_alone():
    # a device whose values cannot be read at all stands for a GPU, where reading would wait
    pairs, values = PAIRS.to("meta"), L.to("meta")
    assert square_loss(values, values, pairs, beta=1.0).shape == ()
    assert nll(TOKENS, OFFSETS, weights(1, 1)).item() == pytest.approx(7 / 3)
    with pytest.raises(InputError, match="with Q at least 1"):
        dpo_loss(values, NONE.to("meta"), beta=1.0)


@pytest.mark.parametrize("optimism", [-1.0, NAN, INF])
def test_pessimism_is_refused(optimism):
    with pytest.raises(InputError, match="`optimism` must be at least 0 and finite, got"):
        xpo_loss(L, L, L, PAIRS, beta=1.0, optimism=optimism)
    with pytest.raises(InputError, match="`optimism` must be at least 0 and finite, got"):
        Square(1.0, optimism)
    for at, name in enumerate(("alpha", "value_bound", "reward_bound")):
        given = [1.0, 1.0, 1.0]
        given[at] = optimism
        with pytest.raises(InputError, match=f"`{name}` must be at least 0 and finite"):
            optimism_weight(*given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((-1.0, 1.0, 1.0, 1.0, 2), "`exploration` must be at least 0"),
        ((1.0, 0.0, 1.0, 1.0, 2), "`beta` must be above 0"),
        ((1.0, 1.0, NAN, 1.0, 2), "`value_bound` must be at least 0"),
        ((1.0, 1.0, 1.0, -1.0, 2), "`reward_bound` must be at least 0"),
        ((1.0, 1.0, 1.0, 1.0, 0), "`rounds` must be a whole number of at least 1, got 0"),
    ],
)
def test_an_alpha_of_nothing_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        proof_alpha(*given)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (weights(1.0, NAN), "`weight` must be finite and at least 0, got nan"),
        (weights(1.0, INF), "`weight` must be finite and at least 0, got inf"),
        (weights(2.0, -1.0), "`weight` must be finite and at least 0, got -1.0"),
        (weights(0.0, 0.0), "`weight` must be above 0 somewhere, got 0 everywhere"),
    ],
    ids=["nan", "inf", "negative", "zero"],
)
def test_weights_without_a_mean_are_refused(weight, message):
    with pytest.raises(InputError, match=message):
        nll(TOKENS, OFFSETS, weight)
    group = Group([1], [[1, 2], [3]], weight=weight.tolist())
    with pytest.raises(InputError, match=message):
        Likelihood()(TOKENS, Batch.of([group]))


# below the check of types that tests run under
plain_nll = inspect.unwrap(nll)


def test_an_unknown_mean_is_refused():
    with pytest.raises(InputError, match="`per` must be one of token, sequence, got 'foo'"):
        plain_nll(TOKENS, OFFSETS, weights(1, 1), per="foo")
    made = Likelihood("sequence")
    object.__setattr__(made, "per", "foo")
    with pytest.raises(InputError, match="`per` must be one of token, sequence, got 'foo'"):
        made.__post_init__()


def test_tensors_of_other_completions_are_refused():
    with pytest.raises(InputError, match="`weight` must hold one number for each of N=2"):
        plain_nll(TOKENS, OFFSETS, weights(1, 1, 1))
    square = inspect.unwrap(square_loss)
    with pytest.raises(InputError, match=r"a completion, got log_ratio \[3\], reward \[2\]"):
        square(L, L[:2], PAIRS, beta=1.0)
    with pytest.raises(InputError, match=r"a completion, got logprob \[3\], reference \[1\]"):
        inspect.unwrap(xpo_loss)(L, L[:1], L, PAIRS, beta=1.0, optimism=0.0)
    with pytest.raises(InputError, match=r"got reward \[3\], log_ratio \[3\], eligible \[1\]"):
        inspect.unwrap(regularised_value)(L, L, YES[:1], beta=1.0)


@pytest.mark.parametrize("objective", [Square(1.0), Square(1.0, 0.1), Dpo(1.0)], ids=str)
def test_a_batch_without_pairs_is_refused(objective):
    group = Group([1], [[1, 2], [3]], reference=[-1.0, -2.0], reward=[-1.0, -2.0])
    with pytest.raises(InputError, match="`pairs` must be of shape"):
        objective(TOKENS, Batch.of([group]))
