"""What is scored: ids of prompts and their completions, as checked (prompt, completion) pairs.

S completion tokens of all prompts and completions, end to end: the input order of a token.
"""

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from sharpen.errors import InputError
from sharpen.models import ModelLimits

# token ids as they are given: a list, an array or a tensor; and those of a prompt's completions
Ids = Sequence[int] | np.ndarray | Tensor
Group = Sequence[Ids] | np.ndarray | Tensor
Pair = tuple[list[int], list[int]]


def pair_up(
    limits: ModelLimits,
    prompts: Sequence[Ids],
    completions: Sequence[Group],
) -> list[Pair]:
    """One pair per completion, all prompts end to end.

    A prompt that is given several times as one object is checked and copied once.

    Raises:
        InputError: If there is not one list of completions per prompt, or the model cannot read a
            pair.
    """
    check_groups(prompts, completions)
    listed = [_listed(prompt) for prompt in prompts]
    # the prompt is kept beside its id(), or another one could get the same
    known: dict[int, tuple[Sequence[int], list[int]]] = {}
    pairs = []
    for p, (prompt, group) in enumerate(zip(listed, completions, strict=True)):
        if id(prompt) not in known:
            limits.check(f"prompts[{p}]", prompt)
            known[id(prompt)] = (prompt, list(prompt))
        ids = known[id(prompt)][1]
        for g, completion in enumerate(map(_listed, group)):
            # what scores the last token is read before it
            unread = min(1, len(completion))
            limits.check_completion(f"completions[{p}][{g}]", len(ids), completion, unread=unread)
            pairs.append((ids, list(completion)))
    return pairs


def _listed(ids: Ids) -> Sequence[int]:
    """Ids as they are, or as a list if they come as an array or a tensor."""
    return ids.tolist() if isinstance(ids, (np.ndarray, Tensor)) else ids


def token_starts(pairs: Sequence[Pair]) -> list[int]:
    """Where the tokens of each completion start in input order, then their number."""
    return [0, *accumulate(len(completion) for _, completion in pairs)]


def check_groups(prompts: Sequence[object], completions: Sequence[object]) -> None:
    """Reject anything but one list of completions per prompt."""
    if len(prompts) != len(completions):
        raise InputError(
            f"`completions` must hold one list for each of {len(prompts)} prompts, "
            f"got {len(completions)}; give an empty list to a prompt that has none."
        )


def token_multiplicity(prompts: Sequence[Ids], completions: Sequence[Group]) -> Int64[Tensor, " S"]:
    """How many of the tokens have the same id behind the same prompt and tokens, itself among them.

    A sum over `Scorer.logprobs` counts a token that k completions begin with k times, as if each
    was alone: what losses of sequences want. Divided by this, each distinct token counts once.

        sum_s logprob[s] / token_multiplicity[s]  =  sum over the distinct tokens of the tree

    `sharers` is the same function.

    Args:
        prompts: As in `Scorer.score`.
        completions: As in `Scorer.score`; duplicates share all of their tokens.

    Raises:
        InputError: If there is not one list of completions per prompt.

    Example:
        >>> token_multiplicity([[1, 2]], [[[3, 4], [3, 5], [6]]]).tolist()
        [2, 1, 2, 1, 1]
    """
    check_groups(prompts, completions)
    children: dict[tuple[int, int], int] = {}

    def step(node: int, token: int) -> int:
        return children.setdefault((node, int(token)), len(children) + 1)

    nodes = []
    for prompt, group in zip(prompts, completions, strict=True):
        end = reduce(step, _listed(prompt), 0)
        for completion in map(_listed, group):
            node = end
            for token in completion:
                node = step(node, token)
                nodes.append(node)
    node_S = torch.tensor(nodes, dtype=torch.int64)
    return torch.bincount(node_S)[node_S]


sharers = token_multiplicity
