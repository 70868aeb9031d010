import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharpen.scoring.batching import inverse_of, make_batches, plan_batches

LENGTHS = st.lists(st.integers(0, 30), max_size=40)
BUDGET = st.integers(1, 120)
IDS = st.integers(0, 99)
PAIRS = st.lists(
    st.tuples(st.lists(IDS, min_size=1, max_size=6), st.lists(IDS, max_size=9)), max_size=12
)
# the same examples on every run, and no database beside the tests
examples = settings(derandomize=True, deadline=None, database=None, max_examples=150)


@examples
@given(LENGTHS, BUDGET)
def test_plan_holds_each_sequence_once_within_the_budget(lengths, max_tokens):
    plan = plan_batches(lengths, max_tokens)
    assert sorted(i for group in plan for i in group) == [i for i, n in enumerate(lengths) if n > 0]
    for group in plan:
        padded = len(group) * max(lengths[i] for i in group)
        assert padded <= max_tokens or len(group) == 1


@examples
@given(LENGTHS, BUDGET)
def test_plan_is_longest_first_and_ties_keep_their_order(lengths, max_tokens):
    order = [i for group in plan_batches(lengths, max_tokens) for i in group]
    keys = [(-lengths[i], i) for i in order]
    assert keys == sorted(keys)


@examples
@given(LENGTHS, BUDGET, st.integers(1, 30))
def test_no_group_has_lengths_on_both_sides_of_the_boundary(lengths, max_tokens, boundary):
    plan = plan_batches(lengths, max_tokens, boundary=boundary)
    assert all(len({lengths[i] > boundary for i in group}) == 1 for group in plan)
    assert sum(map(len, plan)) == sum(n > 0 for n in lengths)


def test_a_sequence_above_the_budget_runs_alone():
    assert plan_batches([3, 50, 3, 3], 9) == [[1], [0, 2, 3]]


@examples
@given(PAIRS, BUDGET)
def test_each_scored_token_is_predicted_by_the_row_that_ends_its_past(pairs, max_tokens):
    past = {}
    start = 0
    for prompt, completion in pairs:
        for j, token in enumerate(completion):
            past[start + j] = (prompt + completion[:j], token)
        start += len(completion)
    seen = []
    for batch in make_batches(pairs, max_tokens):
        L = batch.ids.shape[1]
        for row, target, place in zip(
            batch.rows.tolist(), batch.target.tolist(), batch.output_index.tolist(), strict=True
        ):
            column = row % L
            assert batch.ids[row // L, : column + 1].tolist() == past[place][0]
            assert batch.mask[row // L, : column + 1].all()
            assert target == past[place][1]
            seen.append(place)
    assert sorted(seen) == list(range(start))


@examples
@given(PAIRS, BUDGET)
def test_inverse_restores_input_order(pairs, max_tokens):
    batches = list(make_batches(pairs, max_tokens))
    together = torch.cat([torch.zeros(0, dtype=torch.int64), *(b.target for b in batches)])
    restored = together[inverse_of([b.output_index for b in batches])]
    assert restored.tolist() == [token for _, completion in pairs for token in completion]


def test_rows_are_padded_with_their_own_last_id():
    (batch,) = make_batches([([5], [6, 7, 8]), ([4], [9])], 100)
    assert batch.ids.tolist() == [[5, 6, 7], [4, 4, 4]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
