from collections import Counter
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharpen.scoring.batching import inverse_of
from sharpen.scoring.packing import plan
from sharpen_kernels.tree import tree_mask

# two ids and short lists: most sequences agree somewhere, many are equal or begin another
IDS = st.integers(0, 1)
PAIRS = st.lists(
    st.tuples(st.lists(IDS, min_size=1, max_size=6), st.lists(IDS, max_size=6)), max_size=12
)
BUDGET = st.integers(1, 40)
MIN_SHARED = st.integers(1, 4)
# the same examples on every run, and no database beside the tests
examples = settings(derandomize=True, deadline=None, database=None, max_examples=120)


def length(pair):
    prompt, completion = pair
    return len(prompt) + len(completion) - 1 if completion else 0


def scored_tokens(pairs):
    """For each place: the pair, the ids that its token is predicted from, and its id."""
    return [
        (i, prompt + completion[:j], completion[j])
        for i, (prompt, completion) in enumerate(pairs)
        for j in range(len(completion))
    ]


def path(row, k):
    """Packed indices from the root to token k."""
    return [*path(row, int(row.parent[k])), k] if k >= 0 else []


def prefixes(sequences):
    return {tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)}


@examples
@given(PAIRS, BUDGET, MIN_SHARED)
def test_each_token_is_scored_once_behind_exactly_its_past(pairs, max_tokens, min_shared):
    wanted = scored_tokens(pairs)
    seen = []
    for row in plan(pairs, max_tokens, min_shared=min_shared):
        mask_TT = tree_mask(row.tree)
        source_S = row.source[row.rows]
        for k, target, place in zip(
            source_S.tolist(), row.target.tolist(), row.output_index.tolist(), strict=True
        ):
            _, past, token = wanted[place]
            assert (row.ids[path(row, k)].tolist(), target) == (past, token)
            assert mask_TT[k].nonzero().flatten().tolist() == path(row, k)
            seen.append(place)
    assert sorted(seen) == list(range(len(wanted)))


@examples
@given(PAIRS, BUDGET, MIN_SHARED)
def test_the_tree_is_that_of_the_parents(pairs, max_tokens, min_shared):
    for row in plan(pairs, max_tokens, min_shared=min_shared):
        depths = [len(path(row, k)) - 1 for k in range(row.tree.T)]
        assert row.tree.position.tolist() == depths
        assert row.ids.shape == row.parent.shape == (row.tree.T,)


@examples
@given(PAIRS, BUDGET, MIN_SHARED)
def test_only_rows_that_predict_are_sources_each_once(pairs, max_tokens, min_shared):
    for row in plan(pairs, max_tokens, min_shared=min_shared):
        assert row.source.tolist() == sorted(set(row.source.tolist()))
        assert set(row.rows.tolist()) == set(range(len(row.source)))


@examples
@given(PAIRS, BUDGET, MIN_SHARED)
def test_a_row_keeps_the_budget_unless_it_is_one_sequence(pairs, max_tokens, min_shared):
    rows = plan(pairs, max_tokens, min_shared=min_shared)
    assert all(max_tokens >= row.tree.T or len(row.tree.runs) == 1 for row in rows)


@examples
@given(PAIRS, BUDGET, MIN_SHARED)
def test_no_two_rows_fit_in_one(pairs, max_tokens, min_shared):
    sizes = [row.tree.T for row in plan(pairs, max_tokens, min_shared=min_shared)]
    assert all(a + b > max_tokens for a, b in combinations(sizes, 2))
    assert sizes == sorted(sizes, reverse=True)


@examples
@given(PAIRS, BUDGET, st.integers(1, 12))
def test_no_row_has_sequences_on_both_sides_of_the_boundary(pairs, max_tokens, boundary):
    wanted = scored_tokens(pairs)
    for row in plan(pairs, max_tokens, boundary=boundary):
        sides = {length(pairs[wanted[place][0]]) > boundary for place in row.output_index.tolist()}
        assert sides == {bool(row.tree.position.max() >= boundary)}


@examples
@given(PAIRS, BUDGET, MIN_SHARED)
def test_the_plan_counts_its_tokens(pairs, max_tokens, min_shared):
    rows = plan(pairs, max_tokens, min_shared=min_shared)
    assert rows.naive == sum(map(length, pairs))
    assert rows.packed == sum(row.tree.T for row in rows) <= rows.naive


@examples
@given(PAIRS)
def test_one_row_holds_each_distinct_prefix_once(pairs):
    sequences = [prompt + completion[:-1] for prompt, completion in pairs if completion]
    assert plan(pairs, 1000, min_shared=1).packed == len(prefixes(sequences))


