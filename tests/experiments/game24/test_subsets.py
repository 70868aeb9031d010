""""""

import itertools

import numpy as np
import pytest
import torch

from sharpen.evaluation.metrics import best_of_k
from sharpen.experiments.game24.selectors import (
    SubsetChoice,
    expected_choice,
    selectors,
    subset_of,
)
from sharpen.selection import best_of_n
from sharpen.training.groups import chosen_weights


def by_logprob(subset, generator):
    chosen_P = best_of_n(subset.scores, subset.reward["logprob"])
    return SubsetChoice(
        chosen_weights(subset.scores.groups, chosen_P), {"k": torch.full((5,), subset.k)}
    )


def test_a_subset_holds_the_samples_that_its_indices_name(make_outcome):
    outcome = make_outcome()
    index_Pk = np.array([[3, 0], [1, 2], [5, 4], [0, 1], [2, 5]])
    subset = subset_of(outcome, index_Pk)
    flat = [(p, g) for p, row in enumerate(index_Pk.tolist()) for g in row]
    assert subset.answers == [outcome.answers[p][g] for p, g in flat]
    assert subset.scores.valid.tolist() == [bool(outcome.valid_PG[p, g]) for p, g in flat]
    for name, reward_PG in outcome.reward_PG.items():
        assert subset.reward[name].tolist() == [reward_PG[p, g] for p, g in flat]
    assert subset.keys == [outcome.response_PG[p, g] for p, g in flat]


@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_means_over_subsets_come_to_the_exact_figure(make_outcome, k):
    outcome = make_outcome(all_valid=True)
    weight_PG, facts = expected_choice(outcome, by_logprob, k, seed=1, n_orders=1 + 160 * k)
    exact_PG = best_of_k(outcome, "logprob", k).weight_PG
    # of equal completions it does not matter which is chosen
    for response in range(4):
        same_PG = outcome.response_PG == response
        got_P, wanted_P = ((w_PG * same_PG).sum(axis=1) for w_PG in (weight_PG, exact_PG))
        np.testing.assert_allclose(got_P, wanted_P, atol=0.05)
    np.testing.assert_allclose(weight_PG.sum(axis=1), 1.0)
    assert facts == {"k": k}


def test_every_selector_gives_chances_of_valid_samples(make_outcome):
    outcome = make_outcome(P=8, G=10)
    n_valid_P = outcome.valid_PG.sum(axis=1)
    for (name, select), k in itertools.product(selectors().items(), (3, 10)):
        found = select(outcome, k, 0)
        assert (found.weight_PG >= 0).all(), name
        assert (found.weight_PG[~outcome.valid_PG] == 0).all(), name
        total_P = found.weight_PG.sum(axis=1)
        assert (total_P <= 1 + 1e-9).all(), name
        if k == 10 and not name.startswith("InferenceTimePessimism"):
            np.testing.assert_allclose(total_P, n_valid_P > 0, err_msg=name)


def test_the_same_seed_gives_the_same_figures_and_another_others(make_outcome):
    outcome = make_outcome(P=8, G=10)
    select = selectors()["Borda, self_certainty"]
    first, again, other = (select(outcome, 3, seed).weight_PG for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


def test_the_sets_of_an_order_share_no_sample(make_outcome):
    def at_random(subset, generator):
        return SubsetChoice(torch.full((5 * subset.k,), 1 / subset.k, dtype=torch.float64), {})

    weight_PG, _ = expected_choice(make_outcome(), at_random, 2, seed=0, n_orders=1)
    np.testing.assert_allclose(weight_PG, 1 / 6)
