"""Best-of-N, hard and soft: the completion of highest reward of each prompt, or a draw by reward.

Every selector starts from `candidates`: the completions that may be chosen at all.

N completions of all prompts together, P prompts, G completions of one prompt.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from sharpen.errors import InputError, check_value
from sharpen.scoring import Scores


def best_of_n(scores: Scores, reward: str | Float[Tensor, " N"] = "logprob") -> Int64[Tensor, " P"]:
    """Index of the completion of highest reward among those of each prompt.

        chosen[p] = argmax_g reward[groups[p] + g] over eligible g

    Never eligible: a completion that is not `valid`, that is empty, or whose reward is NaN. Of
    equal rewards the first wins.

    Args:
        scores: Scored completions of P prompts.
        reward: The name of a reward without options, or one reward per completion.

    Returns:
        An index into the completions of each prompt, -1 where none is eligible.

    Raises:
        InputError: If the reward is unknown, cannot be computed, or has not N entries.

    Source:
        Huang et al. 2024, arXiv:2412.01951, appendix C.

    Example:
        >>> scores = Scores.from_logprobs([[[-1.0, -2.0], [-0.5]], []])
        >>> best_of_n(scores)
        tensor([ 1, -1])
    """
    chosen = [group.best() for group in candidates(scores, reward)]
    return torch.tensor(chosen, dtype=torch.int64)


class SoftChoice(NamedTuple):
    """A completion drawn for each prompt, and what it was drawn from.

    Attributes:
        chosen: An index into the completions of each prompt, -1 where none is eligible.
        weight: Probability of each completion to be chosen, given the completions; 0 for those
            that are not eligible.
        effective_samples: How many equally weighted completions the weights of each prompt are
            worth, see `effective_samples`. Near 1 the draw is best-of-N, whatever was aimed at.
    """

    chosen: Int64[Tensor, " P"]
    weight: Float64[Tensor, " N"]
    effective_samples: Float64[Tensor, " P"]

    @classmethod
    def of(
        cls,
        weight: Float64[Tensor, " N"],
        groups: Int64[Tensor, " bounds"],
        generator: torch.Generator,
    ) -> "SoftChoice":
        """A draw by the weights of each prompt's completions."""
        chosen = draw_by_weight(weight, groups, generator)
        return cls(chosen, weight, effective_samples(weight, groups))


def soft_best_of_n(
    scores: Scores,
    reward: str | Float[Tensor, " N"] = "logprob",
    *,
    temperature: float,
    generator: torch.Generator,
) -> SoftChoice:
    """A completion of each prompt, drawn with probability softmax(reward / temperature).

        weight[n] = exp(reward[n] / temperature) / sum over the eligible m of the same prompt

    temperature -> 0 is best-of-N, temperature -> infinity a random eligible completion. With
    completions drawn from the model itself (temperature 1, no top-p) this is self-normalised
    importance sampling: as N grows its choice follows

        pi(y | x) proportional to pi_base(y | x) exp(reward(y) / temperature),

    the optimum of E[reward] - temperature KL(pi || pi_base). For the reward "logprob" that is the
    power distribution pi_base^(1 + 1 / temperature). Completions drawn twice count twice, as they
    must. Ineligible completions have no mass: what is sampled is pi given that y is eligible.

    Args:
        scores: Scored completions of P prompts.
        reward: The name of a reward without options, or one reward per completion.
        temperature: Of the softmax, in the reward's unit; finite and above 0.
        generator: On the CPU; one number per prompt is drawn from it.

    Raises:
        InputError: If the temperature is out of range, the reward is unknown, cannot be computed,
            or has not N entries.

    Source:
        Verdun et al. 2025, arXiv:2505.03156.

    Example:
        >>> scores = Scores.from_logprobs([[[-1.0], [-2.0]]])
        >>> soft = soft_best_of_n(scores, temperature=1.0, generator=torch.Generator())
        >>> soft.weight
        tensor([0.7311, 0.2689], dtype=torch.float64)
        >>> soft.effective_samples
        tensor([1.6481], dtype=torch.float64)
    """
    weight_N = soft_weights(scores, reward, temperature)
    return SoftChoice.of(weight_N, scores.groups, generator)


