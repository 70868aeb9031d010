import random
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharpen.scoring.packing import build_trie

# two ids and short lists: most sequences agree somewhere, many are equal or begin another
IDS = st.integers(0, 1)
PROMPTS = st.lists(IDS, min_size=1, max_size=7)
PAIRS = st.lists(st.tuples(PROMPTS, st.lists(IDS, min_size=1, max_size=7)), max_size=12)
MIN_SHARED = st.integers(1, 5)
# the same examples on every run, and no database beside the tests
examples = settings(derandomize=True, deadline=None, database=None, max_examples=120)


def trie_of(pairs, *, min_shared=1):
    return build_trie(pairs, range(len(pairs)), min_shared=min_shared)


def sequence(pair):
    prompt, completion = pair
    return tuple(prompt + completion[:-1])


def agreement(a, b):
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(min(a, b)))


def shared_by(leaves, i, j):
    """Tokens that leaves i < j read once together."""
    return min(leaf.shared for leaf in leaves[i + 1 : j + 1])


@examples
@given(PAIRS, MIN_SHARED)
def test_each_pair_is_scored_once_on_a_leaf_that_begins_with_it(pairs, min_shared):
    leaves = trie_of(pairs, min_shared=min_shared)
    assert sorted(i for leaf in leaves for i in leaf.scored) == list(range(len(pairs)))
    for leaf in leaves:
        whole = sequence(pairs[leaf.pair])
        assert leaf.length == len(whole)
        assert leaf.scored[-1] == leaf.pair
        assert all(whole[: len(s)] == s for s in (sequence(pairs[i]) for i in leaf.scored))


@examples
@given(PAIRS, MIN_SHARED)
def test_no_leaf_begins_another(pairs, min_shared):
    leaves = trie_of(pairs, min_shared=min_shared)
    for a, b in combinations([sequence(pairs[leaf.pair]) for leaf in leaves], 2):
        assert agreement(a, b) < min(len(a), len(b))


@examples
@given(PAIRS, MIN_SHARED)
def test_leaves_share_only_what_agrees(pairs, min_shared):
    leaves = trie_of(pairs, min_shared=min_shared)
    assert all(leaf.shared == 0 for leaf in leaves[:1])
    for i, j in combinations(range(len(leaves)), 2):
        a, b = sequence(pairs[leaves[i].pair]), sequence(pairs[leaves[j].pair])
        assert shared_by(leaves, i, j) <= agreement(a, b)


@examples
@given(PAIRS)
def test_with_min_shared_1_each_distinct_prefix_is_one_token(pairs):
    prefixes = {s[:n] for s in map(sequence, pairs) for n in range(1, len(s) + 1)}
    assert sum(leaf.length - leaf.shared for leaf in trie_of(pairs)) == len(prefixes)


@examples
@given(PAIRS, MIN_SHARED)
def test_a_shared_run_is_long_enough_or_ends_a_prompt(pairs, min_shared):
    leaves = trie_of(pairs, min_shared=min_shared)
    for i in range(len(leaves)):
        with_i = {j: shared_by(leaves, min(i, j), max(i, j)) for j in range(len(leaves)) if j != i}
        cuts = sorted({0, *with_i.values()})
        for start, stop in pairwise(cuts):
            below = [i, *(j for j, depth in with_i.items() if depth >= stop)]
            ends = {len(pairs[leaves[j].pair][0]) for j in below}
            in_prompt = len(ends) == 1 and start < min(ends) <= stop
            assert stop - start >= min_shared or in_prompt


@examples
@given(PAIRS, MIN_SHARED)
def test_completions_of_one_prompt_share_it_whole(pairs, min_shared):
    leaves = trie_of(pairs, min_shared=min_shared)
    for i, j in combinations(range(len(leaves)), 2):
        prompt, other = (pairs[leaves[n].pair][0] for n in (i, j))
        if prompt == other:
            assert shared_by(leaves, i, j) >= len(prompt)


