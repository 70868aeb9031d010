"""What a step sees: the completions of one prompt together, and batches of such groups.

    Group, Batch                           the data of a step
    weighted_groups, paired_group          completions with their weights, or pairs, to groups
    chosen_weights, tilted_weights         choices or rewards to weights
    choose_pairs                           which completions of a prompt are compared with which
    standardise                            rewards on another scale

A group is never split, so its prompt is computed once for all of its completions, and pairs stay
within a batch.

N completions of all prompts, Q pairs, G completions of one prompt. Prompt p owns the completions
groups[p] ... groups[p + 1] - 1.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise
from math import isfinite
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from sharpen.errors import InputError, check_value

PairKind = Literal["random", "all", "best_worst"]
Pairs = list[tuple[int, int]]
Standardise = Literal["none", "all", "prompt"]
# some units in the last place of fp32; chosen
ROUNDING = 1e-6


@dataclass(frozen=True)
class Group:
    """Completions of one prompt, and what is known of each before training.

    Attributes:
        prompt_ids: Token ids, at least one.
        completion_ids: Token ids of each completion, none empty.
        weight: In the likelihood; empty where no likelihood is fitted.
        reference: log pi_base in nats, summed over tokens; empty where no ratio is needed.
        reward: Empty where no reward is needed.
        pairs: (y, y') as indices into the completions.
    """

    prompt_ids: list[int]
    completion_ids: list[list[int]]
    weight: Sequence[float] = ()
    reference: Sequence[float] = ()
    reward: Sequence[float] = ()
    pairs: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True, eq=False)
class Batch:
    """Groups of several prompts, end to end, on the CPU.

    Attributes:
        prompts: As `Scorer.logprobs` takes them.
        completions: As `Scorer.logprobs` takes them.
        offsets: Completion n owns the scored tokens offsets[n] ... offsets[n + 1] - 1.
        weight: See `Group`; of length N or 0, as the two below.
        reference: See `Group`.
        reward: See `Group`.
        pairs: Indices into the N completions.
    """

    prompts: list[list[int]]
    completions: list[list[list[int]]]
    offsets: Int64[Tensor, " bounds"]
    weight: Float64[Tensor, " n_weight"]
    reference: Float64[Tensor, " n_reference"]
    reward: Float64[Tensor, " n_reward"]
    pairs: Int64[Tensor, "Q 2"]

    @classmethod
    def of(cls, groups: Sequence[Group]) -> "Batch":
        """Collate groups."""
        starts = [0, *accumulate(len(group.completion_ids) for group in groups)]
        lengths = [len(ids) for group in groups for ids in group.completion_ids]
        pairs = [
            (start + i, start + j)
            for start, group in zip(starts, groups, strict=False)
            for i, j in group.pairs
        ]
        return cls(
            prompts=[group.prompt_ids for group in groups],
            completions=[group.completion_ids for group in groups],
            offsets=torch.tensor([0, *accumulate(lengths)]),
            weight=_end_to_end([group.weight for group in groups]),
            reference=_end_to_end([group.reference for group in groups]),
            reward=_end_to_end([group.reward for group in groups]),
            pairs=torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        )

    @property
    def n_tokens(self) -> int:
        """Tokens of all prompts, each once, and of all completions."""
        return sum(map(len, self.prompts)) + int(self.offsets[-1])


def weighted_groups(
    prompts: Sequence[list[int]],
    completions: Sequence[list[list[int]]],
    weight: Float64[Tensor, " N"],
) -> list[Group]:
    """One group a prompt, of the completions of positive weight; prompts without one left out.

    Args:
        prompts: Token ids.
        completions: Token ids of the completions of each prompt.
        weight: Of each completion, all prompts end to end. One-hot is best-of-N; all 1 are samples
            that were drawn from the target itself.

    Raises:
        InputError: If there is not one finite weight of at least 0 for each completion, or all
            are 0.
    """
    weights = weight.tolist()
    n = sum(map(len, completions))
    if len(weights) != n:
        raise InputError(f"`weight` must hold one number for each of N={n}, got {len(weights)}.")
    if not bool((weight.isfinite() & (weight >= 0)).all()):
        raise InputError("`weight` must be finite and at least 0 everywhere; leave others out.")
    found, start = [], 0
    for prompt, group in zip(prompts, completions, strict=True):
        share = weights[start : start + len(group)]
        start += len(group)
        kept = [g for g, w in enumerate(share) if w > 0]
        if kept:
            ids, own = [group[g] for g in kept], [share[g] for g in kept]
            found.append(Group(prompt, ids, weight=own))
    if not found:
        raise InputError("no completion has a positive weight: there is nothing to fit.")
    return found


def chosen_weights(
    groups: Int64[Tensor, " bounds"], chosen: Int64[Tensor, " bounds-1"]
) -> Float64[Tensor, " N"]:
    """Weight 1 for the chosen completion of each prompt, 0 for the others.

    Args:
        groups: Where the completions of each prompt start, then N.
        chosen: Index into the completions of each prompt, -1 for none, as `best_of_n` returns it.

    Example:
        >>> chosen_weights(torch.tensor([0, 2, 3]), torch.tensor([1, -1])).tolist()
        [0.0, 1.0, 0.0]
    """
    weight_N = torch.zeros(int(groups[-1]), dtype=torch.float64)
    has_one_P = chosen >= 0
    weight_N[(groups[:-1] + chosen)[has_one_P]] = 1.0
    return weight_N


def paired_group(
    prompt_ids: list[int],
    completion_ids: list[list[int]],
    reference: Sequence[float],
    reward: Sequence[float],
    pairs: Sequence[tuple[int, int]],
) -> Group:
    """The group of the completions that `pairs` names; the others cost nothing."""
    used = sorted({g for pair in pairs for g in pair})
    place = {g: i for i, g in enumerate(used)}
    return Group(
        prompt_ids,
        [completion_ids[g] for g in used],
        reference=[reference[g] for g in used],
        reward=[reward[g] for g in used],
        pairs=[(place[i], place[j]) for i, j in pairs],
    )


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
    check_choice("pairs", kind, PairKind)
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
    check_choice("standardise", over, Standardise)
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
    is_good = 0 < temperature < torch.inf
    check_value("soft_temperature", temperature, is_good, "above 0 and finite")
    weight_N = torch.zeros_like(reward)
    for first, last in pairwise(groups.tolist()):
        ok_G = eligible[first:last]
        if ok_G.any():
            tilted_G = (reward[first:last] / temperature).masked_fill(~ok_G, -torch.inf)
            weight_N[first:last] = tilted_G.softmax(0)
    return weight_N


def check_choice(name: str, value: object, choices: Any) -> None:
    """Reject what is not one of a `Literal`."""
    known = get_args(choices)
    check_value(name, repr(value), value in known, f"one of {', '.join(known)}")


def _end_to_end(parts: Sequence[Sequence[float]]) -> Float64[Tensor, " n"]:
    """One vector of all parts."""
    return torch.tensor([x for part in parts for x in part], dtype=torch.float64)


def _deviation(
    centred: Float64[Tensor, " n"], reward: Float64[Tensor, " n"]
) -> Float64[Tensor, ""]:
    """The standard deviation; 1 where it is no more than rounding."""
    sigma = centred.square().mean().sqrt()
    # rewards of equal completions differ by the model's own rounding, which must not become 1
    return sigma if sigma > ROUNDING * reward.abs().max() else torch.ones_like(sigma)
