"""Which completions of a prompt are compared with which.

G completions of one prompt, Q pairs.
"""

from collections.abc import Hashable, Sequence
from itertools import combinations
from math import isfinite
from typing import Literal, get_args

import torch

from sharpen.errors import InputError

PairKind = Literal["random", "all", "best_worst"]
Pairs = list[tuple[int, int]]


def choose_pairs(
    kind: PairKind,
    reward: Sequence[float],
    eligible: Sequence[bool],
    generator: torch.Generator,
    completions: Sequence[Hashable] | None = None,
) -> Pairs:
    """Pairs (y, y') of one prompt's completions, the one of higher reward first.

        random:      every eligible completion in at most one pair: Q <= G // 2, independent
        all:         every two of them: Q <= G (G - 1) / 2
        best_worst:  the highest reward against the lowest: Q <= 1

    Random pairs are the paper's data, y and y' drawn alike. All pairs make use of each completion
    G - 1 times, for the same forwards. The best and the worst are far apart: a strong signal, and
    drawn from another law than the completions. Of equal rewards the first counts as the higher.

    A completion and its copy make no pair: their difference is 0 under every policy, so they teach
    nothing, and only make the mean over pairs smaller.

    Args:
        kind: One of the three.
        reward: Of each completion; finite where eligible.
        eligible: False for those that must not be in a pair.
        generator: For "random"; the others draw nothing.
        completions: Text, or a tuple of ids, of each: what tells copies. None: all differ.

    Returns:
        Indices into the G completions; none where fewer than two eligible ones differ.

    Raises:
        InputError: If there is no such kind, the lists disagree in length, or an eligible reward
            is NaN or infinite.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> choose_pairs("best_worst", [-2.0, -1.0, -5.0], [True, True, True], generator)
        [(1, 2)]
        >>> choose_pairs("all", [-2.0, -1.0, -5.0], [True, True, True], generator)
        [(1, 0), (0, 2), (1, 2)]
    """
    if kind not in get_args(PairKind):
        raise InputError(f"`pairs` must be one of {', '.join(get_args(PairKind))}, got {kind!r}.")
    said = range(len(reward)) if completions is None else completions
    if not len(reward) == len(eligible) == len(said):
        raise InputError(
            "`reward`, `eligible` and `completions` must be of one length, got "
            f"{len(reward)}, {len(eligible)} and {len(said)}."
        )
    at = [g for g, ok in enumerate(eligible) if ok]
    bad = [g for g in at if not isfinite(reward[g])]
    if bad:
        raise InputError(
            f"`reward` must be finite where eligible, got {reward[bad[0]]} for completion "
            f"{bad[0]}; make it not eligible."
        )
    if len({said[g] for g in at}) < 2:
        return []
    if kind == "all":
        found = list(combinations(at, 2))
    elif kind == "random":
        order = [at[i] for i in torch.randperm(len(at), generator=generator).tolist()]
        found = [(order[i], order[i + 1]) for i in range(0, len(at) - 1, 2)]
    else:
        best = max(at, key=reward.__getitem__)
        others = [g for g in reversed(at) if said[g] != said[best]]
        # the last of equals: of equal rewards the first counts as the higher
        found = [(best, min(others, key=reward.__getitem__))]
    return [
        (i, j) if (reward[i], -i) >= (reward[j], -j) else (j, i)
        for i, j in found
        if said[i] != said[j]
    ]
