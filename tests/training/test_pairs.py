import pytest
import torch

from sharpen.errors import InputError
from sharpen.training.groups import choose_pairs

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


COPIES = ["a", "b", "a", "c", "b", "b"]


@pytest.mark.parametrize("kind", ["all", "random", "best_worst"])
def test_a_completion_and_its_copy_make_no_pair(kind):
    reward, ok = [-1.0, -2.0, -1.0, -3.0, -2.0, -2.0], [True] * 6
    n_random = 0
    for seed in range(12):
        found = choose_pairs(kind, reward, ok, torch.Generator().manual_seed(seed), COPIES)
        assert all(COPIES[i] != COPIES[j] for i, j in found)
        n_random += len(found)
    if kind == "all":
        # of the 15, not the one of "a" and the three of "b"
        assert len(found) == 15 - 1 - 3
    if kind == "best_worst":
        assert found == [(0, 3)]
    if kind == "random":
        # each pair of copies that falls together is dropped, the others stay
        assert 12 < n_random < 12 * 3


@pytest.mark.parametrize("kind", ["all", "random", "best_worst"])
def test_copies_alone_make_no_pair_and_draw_nothing(kind):
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    # copies whose rewards differ by rounding, and one that may not be used
    assert choose_pairs(kind, [-1.0, -1.1, 0.0], [True, True, False], generator, "aab") == []
    assert torch.equal(generator.get_state(), before)


def test_the_worst_that_differs_is_set_against_the_best():
    # one reward, of unequal completions: the last one is a copy of the first
    found = choose_pairs("best_worst", [1.0] * 3, [True] * 3, torch.Generator(), "aba")
    assert found == [(0, 1)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rewards_that_have_no_difference_are_refused(bad):
    with pytest.raises(InputError, match=r"`reward` must be finite where eligible, got .* 1;"):
        pairs("all", [-1.0, bad], [True, True])
    assert pairs("all", [-1.0, bad, -2.0], [True, False, True]) == [(0, 2)]


def test_lists_of_unequal_length_are_refused():
    with pytest.raises(InputError, match="must be of one length, got 7, 2 and 7"):
        pairs("all", eligible=[True, True])
