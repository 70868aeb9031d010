"""Statistics of tokens to one reward per completion; higher is better.

S scored tokens, N completions of all prompts together, P prompts.

Completion n owns the scored tokens offsets[n] ... offsets[n + 1] - 1, prompt p the completions
groups[p] ... groups[p + 1] - 1. A reward is a pure function, and its parameters say what it needs:
a token statistic by its name, `offsets`, `groups` or `valid`, or else an option that the caller
gives. Sums run over fp64 in token order, so a reward has the same bits in any batch. An empty
completion gets 0 from every reward of tokens and is never chosen; NaN stays in its completion.
"""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from jaxtyping import Float32
from torch import Tensor

from sharpen.errors import InputError

from .certainty import mean_self_certainty, neg_entropy
from .confidence import confidence, confidence_bottom, confidence_lowest, confidence_tail
from .likelihood import mean_logprob, min_token_logprob, neg_perplexity, sequence_logprob
from .votes import majority as majority
from .votes import perplexity_consistency

LAYOUT = ("offsets", "groups", "valid")

REWARDS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "logprob": sequence_logprob,
        "mean_logprob": mean_logprob,
        "neg_perplexity": neg_perplexity,
        "min_token": min_token_logprob,
        "self_certainty": mean_self_certainty,
        "neg_entropy": neg_entropy,
        "confidence": confidence,
        "confidence_lowest": confidence_lowest,
        "confidence_bottom": confidence_bottom,
        "confidence_tail": confidence_tail,
        "majority": majority,
        "rpc": perplexity_consistency,
    }
)


def stats_needed(name: str) -> tuple[str, ...]:
    """The token statistics that a reward is made of: what to pass as `stats=`.

    Raises:
        InputError: If there is no such reward.
    """
    positional = (p.name for p in _parameters(name) if p.kind is p.POSITIONAL_OR_KEYWORD)
    return tuple(parameter for parameter in positional if parameter not in LAYOUT)


def options_needed(name: str) -> tuple[str, ...]:
    """The options that a reward cannot do without, such as `answers`.

    Raises:
        InputError: If there is no such reward.
    """
    return tuple(option for option, is_needed in _options(name).items() if is_needed)


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
    required, allowed = set(options_needed(name)), set(_options(name))
    if not required <= options.keys() <= allowed:
        optional = f" and may get {_listed(allowed - required)}" if allowed > required else ""
        raise InputError(
            f"reward {name!r} must get the options {_listed(required)}{optional}, "
            f"got {_listed(options)}."
        )
    given = {p.name: columns[p.name] for p in _parameters(name) if p.name not in allowed}
    return function(**given, **options)


def _reward(name: str) -> Callable[..., Tensor]:
    if name not in REWARDS:
        raise InputError(f"`reward` must be one of {', '.join(REWARDS)}, got {name!r}.")
    return REWARDS[name]


def _parameters(name: str) -> list[inspect.Parameter]:
    return list(inspect.signature(_reward(name)).parameters.values())


def _options(name: str) -> dict[str, bool]:
    """Whether each option of the reward must be given."""
    options = (p for p in _parameters(name) if p.kind is p.KEYWORD_ONLY)
    return {p.name: p.default is p.empty for p in options}


def _listed(names: Mapping[str, Any] | set[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names)) or "none"
