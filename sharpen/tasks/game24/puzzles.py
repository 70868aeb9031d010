"""Game of 24: every solvable puzzle, its three-way split, and all of its solutions.

A puzzle is a multiset of four integers in 1..13. It is solvable when some expression over
+ - * / and parentheses uses each number exactly once and equals 24 in exact rational
arithmetic. 1362 of the 1820 multisets are (the set used by Yao et al. 2023,
arXiv:2305.10601, and by Huang et al. 2024, arXiv:2412.01951).

A solution is a list of three steps; each step takes two of the numbers left and puts back
their result. The traces that the shipped model is trained on stay within the integers
0..MAX_NUMBER, so that a number is one token: 1346 of the 1362 puzzles have such a solution.

Sharpening needs no answers, so any reachable target makes a prompt. The free ones are of the kind
that the base model was trained on: numbers in 1..13, a target in 1..MAX_TARGET but 24, uniform over
the targets that the numbers reach. Numbers of the test split are left out whatever the target.
"""

import functools
import itertools
import random
from collections.abc import Iterator
from fractions import Fraction
from typing import Literal, NamedTuple

TARGET = 24
MAX_CARD = 13
MAX_NUMBER = 200

Numbers = tuple[int, ...]
Split = Literal["base", "sharpen", "test"]

SPLIT_SEED = 24
# puzzles in each split: base training, prompts for sharpening, test; 1362 together
SPLIT_SIZES: dict[Split, int] = {"base": 800, "sharpen": 250, "test": 312}
FREE_SEED = 2412
FREE_SIZE = 12000
MAX_TARGET = 100


class Step(NamedTuple):
    """`left op right = result`, all non-negative integers."""

    left: int
    op: str
    right: int
    result: int


def apply(op: str, left: Fraction, right: Fraction) -> Fraction | None:
    """`left op right` in exact arithmetic; None when it divides by zero."""
    if op == "+":
        return left + right
    if op == "-":
        return left - right
    if op == "*":
        return left * right
    if op == "/":
        return left / right if right else None
    raise ValueError(f"`op` must be one of + - * /, got {op!r}.")


def replace_pair(numbers: Numbers, left: int, right: int, result: int) -> Numbers:
    """`numbers` without one `left` and one `right`, with `result`, sorted ascending."""
    rest = list(numbers)
    rest.remove(left)
    rest.remove(right)
    return tuple(sorted([*rest, result]))


@functools.cache
def solvable_puzzles() -> tuple[Numbers, ...]:
    """All 1362 solvable multisets of four integers in 1..13, in lexicographic order."""
    cards = range(1, MAX_CARD + 1)
    every = itertools.combinations_with_replacement(cards, 4)
    return tuple(numbers for numbers in every if is_solvable(numbers))


def is_solvable(numbers: Numbers, target: int = TARGET) -> bool:
    """Whether some expression over all of `numbers` equals `target`, fractions allowed."""
    exact, goal = tuple(sorted(Fraction(n) for n in numbers)), Fraction(target)
    if len(exact) == 1:
        return exact[0] == goal
    # the last step joins two values; a look-up tells whether the other one can be made
    return any(
        value == goal == 0 or not _values(more).isdisjoint(_partners(value, goal))
        for few, more in _halves(exact)
        for value in _values(few)
    )


@functools.cache
def _values(numbers: tuple[Fraction, ...]) -> frozenset[Fraction]:
    """What expressions over all of `numbers`, sorted ascending, can equal."""
    if len(numbers) == 1:
        return frozenset(numbers)
    made = {
        apply(op, *pair)
        for few, more in _halves(numbers)
        for x, y in itertools.product(_values(few), _values(more))
        for pair in ((x, y), (y, x))
        for op in "+-*/"
    }
    return frozenset(value for value in made if value is not None)