@examples
@given(PAIRS, st.integers(1, 20))
def test_a_part_of_a_split_trie_repeats_ancestors_alone(pairs, max_tokens):
    rows = plan(pairs, max_tokens, min_shared=1)
    size = 0
    for part in (part for parts in rows.parts for part in parts):
        own = [rows.pairs[rows.leaves[n].pair] for n in part]
        size += len(prefixes([prompt + completion[:-1] for prompt, completion in own]))
    assert rows.packed == size
    assert sorted(n for parts in rows.parts for part in parts for n in part) == list(
        range(len(rows.leaves))
    )


def cheapest(sequences, max_tokens):
    """Fewest tokens of consecutive parts that fit: every way to cut, tried."""
    best = [0]
    for b in range(1, len(sequences) + 1):
        sizes = {a: len(prefixes(sequences[a:b])) for a in range(b)}
        fits = [a for a, size in sizes.items() if size <= max_tokens or a == b - 1]
        best.append(min(best[a] + sizes[a] for a in fits))
    return best[-1]


@examples
@given(PAIRS, st.integers(1, 20))
def test_cuts_repeat_as_few_tokens_as_possible(pairs, max_tokens):
    # one id in front makes all of them one trie
    pairs = [([9, *prompt], completion) for prompt, completion in pairs]
    rows = plan(pairs, max_tokens, min_shared=1)
    own = [pairs[leaf.pair] for leaf in rows.leaves]
    sequences = [prompt + completion[:-1] for prompt, completion in own]
    assert rows.packed == cheapest(sequences, max_tokens)


@examples
@given(PAIRS, BUDGET, MIN_SHARED, st.randoms(use_true_random=False))
def test_permuting_the_pairs_permutes_the_places_alone(pairs, max_tokens, min_shared, rng):
    other = rng.sample(pairs, len(pairs))
    one, two = (list(plan(p, max_tokens, min_shared=min_shared)) for p in (pairs, other))
    for a, b in zip(one, two, strict=True):
        assert a.tree.runs == b.tree.runs
        for name in ("ids", "parent", "source", "rows", "target"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


@examples
@given(PAIRS, BUDGET)
def test_places_invert_to_input_order(pairs, max_tokens):
    rows = list(plan(pairs, max_tokens))
    together = torch.cat([torch.zeros(0, dtype=torch.int64), *(row.target for row in rows)])
    restored = together[inverse_of([row.output_index for row in rows])]
    assert restored.tolist() == [token for _, completion in pairs for token in completion]


def test_a_duplicate_is_scored_again_and_read_once():
    (row,) = plan([([1, 2], [3, 4]), ([1, 2], [5, 6]), ([1, 2], [3, 4])], 100)
    assert row.ids.tolist() == [1, 2, 3, 5]
    scored = zip(row.source[row.rows].tolist(), row.target.tolist(), strict=True)
    assert Counter(scored) == {(1, 3): 2, (2, 4): 2, (1, 5): 1, (3, 6): 1}
    assert sorted(row.output_index.tolist()) == list(range(6))


def test_a_cut_falls_between_questions_and_not_within_one():
    header = list(range(100, 110))
    pairs = [(header + [q] * 5, [q, a, 0]) for q in (1, 2, 3) for a in (4, 5, 6)]
    # a question of 5, answers that open alike, 3 last tokens; 36 also hold a third question's first
    rows = plan(pairs, 36, min_shared=3)
    assert [row.tree.T for row in rows] == [10 + 9 + 9, 10 + 9]
    assert sum(len({1, 2, 3} & set(row.ids.tolist())) for row in rows) == 3


def test_a_sequence_above_the_budget_runs_alone():
    pairs = [([1, 2], [3]), ([4] * 50, [5]), ([6, 7], [8])]
    assert [row.tree.T for row in plan(pairs, 9)] == [50, 4]


@pytest.mark.parametrize("pairs", [[], [([1, 2], [])]], ids=["no pairs", "nothing to score"])
def test_nothing_to_score_is_no_row(pairs):
    rows = plan(pairs, 10)
    assert (len(rows), list(rows), rows.naive, rows.packed) == (0, [], 0, 0)


def test_a_row_moves_to_a_device_without_its_places():
    row = plan([([1, 2], [3, 4]), ([1, 2], [5])], 100)[0].to(torch.device("meta"))
    moved = [row.ids, row.tree.end, row.parent, row.source, row.rows, row.target]
    assert {x.device.type for x in moved} == {"meta"}
    assert row.output_index.tolist() == [2, 0, 1]
