"""Statistics of tokens to one reward per completion; higher is better.

S scored tokens, N completions of all prompts together, P prompts.

Completion n owns the scored tokens offsets[n] ... offsets[n + 1] - 1, prompt p the completions
groups[p] ... groups[p + 1] - 1. A reward is a pure function, and its parameters say what it needs:
a token statistic by its name, `offsets`, `groups` or `valid`, or else an option that the caller
gives. Sums run over fp64 in token order, so a reward has the same bits in any batch. An empty
completion gets 0 from all of them and is never chosen; NaN stays in its completion.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Float32, Float64, Int64
from torch import Tensor

from sharpen.errors import InputError

LAYOUT = ("offsets", "groups", "valid")


def sequence_logprob(
    logprob: Float32[Tensor, " S"], offsets: Int64[Tensor, " bounds"]
) -> Float32[Tensor, " bounds-1"]:
    """Log-probability of each completion, in nats: the self-reward of sharpening.

        reward[n] = sum_s logprob[s] = log p(completion n | its prompt)

    Prefers short completions: each further token can only lower it.

    Source:
        Huang et al. 2024, arXiv:2412.01951, Eq. 2.

    Example:
        >>> sequence_logprob(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 2, 3]))
        tensor([-3., -4.])
    """
    return _sum(logprob, offsets).float()


def mean_logprob(
    logprob: Float32[Tensor, " S"], offsets: Int64[Tensor, " bounds"]
) -> Float32[Tensor, " bounds-1"]:
    """Log-probability per token, in nats: minus the logarithm of the perplexity.

        reward[n] = sum_s logprob[s] / length[n]

    Not the logarithm of a probability. Prefers long completions: late tokens are easier.

    Source:
        Huang et al. 2024, arXiv:2412.01951, section 2.

    Example:
        >>> mean_logprob(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 2, 3]))
        tensor([-1.5000, -4.0000])
    """
    return _mean(logprob, offsets)


def mean_self_certainty(
    self_certainty: Float32[Tensor, " S"], offsets: Int64[Tensor, " bounds"]
) -> Float32[Tensor, " bounds-1"]:
    """Mean divergence of the model's distributions from the uniform one, in nats.

        reward[n] = sum_s KL(uniform || p_s) / length[n]

    Looks at the distributions before each token and not at the token drawn. Nearly free of length.

    Source:
        Kang, Zhao and Song 2025, arXiv:2502.18581.

    Example:
        >>> mean_self_certainty(torch.tensor([2.0, 4.0]), torch.tensor([0, 2]))
        tensor([3.])
    """
    return _mean(self_certainty, offsets)


def neg_entropy(
    entropy: Float32[Tensor, " S"], offsets: Int64[Tensor, " bounds"]
) -> Float32[Tensor, " bounds-1"]:
    """Minus the mean entropy of the model's distributions, in nats.

        reward[n] = -sum_s H(p_s) / length[n]

    Prefers long completions: late tokens are easier.

    Source:
        Agarwal et al. 2025, arXiv:2505.15134; a baseline in Kang et al. 2025, arXiv:2502.18581.

    Example:
        >>> neg_entropy(torch.tensor([0.5, 1.5]), torch.tensor([0, 2]))
        tensor([-1.])
    """
    return -_mean(entropy, offsets)


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
    if len(answers) != N:
        raise InputError(
            f"`answers` must hold one answer or None for each of N={N} completions, "
            f"got {len(answers)}; list the completions of all prompts end to end."
        )
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


REWARDS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "logprob": sequence_logprob,
        "mean_logprob": mean_logprob,
        "self_certainty": mean_self_certainty,
        "neg_entropy": neg_entropy,
        "majority": majority,
    }
)


def stats_needed(name: str) -> tuple[str, ...]:
    """The token statistics that a reward is made of: what to pass as `stats=`.

    Raises:
        InputError: If there is no such reward.
    """
    parameters = inspect.signature(_reward(name)).parameters.values()
    positional = (p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    return tuple(parameter for parameter in positional if parameter not in LAYOUT)


# an option is whatever its reward says it is
def compute(
    name: str, columns: Mapping[str, Tensor | None], options: Mapping[str, Any]
) -> Float32[Tensor, " N"]:
    """The reward `name` from the token statistics and layout in `columns`.

    Raises:
        InputError: If there is no such reward, a statistic it needs was not computed, or an option
            is missing or unknown.
    """
    function = _reward(name)
    missing = [stat for stat in stats_needed(name) if columns.get(stat) is None]
    if missing:
        raise InputError(
            f"reward {name!r} needs the token statistic {', '.join(missing)}, which was not "
            f"computed; score with stats={stats_needed(name)!r}."
        )
    parameters = inspect.signature(function).parameters.values()
    wanted = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    if wanted != options.keys():
        raise InputError(
            f"reward {name!r} must get the options {_listed(wanted)}, got {_listed(options)}."
        )
    given = {p.name: columns[p.name] for p in parameters if p.name not in wanted}
    return function(**given, **options)


def _reward(name: str) -> Callable[..., Tensor]:
    if name not in REWARDS:
        raise InputError(f"`reward` must be one of {', '.join(REWARDS)}, got {name!r}.")
    return REWARDS[name]


def _listed(names: Mapping[str, Any] | set[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names)) or "none"


def _sum(
    values: Float32[Tensor, " S"], offsets: Int64[Tensor, " bounds"]
) -> Float64[Tensor, " bounds-1"]:
    return torch.segment_reduce(values.double(), "sum", offsets=offsets)


def _mean(
    values: Float32[Tensor, " S"], offsets: Int64[Tensor, " bounds"]
) -> Float32[Tensor, " bounds-1"]:
    return (_sum(values, offsets) / offsets.diff().clamp(min=1)).float()
