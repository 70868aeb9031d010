"""How many completions share each of their tokens: weights for losses.

S completion tokens of all prompts and completions, end to end.
"""

from collections.abc import Sequence
from functools import reduce

import torch
from jaxtyping import Int64
from torch import Tensor

from .pairs import check_groups


def sharers(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]
) -> Int64[Tensor, " S"]:
    """How many of the tokens have the same id behind the same prompt and tokens, itself among them.

    A sum over `Scorer.logprobs` counts a token that k completions begin with k times, as if each
    was alone: what losses of sequences want. Divided by this, each distinct token counts once.

        sum_s logprob[s] / sharers[s]  =  sum over the distinct tokens of the tree

    Args:
        prompts: As in `Scorer.score`.
        completions: As in `Scorer.score`; duplicates share all of their tokens.

    Raises:
        InputError: If there is not one list of completions per prompt.

    Example:
        >>> sharers([[1, 2]], [[[3, 4], [3, 5], [6]]]).tolist()
        [2, 1, 2, 1, 1]
    """
    check_groups(prompts, completions)
    children: dict[tuple[int, int], int] = {}

    def step(node: int, token: int) -> int:
        return children.setdefault((node, int(token)), len(children) + 1)

    nodes = []
    for prompt, group in zip(prompts, completions, strict=True):
        end = reduce(step, prompt, 0)
        for completion in group:
            node = end
            for token in completion:
                node = step(node, token)
                nodes.append(node)
    node_S = torch.tensor(nodes, dtype=torch.int64)
    return torch.bincount(node_S)[node_S]
