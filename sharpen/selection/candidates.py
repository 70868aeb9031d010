"""Which completions of each prompt may be chosen, and their rewards: the start of every selector.

N completions of all prompts together.
"""

from dataclasses import dataclass
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

from sharpen.errors import InputError
from sharpen.scoring import Scores


@dataclass(frozen=True)
class Candidates:
    """The eligible completions of one prompt, in input order.

    Attributes:
        first: Number of the prompt's first completion among all N.
        members: Numbers of its eligible completions among all N.
        rewards: Of those.
    """

    first: int
    members: list[int]
    rewards: list[float]

    def best(self, among: set[int] | None = None) -> int:
        """Index, within the prompt, of the highest reward; the first of equals; -1 if none."""
        pairs = zip(self.members, self.rewards, strict=True)
        able = [(n, reward) for n, reward in pairs if among is None or n in among]
        # max() keeps the first of equals
        number, _ = max(able, key=lambda pair: pair[1], default=(self.first - 1, 0.0))
        return number - self.first


def candidates(scores: Scores, reward: str | Float[Tensor, " N"]) -> list[Candidates]:
    """The completions of each prompt that are valid, not empty, and whose reward is not NaN.

    Raises:
        InputError: If the reward is unknown, cannot be computed, or has not N entries.
    """
    N = len(scores.valid)
    reward_N = scores.reward(reward) if isinstance(reward, str) else reward
    if reward_N.shape != (N,):
        raise InputError(
            f"`reward` must hold one number for each of N={N} completions, "
            f"got shape {tuple(reward_N.shape)}."
        )
    reward_N = reward_N.detach().cpu()
    eligible = (scores.eligible & ~reward_N.isnan()).tolist()
    values = reward_N.tolist()
    found = []
    for first, last in pairwise(scores.groups.tolist()):
        members = [n for n in range(first, last) if eligible[n]]
        found.append(Candidates(first, members, [values[n] for n in members]))
    return found
