"""Rewards on another scale, and weights from rewards.

N completions of all prompts together. Prompt p owns the completions groups[p] ... groups[p+1] - 1.
"""

from itertools import pairwise
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from sharpen.errors import InputError

Standardise = Literal["none", "all", "prompt"]
# some units in the last place of fp32; chosen
ROUNDING = 1e-6


def standardise(
    reward: Float64[Tensor, " N"],
    groups: Int64[Tensor, " bounds"],
    eligible: Bool[Tensor, " N"],
    over: Standardise,
) -> Float64[Tensor, " N"]:
    """Rewards divided by a standard deviation within prompts, without unit.

        r[n] / sigma,   sigma^2 = mean of (r - mean of its prompt)^2 over eligible completions

    Differences of log-probs are tens of nats on long outputs, and gradients of their squares large.
    Scaling changes the optimum of `square_loss`: pi_base exp(r / (sigma beta)), for r = log pi_base
    the power 1 + 1 / (sigma beta). "all" takes one sigma for all prompts, so the optimum is that of
    another beta; "prompt" one for each, so each prompt gets a power of its own, and those whose
    samples differ least the highest.

    Args:
        reward: Of each completion.
        groups: Where the completions of each prompt start, then N.
        eligible: Which completions sigma is taken over.
        over: "none" leaves rewards as they are; "all" or "prompt" as above.

    Returns:
        Rewards; those of a prompt whose eligible rewards are equal, to the rounding of fp32, stay
        as they are with "prompt", and so do all where all are equal with "all".

    Raises:
        InputError: If `over` is none of them.

    Example:
        >>> reward = torch.tensor([-1.0, -3.0, -10.0, -14.0], dtype=torch.float64)
        >>> groups, eligible = torch.tensor([0, 2, 4]), torch.ones(4, dtype=torch.bool)
        >>> standardise(reward, groups, eligible, "prompt").tolist()
        [-1.0, -3.0, -5.0, -7.0]
    """
    if over not in get_args(Standardise):
        raise InputError(
            f"`standardise` must be one of {', '.join(get_args(Standardise))}, got {over!r}."
        )
    if over == "none":
        return reward
    centred_N = torch.zeros_like(reward)
    scale_N = torch.ones_like(reward)
    for first, last in pairwise(groups.tolist()):
        ok_G, reward_G = eligible[first:last], reward[first:last]
        if ok_G.any():
            centred_N[first:last] = reward_G - reward_G[ok_G].mean()
            scale_N[first:last] = _deviation(centred_N[first:last][ok_G], reward_G[ok_G])
    if over == "all" and eligible.any():
        scale_N[:] = _deviation(centred_N[eligible], reward[eligible])
    return reward / scale_N


def tilted_weights(
    reward: Float64[Tensor, " N"],
    groups: Int64[Tensor, " bounds"],
    eligible: Bool[Tensor, " N"],
    temperature: float,
) -> Float64[Tensor, " N"]:
    """Weight of each completion among those of its prompt: soft best-of-N.

        w[n] = exp(r[n] / lambda) / sum_m exp(r[m] / lambda),   m eligible, of n's prompt

    Self-normalised importance weights of samples of pi_base towards pi_base exp(r / lambda); for
    r = log pi_base towards the power distribution of exponent alpha = 1 + 1 / lambda. Their
    effective number is 1 / sum w^2 a prompt; where it is near 1 this is best-of-N.

    Args:
        reward: Of each completion.
        groups: Where the completions of each prompt start, then N.
        eligible: The others get weight 0.
        temperature: lambda, above 0, in units of the reward.

    Raises:
        InputError: If `temperature` is not above 0 and finite.

    Source:
        Verdun et al. 2025, arXiv:2505.03156.

    Example:
        >>> reward = torch.tensor([0.0, 0.6931471805599453, 9.0], dtype=torch.float64)
        >>> eligible = torch.tensor([True, True, False])
        >>> tilted_weights(reward, torch.tensor([0, 3]), eligible, 1.0).round(decimals=4).tolist()
        [0.3333, 0.6667, 0.0]
    """
    if not 0 < temperature < torch.inf:
        raise InputError(f"`soft_temperature` must be above 0 and finite, got {temperature}.")
    weight_N = torch.zeros_like(reward)
    for first, last in pairwise(groups.tolist()):
        ok_G = eligible[first:last]
        if ok_G.any():
            tilted_G = (reward[first:last] / temperature).masked_fill(~ok_G, -torch.inf)
            weight_N[first:last] = tilted_G.softmax(0)
    return weight_N


def _deviation(
    centred: Float64[Tensor, " n"], reward: Float64[Tensor, " n"]
) -> Float64[Tensor, ""]:
    sigma = centred.square().mean().sqrt()
    # rewards of equal completions differ by the model's own rounding, which must not become 1
    return sigma if sigma > ROUNDING * reward.abs().max() else torch.ones_like(sigma)
