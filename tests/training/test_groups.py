import pytest
import torch

from sharpen.errors import InputError
from sharpen.training.groups import Batch, Group, chosen_weights, paired_group, weighted_groups


def test_a_batch_lays_groups_end_to_end():
    batch = Batch.of(
        [
            Group([1, 2], [[3], [4, 5]], reference=[-1.0, -2.0], reward=[0.5, 1.5], pairs=[(1, 0)]),
            Group(
                [6],
                [[7, 8, 9], [1], [2]],
                reference=[-3.0, -4.0, -5.0],
                reward=[2.5, 3.5, 4.5],
                pairs=[(0, 2), (1, 2)],
            ),
        ]
    )
    assert batch.offsets.tolist() == [0, 1, 3, 6, 7, 8]
    assert batch.pairs.tolist() == [[1, 0], [2, 4], [3, 4]]
    assert batch.reference.tolist() == [-1, -2, -3, -4, -5]
    assert batch.reward.tolist() == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert batch.weight.tolist() == []
    assert batch.n_tokens == 3 + 8


def test_weights_keep_what_they_weigh():
    prompts, completions = [[1], [2], [3]], [[[4], [5]], [[6]], [[7], [8]]]
    weight = torch.tensor([0.0, 1.0, 0.0, 0.25, 0.75], dtype=torch.float64)
    first, last = weighted_groups(prompts, completions, weight)
    assert first == Group([1], [[5]], weight=[1.0])
    assert last == Group([3], [[7], [8]], weight=[0.25, 0.75])


def test_chosen_weights_are_one_hot():
    got = chosen_weights(torch.tensor([0, 2, 2, 5]), torch.tensor([1, -1, 0]))
    assert got.tolist() == [0, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ([1.0], "one number for each of N=2, got 1"),
        ([1.0, -1.0], "finite and at least 0"),
        ([1.0, float("nan")], "finite and at least 0"),
        ([0.0, 0.0], "no completion has a positive weight"),
    ],
)
def test_bad_weights_are_refused(weight, message):
    with pytest.raises(InputError, match=message):
        weighted_groups([[1]], [[[2], [3]]], torch.tensor(weight, dtype=torch.float64))


def test_only_completions_in_pairs_are_kept():
    group = paired_group(
        [1], [[2], [3], [4], [5]], [-2.0, -3.0, -4.0, -5.0], [1.0, 2.0, 3.0, 4.0], [(3, 1), (1, 3)]
    )
    assert group == Group(
        [1], [[3], [5]], reference=[-3.0, -5.0], reward=[2.0, 4.0], pairs=[(1, 0), (0, 1)]
    )
