"""Padded batches to prompts and completions, and answers back to where they belong."""

import pytest
import torch

from sharpen.errors import InputError
from sharpen.integrations.trl.shared_stats import scattered, scored_rows

# left padding, right padding, a label left out, a row of no label
IDS = torch.tensor([[0, 0, 5, 6, 7, 8], [3, 4, 5, 6, 0, 0], [9, 8, 7, 6, 5, 0], [1, 2, 3, 0, 0, 0]])
MASK = torch.tensor(
    [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]
)
ASKED = torch.tensor(
    [[0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 0, 0], [0, 0, 1, 0, 1, 0], [0] * 6], dtype=torch.bool
)
LABELS = IDS.masked_fill(~ASKED, -100)


def test_prompts_and_completions():
    rows = scored_rows(IDS, MASK, LABELS)
    assert rows.prompts == [[5, 6], [3], [9, 8]]
    assert rows.completions == [[[7, 8]], [[4, 5, 6]], [[7, 6, 5]]]
    # the 6 between two labels is read and not asked for
    assert rows.asked.tolist() == [True] * 5 + [True, False, True]


def test_answers_stand_where_the_shifted_labels_do():
    rows = scored_rows(IDS, MASK, LABELS)
    ids = torch.tensor([x for group in rows.completions for c in group for x in c]).float()
    found = scattered(rows, ids, IDS.shape)
    assert torch.equal(found, IDS[:, 1:].masked_fill(~ASKED[:, 1:], 0).float())


def test_the_first_column_is_never_scored():
    every = scored_rows(IDS[2:], MASK[2:], IDS[2:].masked_fill(MASK[2:] == 0, -100))
    assert every.prompts == [[9], [1]]
    assert every.completions == [[[8, 7, 6, 5]], [[2, 3]]]


def test_no_mask_is_no_padding():
    assert scored_rows(IDS[:1, 2:], None, LABELS[:1, 2:]).prompts == [[5, 6]]


def test_labels_are_not_changed():
    labels = IDS.masked_fill(MASK == 0, -100)[1:3]
    before = labels.clone()
    scored_rows(IDS[1:3], MASK[1:3], labels)
    assert torch.equal(labels, before)


def test_gradients_go_to_what_was_asked_for():
    rows = scored_rows(IDS, MASK, LABELS)
    values = torch.zeros(8, requires_grad=True)
    scattered(rows, values, IDS.shape).sum().backward()
    assert values.grad.tolist() == [1, 1, 1, 1, 1, 1, 0, 1]


def changed(x, row, column, value):
    x = x.clone()
    x[row, column] = value
    return x


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((IDS, MASK[:, 1:], LABELS), "one shape"),
        ((IDS, changed(MASK, 2, 1, 0), LABELS), "one run of tokens a row"),
        ((IDS, changed(MASK, 0, 5, 0), LABELS), "-100 on padding"),
        ((IDS, MASK, changed(LABELS, 0, 4, 3)), "or -100, got other ids"),
        ((IDS, MASK, changed(LABELS, 0, 2, 5)), r"`labels`\[0\] must begin after the first token"),
    ],
)
def test_what_cannot_be_scored_is_named(arguments, message):
    with pytest.raises(InputError, match=message):
        scored_rows(*arguments)
