import pytest
import torch

from sharpen.errors import InputError
from sharpen.training.pairs import choose_pairs

REWARD = [-3.0, -1.0, -2.0, -9.0, -1.0, -5.0, -4.0]
OK = [True, True, True, False, True, True, True]


def pairs(kind, reward=REWARD, eligible=OK, seed=0):
    return choose_pairs(kind, reward, eligible, torch.Generator().manual_seed(seed))


def test_best_is_paired_with_worst_and_never_with_itself():
    assert pairs("best_worst") == [(1, 5)]
    assert pairs("best_worst", [0.0, 0.0, 0.0], [True] * 3) == [(0, 2)]


def test_all_pairs_are_all_and_each_has_its_better_first():
    found = pairs("all")
    assert len(found) == len({frozenset(pair) for pair in found}) == 6 * 5 // 2
    assert all(REWARD[i] >= REWARD[j] for i, j in found)
    assert (1, 4) in found  # of equals the first


def test_random_pairs_use_each_eligible_completion_once():
    found = pairs("random")
    assert sorted(g for pair in found for g in pair) == [0, 1, 2, 4, 5, 6]
    assert all(REWARD[i] >= REWARD[j] for i, j in found)
    assert found == pairs("random")
    assert len({tuple(map(frozenset, pairs("random", seed=seed))) for seed in range(8)}) > 1
    assert len(pairs("random", eligible=[True] * 7)) == 3


@pytest.mark.parametrize("kind", ["all", "random", "best_worst"])
def test_fewer_than_two_make_no_pair(kind):
    assert pairs(kind, [-1.0, -2.0], [True, False]) == []
    assert pairs(kind, [], []) == []


def test_unknown_kinds_are_refused():
    with pytest.raises(InputError, match="`pairs` must be one of random, all, best_worst"):
        choose_pairs.__wrapped__("some", REWARD, OK, torch.Generator())
