"""Which samples run together: batches of one prompt length under a token budget.

A batch never pads: all its prompts are of one length. The plan is a function of the whole
list of prompts and the settings, never of what is already done, so a restart runs the same
batches and gives the same bits.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """Samples start..stop-1 of prompt number `prompt`."""

    prompt: int
    start: int
    stop: int


def plan_batches(
    lengths: Sequence[int], n: int, max_new_tokens: int, max_tokens: int, *, shared: bool = False
) -> list[list[Share]]:
    """Cut all samples into batches that hold at most `max_tokens` tokens each.

    Prompts go by length, then by input order. A prompt whose n samples fit in one batch is
    never split; one that does not fit is cut into near-equal parts. A single sample longer
    than the budget is a batch of its own.

    Args:
        lengths: Tokens of each prompt.
        n: Samples per prompt.
        max_new_tokens: Most tokens a sample can add.
        max_tokens: Budget: rows x (prompt + max_new_tokens), or if `shared`
            prompts + rows x max_new_tokens.
        shared: Whether a batch holds a prompt once for all its rows.
    """
    batches: list[list[Share]] = []
    left = 0
    length_now = -1
    for prompt in sorted(range(len(lengths)), key=lambda p: lengths[p]):
        once, each = lengths[prompt], max_new_tokens
        if not shared:
            once, each = 0, each + once
        cost = once + n * each
        if cost > max_tokens:
            parts = -(-n // max(1, (max_tokens - once) // each))
            cuts = [n * i // parts for i in range(parts + 1)]
            batches += [[Share(prompt, a, b)] for a, b in itertools.pairwise(cuts)]
            length_now = -1
            continue
        if lengths[prompt] != length_now or left < cost:
            batches.append([])
            length_now, left = lengths[prompt], max_tokens
        batches[-1].append(Share(prompt, 0, n))
        left -= cost
    return batches