def soft_weights(
    scores: Scores, reward: str | Float[Tensor, " N"], temperature: float
) -> Float64[Tensor, " N"]:
    """softmax(reward / temperature) over the eligible completions of each prompt, 0 for others.

    Where the highest reward is infinite, all that have it weigh the same: the limit.

    Example:
        >>> soft_weights(Scores.from_logprobs([[[-1.0], [-1.0]], [[-3.0]]]), "logprob", 0.5)
        tensor([0.5000, 0.5000, 1.0000], dtype=torch.float64)
    """
    is_fine = 0 < temperature < math.inf
    check_value("temperature", temperature, is_fine, "finite and above 0")
    weight_N = torch.zeros(len(scores.valid), dtype=torch.float64)
    for group in candidates(scores, reward):
        weights = softmax_weights(group.rewards, temperature)
        weight_N[group.members] = torch.tensor(weights, dtype=torch.float64)
    return weight_N


def softmax_weights(rewards: Sequence[float], temperature: float) -> list[float]:
    """softmax(rewards / temperature), in fp64, its sum rounded once; in the limit if infinite.

    Example:
        >>> softmax_weights([1.0, 1.0], 0.5), softmax_weights([1.0, float("inf")], 0.5)
        ([0.5, 0.5], [0.0, 1.0])
    """
    top = max(rewards, default=0.0)
    if math.isinf(top):
        weights = [float(x == top) for x in rewards]
    else:
        weights = [math.exp((x - top) / temperature) for x in rewards]
    total = math.fsum(weights)
    return [w / total for w in weights]


def draw_by_weight(
    weight: Float64[Tensor, " N"], groups: Int64[Tensor, " bounds"], generator: torch.Generator
) -> Int64[Tensor, " bounds-1"]:
    """Index of one completion of each prompt, drawn in proportion to the weights; -1 if all are 0.

    One uniform number per prompt is drawn, in input order, also where all weights are 0. A
    completion of weight 0 is never drawn.

    Args:
        weight: Of each completion, at least 0 and finite.
        groups: Where the completions of each prompt start, then N.
        generator: On the CPU.

    Example:
        >>> weight = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
        >>> draw_by_weight(weight, torch.tensor([0, 2, 3]), torch.Generator().manual_seed(0))
        tensor([ 1, -1])
    """
    weights, chosen = weight.tolist(), []
    uniform = torch.rand(len(groups) - 1, generator=generator, dtype=torch.float64).tolist()
    for u, (first, last) in zip(uniform, pairwise(groups.tolist()), strict=True):
        total = list(accumulate(weights[first:last]))
        able = [g for g, w in enumerate(weights[first:last]) if w > 0]
        # the last one, where rounding makes u * total the total itself
        hit = (g for g in able if total[g] > u * total[-1])
        chosen.append(next(hit, able[-1]) if able else -1)
    return torch.tensor(chosen, dtype=torch.int64)


def effective_samples(
    weight: Float64[Tensor, " N"], groups: Int64[Tensor, " bounds"]
) -> Float64[Tensor, " bounds-1"]:
    """How many equally weighted completions each prompt's weights are worth.

        ess[p] = (sum w)^2 / sum w^2,      1 where one has all the weight, 0 where none has any

    Source:
        Kong, Liu and Wong 1994, sequential imputations.

    Example:
        >>> weight = torch.tensor([0.5, 0.5, 0.0, 1.0], dtype=torch.float64)
        >>> effective_samples(weight, torch.tensor([0, 3, 4, 4]))
        tensor([2., 1., 0.], dtype=torch.float64)
    """
    # of the largest of each prompt: squares of small weights underflow
    top_P = torch.segment_reduce(weight, "max", offsets=groups, initial=0.0)
    scaled_N = weight / top_P.clamp(min=torch.finfo(torch.float64).tiny).repeat_interleave(
        groups.diff()
    )
    once, squared = (
        torch.segment_reduce(x, "sum", offsets=groups) for x in (scaled_N, scaled_N.square())
    )
    return torch.where(squared > 0, once.square() / squared, 0.0)


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
    """The completions of each prompt that are valid, not empty, and whose reward is not NaN."""
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
