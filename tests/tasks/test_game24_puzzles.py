import itertools
from fractions import Fraction

import pytest

from sharpen.tasks.game24.puzzles import (
    MAX_NUMBER,
    SPLIT_SIZES,
    apply,
    integer_solutions,
    is_solvable,
    solvable_puzzles,
    split_puzzles,
    steps_from,
)
from sharpen.tasks.game24.traces import is_solution, trace_text


def test_there_are_1362_solvable_puzzles_of_1820():
    puzzles = solvable_puzzles()
    assert len(puzzles) == len(set(puzzles)) == 1362
    assert all(p == tuple(sorted(p)) and 1 <= p[0] <= p[3] <= 13 for p in puzzles)


@pytest.mark.parametrize(
    ("numbers", "solvable"),
    [
        ((3, 3, 8, 8), True),  # 8 / (3 - 8 / 3): needs fractions
        ((1, 5, 5, 5), True),  # 5 * (5 - 1 / 5)
        ((1, 1, 1, 1), False),
        ((13, 13, 13, 13), False),
        ((4, 4, 6, 8), True),
    ],
)
def test_known_puzzles(numbers, solvable):
    assert is_solvable(numbers) is solvable


def by_single_steps(numbers, target):
    """Solvable by joining two numbers left until one is left."""
    if len(numbers) == 1:
        return numbers[0] == target
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        made = [apply(op, numbers[i], numbers[j]) for op in "+-*/"]
        if any(by_single_steps([*rest, x], target) for x in made if x is not None):
            return True
    return False


@pytest.mark.parametrize("target", [0, 1, 5, 24])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_solvable_is_what_a_search_by_single_steps_finds(count, target):
    for numbers in itertools.combinations_with_replacement((0, 1, 2, 5, 12), count):
        found = by_single_steps([Fraction(n) for n in numbers], target)
        assert is_solvable(numbers, target) is found, numbers


def test_splits_are_disjoint_and_cover_everything():
    splits = {name: split_puzzles(name) for name in SPLIT_SIZES}
    assert {name: len(puzzles) for name, puzzles in splits.items()} == SPLIT_SIZES
    assert len(splits["test"]) >= 300
    together = [p for puzzles in splits.values() for p in puzzles]
    assert sorted(together) == sorted(solvable_puzzles())


# written down once: the shipped weights were trained without these
TEST_BEGINS_WITH = ((1, 9, 11, 13), (1, 5, 11, 12), (1, 2, 6, 7))


def test_split_is_the_same_in_every_process():
    assert split_puzzles("test")[:3] == TEST_BEGINS_WITH


def test_1346_puzzles_have_an_integer_solution():
    assert sum(bool(integer_solutions(p)) for p in solvable_puzzles()) == 1346


def test_every_integer_solution_of_a_sample_is_right_and_none_repeats():
    for puzzle in solvable_puzzles()[::40]:
        solutions = integer_solutions(puzzle)
        assert len(set(solutions)) == len(solutions)
        assert all(is_solution(trace_text(puzzle, steps), puzzle) for steps in solutions)


def test_steps_are_true_and_leave_the_right_numbers():
    for step, left in steps_from((2, 3, 12, 12)):
        value = {"+": step.left + step.right, "-": step.left - step.right}
        value |= {"*": step.left * step.right, "/": Fraction(step.left, step.right)}
        assert value[step.op] == step.result <= MAX_NUMBER
        assert len(left) == 3
        assert step.result in left


def test_steps_lose_no_integer_solution_of_small_sets():
    # brute force over all orders, operators and groupings that stay within the integers
    def reach(numbers):
        if len(numbers) == 1:
            return {numbers[0]}
        found = set()
        for i, j in itertools.permutations(range(len(numbers)), 2):
            a, b = numbers[i], numbers[j]
            rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
            results = [a + b, a * b] + ([a - b] if a >= b else [])
            if b and a % b == 0:
                results.append(a // b)
            for result in results:
                if result <= MAX_NUMBER:
                    found |= reach([*rest, result])
        return found

    for numbers in [(1, 2, 3, 4), (5, 5, 7, 13), (2, 2, 2, 9)]:
        targets = reach(list(numbers))
        for target in range(0, 101):
            assert bool(integer_solutions(numbers, target)) == (target in targets)
