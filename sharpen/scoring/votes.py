"""Rewards of what a completion answers: how often, and how probably, its prompt is answered so.

N completions; prompt p owns the completions groups[p] ... groups[p + 1] - 1. Both rewards change
with the set of completions, so a figure of best-of-k needs one vote per subset. The selectors of
`sharpen.selection.votes` vote on the same answers.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float32, Float64, Int64
from torch import Tensor

from sharpen.errors import InputError
from sharpen_kernels import segment_reduce


def majority(
    groups: Int64[Tensor, " bounds"],
    valid: Bool[Tensor, " N"],
    *,
    answers: Sequence[str | None],
) -> Float32[Tensor, " N"]:
    """Share of the prompt's valid completions that give the same answer, in [0, 1].

        reward[n] = #{m valid, of n's prompt: answers[m] = answers[n]} / #{m valid, of n's prompt}

    Blind to length. A completion without an answer gets 0, and counts in the denominator.

    Args:
        groups: Where the completions of each prompt start, then N.
        valid: Which completions vote.
        answers: What each completion answers, None where nothing could be read.

    Raises:
        InputError: If there is not one answer per completion.

    Source:
        Wang et al. 2022, arXiv:2203.11171; as a self-reward in Huang et al., section 5.

    Example:
        >>> groups, valid = torch.tensor([0, 4]), torch.tensor([True, True, True, False])
        >>> majority(groups, valid, answers=["24", "24", None, "7"])
        tensor([0.6667, 0.6667, 0.0000, 0.0000])
    """
    N = len(valid)
    check_one_each("answers", answers, N)
    votes = valid.tolist()
    bounds = groups.tolist()
    share = [0.0] * N
    for first, last in pairwise(bounds):
        n_valid = sum(votes[first:last])
        counts = Counter(answers[n] for n in range(first, last) if votes[n])
        for n in range(first, last):
            if answers[n] is not None and n_valid:
                share[n] = counts[answers[n]] / n_valid
    return torch.tensor(share, dtype=torch.float32)


def perplexity_consistency(
    logprob: Float32[Tensor, " S"],
    offsets: Int64[Tensor, " token_bounds"],
    groups: Int64[Tensor, " bounds"],
    valid: Bool[Tensor, " N"],
    *,
    answers: Sequence[str | None],
    keys: Sequence[Hashable],
) -> Float32[Tensor, " N"]:
    """Log of the probability that the sampled completions give to an answer, in nats.

        reward[n] = log sum_{y in Y: answer(y) = answers[n]} p(y | prompt),
        Y = the distinct valid completions of n's prompt

    A lower bound of log p(answer | prompt), exact once every completion of that answer was drawn:
    unlike a vote's share it counts a completion once, however often it was drawn. Prefers answers
    of short completions, as the summed log-prob does. Without the pruning of improbable completions
    that RPC puts before it.

    Args:
        logprob: Of each scored token, nats.
        offsets: Where the tokens of each completion start, then S.
        groups: Where the completions of each prompt start, then N.
        valid: Which completions count. An empty one, or one whose log-prob is NaN, never does.
        answers: What each completion answers, None where nothing could be read: the reward is -inf.
        keys: Equal for equal completions of a prompt: tuples of their token ids.

    Raises:
        InputError: If there is not one answer and one key per completion.

    Source:
        Zhou et al. 2025 (RPC), arXiv:2502.00511, perplexity consistency.

    Example:
        >>> logprob, offsets = torch.tensor([0.25, 0.25, 0.3, 0.2]).log(), torch.arange(5)
        >>> groups, valid = torch.tensor([0, 4]), torch.tensor([True] * 4)
        >>> keys = [(7,), (7,), (8,), (9,)]
        >>> reward = perplexity_consistency(
        ...     logprob, offsets, groups, valid, answers=["a", "a", "b", "b"], keys=keys
        ... )
        >>> reward.exp()  # "a" was drawn twice, but is one completion
        tensor([0.2500, 0.2500, 0.5000, 0.5000])
    """
    sums = segment_reduce({"logprob": logprob.double()}, offsets).sequences["logprob"].sum
    assert sums is not None
    counts = valid & (offsets.diff() > 0) & ~sums.isnan()
    mass_N = answer_logprob(sums, groups, counts, answers, keys)
    return mass_N.masked_fill(sums.isnan(), float("nan")).float()


def answer_logprob(
    sequence_logprob: Float64[Tensor, " N"],
    groups: Int64[Tensor, " bounds"],
    counts: Bool[Tensor, " N"],
    answers: Sequence[str | None],
    keys: Sequence[Hashable],
) -> Float64[Tensor, " N"]:
    """Log of the summed probability of the distinct completions with the same answer, nats.

    -inf for a completion without an answer, and for an answer that no counted completion gives.

    Args:
        sequence_logprob: Of each completion, nats.
        groups: Where the completions of each prompt start, then N.
        counts: Which completions are summed over.
        answers: As in `perplexity_consistency`.
        keys: As in `perplexity_consistency`.

    """
    N = len(counts)
    check_one_each("answers", answers, N)
    check_one_each("keys", keys, N)
    logprobs, counted = sequence_logprob.tolist(), counts.tolist()
    found = [-math.inf] * N
    for first, last in pairwise(groups.tolist()):
        of: dict[str | None, list[float]] = defaultdict(list)
        for n in distinct_answers([n for n in range(first, last) if counted[n]], answers, keys):
            of[answers[n]].append(logprobs[n])
        mass = {answer: _logsumexp(terms) for answer, terms in of.items()}
        for n in range(first, last):
            answer = answers[n]
            found[n] = -math.inf if answer is None else mass.get(answer, -math.inf)
    return torch.tensor(found, dtype=torch.float64)


def distinct_answers(
    members: Sequence[int], answers: Sequence[str | None], keys: Sequence[Hashable]
) -> list[int]:
    """Of some completions of one prompt those that have an answer, the first of equal ones."""
    found: dict[tuple[str, Hashable], int] = {}
    for n in members:
        answer = answers[n]
        if answer is not None:
            found.setdefault((answer, keys[n]), n)
    return list(found.values())


def check_one_each(name: str, values: Sequence[object], N: int) -> None:
    """Raise `InputError` unless there is one value per completion."""
    if len(values) != N:
        entry = "answer or None" if name == "answers" else "key"
        raise InputError(
            f"`{name}` must hold one {entry} for each of N={N} completions, "
            f"got {len(values)}; list the completions of all prompts end to end."
        )


def _logsumexp(values: Sequence[float]) -> float:
    """Of at least one value."""
    top = max(values)
    if math.isinf(top):
        return top
    # fsum rounds once: the order of the completions does not show
    return top + math.log(math.fsum(math.exp(x - top) for x in values))
