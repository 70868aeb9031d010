"""Rows of TRL's shapes, worked by hand."""

import pytest
import torch

from sharpen.commands.export import (
    Rated,
    dpo_rows,
    kto_rows,
    prompt_rows,
    sft_rows,
    token_rows,
    unique,
)
from sharpen.errors import InputError

NAN = float("nan")


def group(reward=(1.0, 4.0, 2.0, 4.0, NAN), eligible=(1, 1, 1, 1, 0), prompt="q", **more):
    texts = [f"a{g}" for g in range(len(reward))]
    return Rated("f:1", "p", prompt, texts, list(reward), [bool(x) for x in eligible], **more)


def drawn():
    return torch.Generator().manual_seed(0)


def test_the_best_are_first_and_the_first_of_equals_wins():
    rows = list(sft_rows(group(), top=3))
    assert [row["completion"] for row in rows] == ["a1", "a3", "a2"]
    assert rows[0] == {
        "prompt": "q",
        "completion": "a1",
        "prompt_id": "p",
        "sample_id": 1,
        "reward": 4.0,
    }
    assert [row["completion"] for row in sft_rows(group(), top=9)] == ["a1", "a3", "a2", "a0"]
    assert list(sft_rows(group(eligible=(0, 0, 0, 0, 0)))) == []


def test_messages_stay_messages():
    messages = [{"role": "user", "content": "q"}]
    (row,) = sft_rows(group(prompt=messages))
    assert row["prompt"] == messages
    assert row["completion"] == [{"role": "assistant", "content": "a1"}]
    (pair,) = dpo_rows(group(prompt=messages), drawn())
    assert pair["chosen"] == [{"role": "assistant", "content": "a1"}]
    assert pair["rejected"] == [{"role": "assistant", "content": "a0"}]


def test_tokens_carry_a_mask_of_the_completion():
    ids = {"prompt_ids": [1, 5], "completion_ids": [[7], [8, 2], [9], [8, 2], []]}
    (row,) = token_rows(group(**ids))
    assert (row["input_ids"], row["completion_mask"]) == ([1, 5, 8, 2], [0, 0, 1, 1])
    with pytest.raises(InputError, match="f:1: `shape` tokens needs `prompt_ids`"):
        next(token_rows(group()))


def pairs(kind, margin=0.0):
    rows = dpo_rows(group(), drawn(), pairs=kind, margin=margin)
    return [(row["chosen_sample_id"], row["rejected_sample_id"]) for row in rows]


def test_pairs_are_better_first_and_above_the_margin():
    assert pairs("best_worst") == [(1, 0)]
    # not (1, 3): of equals none is to be preferred
    assert pairs("all") == [(1, 0), (2, 0), (3, 0), (1, 2), (3, 2)]
    assert pairs("all", margin=1.0) == [(1, 0), (3, 0), (1, 2), (3, 2)]
    assert pairs("all", margin=2.0) == [(1, 0), (3, 0)]
    assert pairs("best_worst", margin=3.0) == []
    row = next(dpo_rows(group(), drawn()))
    assert (row["chosen"], row["score_chosen"]) == ("a1", 4.0)
    assert (row["rejected"], row["score_rejected"]) == ("a0", 1.0)


def test_random_pairs_hold_each_completion_once():
    found = pairs("random")
    assert found == pairs("random")
    together = [g for pair in found for g in pair]
    assert len(together) == len(set(together))


def labels(reward, **how):
    rows = kto_rows(group(reward, [1] * len(reward)), **how)
    return {row["sample_id"]: row["label"] for row in rows}


def test_a_threshold_labels_every_completion():
    assert labels([1.0, 2.0, 3.0], threshold=2.0) == {0: False, 1: True, 2: True}
    assert [r["sample_id"] for r in kto_rows(group(), threshold=0.0)] == [0, 1, 2, 3]


def test_a_share_labels_the_best_and_as_many_of_the_worst():
    ten = [float(x) for x in range(10)]
    assert labels(ten, share=0.2) == {0: False, 1: False, 8: True, 9: True}
    assert labels(ten, share=0.5) == {g: g > 4 for g in range(10)}
    # at least one of each
    assert labels([1.0, 2.0, 3.0], share=0.1) == {0: False, 2: True}
    assert len(labels([float(x) for x in range(100)], share=0.29)) == 58


@pytest.mark.parametrize(
    ("reward", "wanted"),
    [
        ([2.0, 2.0, 2.0, 2.0], {}),
        ([5.0, 3.0, 3.0, 1.0], {0: True, 3: False}),
        ([7.0], {}),
        ([], {}),
    ],
    ids=["equal", "tie", "one", "none"],
)
def test_equals_are_not_set_against_each_other(reward, wanted):
    assert labels(reward, share=0.5) == wanted


def test_equal_completions_count_once():
    ids = {"prompt_ids": [1], "completion_ids": [[7], [8, 2], [7], [8, 2], []]}
    assert unique(group(**ids)).eligible == [True, True, False, False, False]
    again = group(eligible=(0, 1, 1, 1, 0), **ids)
    # the first copy was not eligible: the next one stands for it
    assert unique(again).eligible == [False, True, True, False, False]
    assert unique(group()).eligible == [True, True, True, True, False]


def test_a_prompt_alone():
    assert list(prompt_rows(group())) == [{"prompt": "q", "prompt_id": "p"}]


def test_a_completion_is_never_set_against_its_copy():
    ids = {"prompt_ids": [1], "completion_ids": [[7], [8, 2], [7], [8, 3], []]}
    # a copy whose reward is off by its rounding
    copies = group((1.0, 4.0, 1.5, 3.0, NAN), **ids)
    rows = dpo_rows(copies, drawn(), pairs="all")
    found = [(row["chosen_sample_id"], row["rejected_sample_id"]) for row in rows]
    assert found == [(1, 0), (3, 0), (1, 2), (1, 3), (3, 2)]
    texts = Rated("f:1", "p", "q", ["a", "a", "b"], [1.0, 2.0, 3.0], [True] * 3)
    assert [row["rejected"] for row in dpo_rows(texts, drawn(), pairs="all")] == ["a", "a"]
