"""Inference-time pessimism: rejection sampling that limits how far a flawed reward is trusted.

It aims at the distribution pi_base(y) w(y) with w(y) = relu((reward(y) - level) / beta) and the
level such that E[w] = 1: the optimum of E[reward] - (beta / 2) chi^2(pi || pi_base). However many
samples there are, w stays at most (max reward - level) / beta; best-of-N's grows with them.

N completions of all prompts together, P prompts.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from sharpen.errors import InputError, check_value
from sharpen.scoring import Scores

from .best_of_n import SoftChoice, candidates


class PessimisticChoice(NamedTuple):
    """A completion of the second batch for each prompt, and how it came to be chosen.

    Attributes:
        chosen: An index into the prompt's completions of the second batch, -1 where none is
            eligible.
        accepted: Whether it was accepted; False for the one that is taken where none was.
        level: The water level of the first batch; NaN where it has no finite reward.
    """

    chosen: Int64[Tensor, " P"]
    accepted: Bool[Tensor, " P"]
    level: Float64[Tensor, " P"]


def water_level(rewards: Sequence[float], beta: float) -> float:
    """The level at which rewards rise on average by beta above it; exact, by sorting.

        (1 / n) sum_i relu((rewards[i] - level) / beta) = 1

    With the k highest rewards above it the level is (their sum - n beta) / k; k is the largest
    number for which the k-th highest is still above. In the unit of the rewards.

    Args:
        rewards: Of one prompt; finite or -inf, not all -inf.
        beta: Finite and above 0; in the unit of the rewards.

    Raises:
        InputError: If `beta` is out of range, or no reward is finite, or one is inf or NaN.

    Source:
        Huang et al. 2025, arXiv:2503.21878, the normalisation constant of its algorithm.

    Example:
        >>> water_level([1.0, 0.0, -5.0], beta=1.0)  # (1 + 1) + (0 + 1) = 3
        -1.0
    """
    check_beta(beta)
    highest_first = sorted(rewards, reverse=True)
    is_bad = any(math.isnan(x) or x == math.inf for x in rewards)
    if is_bad or not rewards or highest_first[0] == -math.inf:
        raise InputError(
            f"`rewards` must be finite or -inf, not all -inf, got {list(rewards)[:8]}."
        )
    n, top = len(rewards), highest_first[0]
    level, total = top - n * beta, 0.0
    for k, reward in enumerate(highest_first, start=1):
        # sums of differences from the highest: large rewards of small spread keep their digits
        total += reward - top
        if reward <= level:
            break
        level = top + (total - n * beta) / k
    return level


def pessimistic_best_of_n(
    scores: Scores,
    reward: str | Float[Tensor, " N"] = "logprob",
    *,
    beta: float,
    generator: torch.Generator,
) -> SoftChoice:
    """A completion of each prompt, drawn in proportion to its pessimistic weight.

        weight[n] = relu((reward[n] - level) / beta) / G,      level = water_level(rewards, beta)

    Over the G eligible completions of the prompt, so that they sum to 1. The one-batch form of
    `inference_time_pessimism`: half the samples, without its guarantee, because the level and the
    choice come from the same completions. beta -> 0 is best-of-N, beta -> infinity a random one.

    Args:
        scores: Scored completions of P prompts.
        reward: The name of a reward without options, or one reward per completion; below inf.
        beta: In the reward's unit; finite and above 0.
        generator: On the CPU; one number per prompt is drawn from it.

    Raises:
        InputError: If `beta` is out of range, a reward is inf, unknown, cannot be computed, or has
            not N entries.

    Source:
        After Huang et al. 2025, arXiv:2503.21878.

    Example:
        >>> scores = Scores.from_logprobs([[[-1.0], [-2.0], [-7.0]]])
        >>> pessimistic_best_of_n(scores, beta=1.0, generator=torch.Generator()).weight
        tensor([0.6667, 0.3333, 0.0000], dtype=torch.float64)
    """
    check_beta(beta)
    weight_N = torch.zeros(len(scores.valid), dtype=torch.float64)
    for group in candidates(scores, reward):
        if not group.members:
            continue
        if set(group.rewards) == {-math.inf}:
            # no level; all are alike
            weight_N[group.members] = 1 / len(group.members)
            continue
        level = water_level(group.rewards, beta)
        reward_G = torch.tensor(group.rewards, dtype=torch.float64)
        weight_N[group.members] = (reward_G - level).clamp(min=0) / (beta * len(group.members))
    return SoftChoice.of(weight_N, scores.groups, generator)


def inference_time_pessimism(
    first: Scores,
    second: Scores,
    reward: str | tuple[Float[Tensor, " first"], Float[Tensor, " second"]] = "logprob",
    *,
    beta: float,
    reward_max: float = 0.0,
    generator: torch.Generator,
) -> PessimisticChoice:
    """A completion of the second batch, accepted by how far it rises above the first's level.

        level = water_level(rewards of the first batch, beta)
        in order, accept completion i of the second with probability w_i / M,
        w_i = relu((reward_i - level) / beta),      M = (reward_max - level) / beta

    The last eligible completion of the second batch is not tried: it is the fresh sample that is
    returned where none before it is accepted, or the first batch has no level.

    Args:
        first: Scored completions of P prompts.
        second: Other completions of the same prompts, drawn independently of the first.
        reward: The name of a reward without options, or the rewards of both batches.
        beta: In the reward's unit; finite and above 0.
        reward_max: No reward is above it; 0 for a log-prob.
        generator: On the CPU; one number per completion of the second batch is drawn from it.

    Raises:
        InputError: If `beta` is out of range, a reward is above `reward_max`, the batches are of
            different numbers of prompts, or the reward cannot be computed or has another length.

    Source:
        Huang et al. 2025, arXiv:2503.21878 (InferenceTimePessimism).

    Example:
        >>> first = Scores.from_logprobs([[[-1.0], [-2.0], [-7.0]]])
        >>> second = Scores.from_logprobs([[[-9.0], [-8.0]]])
        >>> choice = inference_time_pessimism(
        ...     first, second, beta=1.0, generator=torch.Generator()
        ... )
        >>> choice.chosen, choice.accepted, choice.level  # -9 is below the level: never accepted
        (tensor([1]), tensor([False]), tensor([-3.], dtype=torch.float64))
    """
    check_beta(beta)
    if len(first.groups) != len(second.groups):
        raise InputError(
            f"`second` must hold completions of the same prompts as `first`, "
            f"{len(first.groups) - 1}, got {len(second.groups) - 1}."
        )
    names = (reward, reward) if isinstance(reward, str) else reward
    batches = [candidates(scores, of) for scores, of in zip((first, second), names, strict=True)]
    highest = max((x for batch in batches for group in batch for x in group.rewards), default=0.0)
    if not highest <= reward_max < math.inf:
        raise InputError(
            f"`reward_max` must be finite and at least every reward, got {reward_max} with a "
            f"reward of {highest}."
        )
    uniform = torch.rand(len(second.valid), generator=generator, dtype=torch.float64).tolist()
    chosen, accepted, levels = [], [], []
    for measured, drawn in zip(*batches, strict=True):
        level = math.nan
        if any(math.isfinite(x) for x in measured.rewards):
            level = water_level(measured.rewards, beta)
        tried = zip(drawn.members[:-1], drawn.rewards[:-1], strict=True)
        # u < w / M; never true of a NaN level
        taken = (n for n, x in tried if uniform[n] * (reward_max - level) < x - level)
        number = next(taken, None)
        accepted.append(number is not None)
        last = drawn.members[-1] if drawn.members else drawn.first - 1
        chosen.append((last if number is None else number) - drawn.first)
        levels.append(level)
    return PessimisticChoice(
        torch.tensor(chosen, dtype=torch.int64),
        torch.tensor(accepted, dtype=torch.bool),
        torch.tensor(levels, dtype=torch.float64),
    )


def check_beta(beta: float) -> None:
    """Raise `InputError` unless `beta` is finite and above 0."""
    check_value("beta", beta, 0 < beta < math.inf, "finite and above 0")