@examples
@given(PAIRS, MIN_SHARED)
def test_what_agrees_for_long_enough_is_shared_unless_a_prompt_ends_before(pairs, min_shared):
    pairs = [pair for pair in pairs if len(pair[0]) >= min_shared]
    leaves = trie_of(pairs, min_shared=min_shared)
    for i, j in combinations(range(len(leaves)), 2):
        a, b = sequence(pairs[leaves[i].pair]), sequence(pairs[leaves[j].pair])
        if agreement(a, b) >= min_shared:
            assert shared_by(leaves, i, j) >= min_shared


@examples
@given(PAIRS, MIN_SHARED, st.randoms(use_true_random=False))
def test_the_trie_does_not_depend_on_the_order_of_the_pairs(pairs, min_shared, rng):
    other = rng.sample(pairs, len(pairs))
    one, two = (
        [
            (leaf.shared, [(p[leaf.scored[k]]) for k in range(len(leaf.scored))])
            for leaf in trie_of(p, min_shared=min_shared)
        ]
        for p in (pairs, other)
    )
    assert one == two


@examples
@given(PAIRS, st.randoms(use_true_random=False))
def test_only_chosen_pairs_are_in_it(pairs, rng):
    chosen = sorted(rng.sample(range(len(pairs)), len(pairs) // 2))
    some = build_trie(pairs, chosen, min_shared=3)
    alone = trie_of([pairs[i] for i in chosen], min_shared=3)
    renamed = [tuple(chosen[i] for i in leaf.scored) for leaf in alone]
    assert [leaf.scored for leaf in some] == renamed
    assert [leaf.shared for leaf in some] == [leaf.shared for leaf in alone]


def test_answers_of_one_token_are_all_read_off_the_prompt():
    pairs = [([1, 2, 3], [token]) for token in (7, 8, 9, 8)]
    (leaf,) = trie_of(pairs, min_shared=8)
    assert (leaf.length, leaf.scored) == (3, (0, 1, 3, 2))


def test_header_question_answers_is_a_trie_of_three_levels():
    header, questions = list(range(100, 120)), [[1, 2], [3, 4]]
    pairs = [(header + q, [a, a, 0]) for q in questions for a in (5, 6, 7)]
    assert [leaf.shared for leaf in trie_of(pairs, min_shared=8)] == [0, 22, 22, 20, 22, 22]


@pytest.mark.parametrize(("n", "shared"), [(7, 0), (8, 8)])
def test_prompts_share_no_header_below_the_minimum(n, shared):
    pairs = [([1] * n + [q], [4, 5]) for q in (2, 3)]
    assert [leaf.shared for leaf in trie_of(pairs, min_shared=8)] == [0, shared]


def test_a_prompt_that_begins_another_one_too_early_leaves_with_its_completions():
    pairs = [([1, 2], [3, 3, 0]), ([1, 2], [5, 5, 0]), ([1, 2, 4, 4], [6, 6, 0])]
    leaves = trie_of(pairs, min_shared=8)
    assert [(leaf.pair, leaf.shared) for leaf in leaves] == [(2, 0), (0, 0), (1, 2)]


def test_a_short_run_repeated_counts_towards_the_next():
    # four leaves share the prompt, three of them 4 tokens more, two of those another 4
    tails = [[2] * 4 + [3, 3], [2] * 4 + [4] * 4 + [5, 5], [2] * 4 + [4] * 4 + [6, 6], [9, 9]]
    leaves = trie_of([([1] * 8, tail) for tail in tails], min_shared=8)
    assert [leaf.shared for leaf in leaves] == [0, 8, 16, 8]


def test_ids_of_any_size_up_to_32_bits_are_told_apart():
    rng = random.Random(0)
    ids = [0, 1, 255, 256, 257, 65536, 2**24, 2**31, 2**32 - 1]
    pairs = [(rng.choices(ids, k=4), rng.choices(ids, k=3)) for _ in range(200)]
    prefixes = {s[:n] for s in map(sequence, pairs) for n in range(1, len(s) + 1)}
    assert sum(leaf.length - leaf.shared for leaf in trie_of(pairs)) == len(prefixes)
