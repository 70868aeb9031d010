"""Prompts without labels: four numbers and another target that they reach.

Sharpening needs no answers, so any reachable target makes a prompt. These are of the kind that the
base model was trained on: numbers in 1..13, a target in 1..MAX_TARGET but 24, uniform over the
targets that the numbers reach. Numbers of the test split are left out whatever the target.
"""

import functools
import random
from typing import NamedTuple

from .puzzles import MAX_CARD, TARGET, Numbers, split_puzzles, steps_from

FREE_SEED = 2412
FREE_SIZE = 12000
MAX_TARGET = 100


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