def _halves(
    numbers: tuple[Fraction, ...],
) -> Iterator[tuple[tuple[Fraction, ...], tuple[Fraction, ...]]]:
    """Every way to part `numbers` in two, the smaller part first."""
    for size in range(1, len(numbers) // 2 + 1):
        for taken in itertools.combinations(range(len(numbers)), size):
            rest = [n for k, n in enumerate(numbers) if k not in taken]
            yield tuple(numbers[k] for k in taken), tuple(rest)


def _partners(value: Fraction, target: Fraction) -> set[Fraction]:
    """The y for which one of + - * / makes `target` of `value` and y, in either order.

    Where both are 0 every y does, and is not listed.
    """
    found = {target - value, value - target, value + target}
    if value:
        found |= {target / value, target * value}
        if target:
            found.add(value / target)
    return found


@functools.cache
def split_puzzles(split: Split) -> tuple[Numbers, ...]:
    """The puzzles of one split: a seeded shuffle of all 1362, cut by multiset.

    Raises:
        ValueError: If `split` is not "base", "sharpen" or "test".
    """
    if split not in SPLIT_SIZES:
        raise ValueError(f"`split` must be one of {', '.join(SPLIT_SIZES)}, got {split!r}.")
    shuffled = list(solvable_puzzles())
    random.Random(SPLIT_SEED).shuffle(shuffled)
    names = list(SPLIT_SIZES)
    start = sum(SPLIT_SIZES[name] for name in names[: names.index(split)])
    return tuple(shuffled[start : start + SPLIT_SIZES[split]])


def steps_from(numbers: Numbers) -> Iterator[tuple[Step, Numbers]]:
    """Every step that stays within the integers 0..MAX_NUMBER, and the numbers it leaves.

    One operand order per step: the larger number first. Nothing is lost but negative
    intermediate results, which no integer solution needs.
    """
    pairs = sorted({(max(pair), min(pair)) for pair in itertools.combinations(numbers, 2)})
    for big, small in pairs:
        results = [("+", big + small), ("-", big - small), ("*", big * small)]
        if small and big % small == 0:
            results.append(("/", big // small))
        for op, result in results:
            if result <= MAX_NUMBER:
                yield Step(big, op, small, result), replace_pair(numbers, big, small, result)


@functools.lru_cache(maxsize=1 << 18)
def integer_solutions(numbers: Numbers, target: int = TARGET) -> tuple[tuple[Step, ...], ...]:
    """Every way to `target` through integers 0..MAX_NUMBER, one step per number but the last."""
    if len(numbers) == 1:
        return ((),) if numbers[0] == target else ()
    return tuple(
        (step, *rest)
        for step, left in steps_from(tuple(sorted(numbers)))
        for rest in integer_solutions(left, target)
    )


class Targeted(NamedTuple):
    """Numbers, and what to make of them."""

    numbers: Numbers
    target: int


@functools.cache
def reachable_targets(numbers: Numbers) -> tuple[int, ...]:
    """What `numbers` can make through integers 0..MAX_NUMBER, ascending."""
    if len(numbers) == 1:
        return numbers
    made = {target for _, left in steps_from(numbers) for target in reachable_targets(left)}
    return tuple(sorted(made))


def other_targets(numbers: Numbers) -> list[int]:
    """What `numbers` can make in 1..MAX_TARGET but 24, ascending."""
    return [t for t in reachable_targets(numbers) if 0 < t <= MAX_TARGET and t != TARGET]


def random_numbers(rng: random.Random) -> Numbers:
    """Four numbers in 1..13, ascending."""
    return tuple(sorted(rng.randint(1, MAX_CARD) for _ in range(4)))


@functools.cache
def free_puzzles() -> tuple[Targeted, ...]:
    """FREE_SIZE different prompts, always the same, none of the test split's numbers among them."""
    rng = random.Random(FREE_SEED)
    held_out = set(split_puzzles("test"))
    found: dict[Targeted, None] = {}
    while len(found) < FREE_SIZE:
        numbers = random_numbers(rng)
        targets = other_targets(numbers)
        if targets and numbers not in held_out:
            found[Targeted(numbers, rng.choice(targets))] = None
    return tuple(found)
