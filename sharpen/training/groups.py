"""What a step sees: the completions of one prompt together, and batches of such groups.

N completions of all prompts of a batch, Q pairs. A group is never cut, so its prompt is computed
once for all of its completions, and pairs stay within a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from sharpen.errors import InputError


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


def _end_to_end(parts: Sequence[Sequence[float]]) -> Float64[Tensor, " n"]:
    return torch.tensor([x for part in parts for x in part], dtype=torch.float64)
