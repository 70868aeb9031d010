"""What training reaches on a language that can be enumerated: the tilted base, by the formula."""

import pytest
import torch

from helpers.tiny import tiny
from helpers.tiny_groups import sums
from sharpen.training.fit import fit
from sharpen.training.groups import Batch, Group, standardise, tilted_weights
from sharpen.training.losses import Likelihood, Square
from sharpen.training.options import FitOptions

PROMPT = [1, 3]
# every completion of at most two tokens that ends in 2, and one that is cut
COMPLETIONS = [[2], *([a, 2] for a in range(3, 8)), [3, 4, 2], [4, 4, 2], [7, 3, 5]]
LENGTHS = torch.tensor([float(len(ids)) for ids in COMPLETIONS], dtype=torch.float64)
PAIRS = [(i, j) for i in range(len(COMPLETIONS)) for j in range(i)]
EVERY = torch.ones(len(COMPLETIONS), dtype=torch.bool)
BOUNDS = torch.tensor([0, len(COMPLETIONS)])


def model_of_few():
    return tiny(vocab_size=8, seed=1)


@pytest.fixture(scope="module")
def base():
    return sums(model_of_few(), Batch.of([Group(PROMPT, COMPLETIONS)]))


def trained(out, group, objective):
    model = model_of_few()
    options = FitOptions(lr=1e-2, epochs=120.0, batch=1, save_every=10**6)
    fit(model, None, [group], objective, options, out)
    return sums(model, Batch.of([group]))


def distance(one, other):
    """Total variation, among these completions."""
    return (one.softmax(0) - other.softmax(0)).abs().sum().item() / 2


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_square_loss_ends_at_the_power_of_the_base(tmp_path, base, beta):
    reward = base.tolist()
    group = Group(PROMPT, COMPLETIONS, reference=reward, reward=reward, pairs=PAIRS)
    found = trained(tmp_path, group, Square(beta))
    power = (1 + 1 / beta) * base
    assert distance(power, base) > 0.05
    assert distance(found, power) < 0.01


def test_with_the_mean_log_prob_it_ends_at_no_power(tmp_path, base):
    mean = base / LENGTHS
    group = Group(PROMPT, COMPLETIONS, reference=base.tolist(), reward=mean.tolist(), pairs=PAIRS)
    found = trained(tmp_path, group, Square(0.5))
    assert distance(found, base + mean / 0.5) < 0.01
    assert min(distance(found, a / 10 * base) for a in range(1, 60)) > 0.05


def test_with_a_standardised_reward_it_ends_at_another_power(tmp_path, base):
    reward = standardise(base, BOUNDS, EVERY, "prompt")
    group = Group(PROMPT, COMPLETIONS, reference=base.tolist(), reward=reward.tolist(), pairs=PAIRS)
    found = trained(tmp_path, group, Square(0.5))
    sigma = base.std(correction=0)
    assert distance(found, (1 + 1 / (0.5 * sigma)) * base) < 0.01


def test_soft_weights_of_all_end_at_the_tilted_weights(tmp_path, base):
    """Of each completion once, the likelihood has its optimum at the weights themselves."""
    weight = tilted_weights(base, BOUNDS, EVERY, 2.0)
    group = Group(PROMPT, COMPLETIONS, weight=weight.tolist())
    found = trained(tmp_path, group, Likelihood("sequence"))
    assert (found.exp() - (base / 2).softmax(0)).abs().sum() / 2 < 0.02
