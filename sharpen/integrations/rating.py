"""How completions are rated inside another program: a frozen model here, or one that is served."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sharpen.errors import InputError
from sharpen.evaluation.parity_engines import server_logprobs
from sharpen.limits import ModelLimits
from sharpen.sampling.endpoint_client import EndpointClient
from sharpen.scoring import Scorer, Scores
from sharpen.scoring.rewards import REWARDS, options_needed, stats_needed

from .kept_rewards import kept
from .micro_batches import Rate
from .unscorable import EMPTY, Rated, Unscorable, checked, not_finite, too_long

# what a reward depends on
NUMBERS_OF = ("model", "reward", "endpoint", "endpoint_model", "dtype")


@dataclass(frozen=True)
class Rating:
    """What rates, and by which reward.

    Attributes:
        model: Folder, hub id or "game24"; frozen.
        reward: A name of `sharpen.scoring.rewards.REWARDS` that needs nothing but token statistics.
        endpoint: Instead of loading weights: a completions endpoint that echoes log-probs of token
            ids (vLLM, `sharpen serve`). Then `reward` needs nothing but log-probs.
        endpoint_model: The model's name there.
        endpoint_key_env: Environment variable that holds its key.
        device: Where the model runs; default: a GPU that this process sees, or the CPU.
        dtype: "float32", "bfloat16", "float16"; default: as `Scorer`.
        max_tokens: Tokens of one forward.
        keep: Folder to keep rewards in: a run that is begun again does not rate the same
            completion twice. Several processes may share it.
        wait_ms: How long a call waits for others of its batch.
        unscorable_reward: What a response gets that has no reward, because it is empty, too long
            for the model, or of no finite log-prob; default: None where the host takes it, else
            an error.
    """

    model: str = ""
    reward: str = "logprob"
    endpoint: str | None = None
    endpoint_model: str = ""
    endpoint_key_env: str | None = None
    device: str | None = None
    dtype: str | None = None
    max_tokens: int = 16384
    keep: str | None = None
    wait_ms: float = 10.0
    unscorable_reward: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot rate.

        Raises:
            InputError: If so.
        """
        checked(self.unscorable_reward)
        if self.reward not in REWARDS:
            raise InputError(f"`reward` must be one of {', '.join(REWARDS)}, got {self.reward!r}.")
        if options_needed(self.reward):
            needs = ", ".join(options_needed(self.reward))
            raise InputError(f"`reward` {self.reward} needs {needs}, which no host hands over.")
        if self.endpoint is None and not self.model:
            raise InputError("`model` must be given, or `endpoint`, got neither.")
        if self.endpoint is not None:
            if not self.endpoint_model:
                raise InputError("`endpoint_model` must be given with `endpoint`: its name there.")
            if not set(stats_needed(self.reward)) <= {"logprob"}:
                raise InputError(
                    f"`reward` {self.reward} needs {', '.join(stats_needed(self.reward))}, which "
                    "an endpoint does not give; give `model` alone."
                )

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Rating":
        """From a host's configuration.

        Raises:
            InputError: If a name is unknown or a value is bad.
        """
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise InputError(f"unknown option {name!r} of sharpen; known: {', '.join(known)}.")
        # YAML says -3 where a float is meant
        otherwise = checked(given.get("unscorable_reward"))
        return cls(**{**given, "unscorable_reward": otherwise})


def rate_by(rating: Rating, scorer: Scorer | None = None) -> Rate:
    """The function that rates by these settings.

    Args:
        rating: See there.
        scorer: Of `rating.model`, if it is loaded already.

    Raises:
        InputError: If the model cannot be loaded, or a key is not there.
    """
    rate = _by_endpoint(rating) if rating.endpoint is not None else _by_model(rating, scorer)
    if rating.keep is None:
        return rate
    depends = {name: asdict(rating)[name] for name in NUMBERS_OF}
    return kept(depends, Path(rating.keep), rate)


def rate_each(
    rate: Rate, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> list[Rated]:
    """The reward of each row, a prompt and one completion; equal prompts are read once.

    Example:
        >>> def rate(prompts, groups):
        ...     return [[float(len(completion)) for completion in group] for group in groups]
        >>> rate_each(rate, [[1], [2], [1]], [[5], [6, 6], [7, 7, 7]])
        [1.0, 2.0, 3.0]
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt), []).append(row)
    asked = [[list(completions[row]) for row in rows] for rows in groups.values()]
    rated = rate([list(prompt) for prompt in groups], asked)
    order = [row for rows in groups.values() for row in rows]
    found = dict(zip(order, [x for values in rated for x in values], strict=True))
    return [found[row] for row in range(len(prompts))]


def scorer_of(rating: Rating) -> Scorer:
    """The model, loaded.

    Raises:
        InputError: If it cannot be.
    """
    return Scorer(
        rating.model, device=rating.device, dtype=rating.dtype, max_tokens=rating.max_tokens
    )


def _by_model(rating: Rating, scorer: Scorer | None) -> Rate:
    scorer = scorer or scorer_of(rating)
    stats = tuple(dict.fromkeys(["logprob", *stats_needed(rating.reward)]))
    max_length = ModelLimits.of(scorer.model).max_length

    def rate(prompts: list[list[int]], completions: list[list[list[int]]]) -> list[list[Rated]]:
        return _rated(
            prompts,
            completions,
            lambda some, groups: scorer.score(some, groups, stats=stats),
            rating.reward,
            max_length,
        )

    return rate


def _by_endpoint(rating: Rating) -> Rate:
    assert rating.endpoint is not None
    key = None
    if rating.endpoint_key_env is not None:
        key = os.environ.get(rating.endpoint_key_env)
        if not key:
            raise InputError(
                f"the environment variable {rating.endpoint_key_env} must hold the key of "
                "`endpoint`; it is not set."
            )
    client = EndpointClient(rating.endpoint, key=key)

    def score(prompts: list[list[int]], completions: list[list[list[int]]]) -> Scores:
        return Scores.from_logprobs(
            server_logprobs(client, rating.endpoint_model, prompts, completions)
        )

    def rate(prompts: list[list[int]], completions: list[list[list[int]]]) -> list[list[Rated]]:
        return _rated(prompts, completions, score, rating.reward, None)

    return rate


def _rated(
    prompts: list[list[int]],
    completions: list[list[list[int]]],
    score: Callable[[list[list[int]], list[list[list[int]]]], Scores],
    reward: str,
    max_length: int | None,
) -> list[list[Rated]]:
    """The reward of each completion that can be read, and why the others have none."""
    found = [
        [_unreadable(len(prompt), len(ids), max_length) for ids in group]
        for prompt, group in zip(prompts, completions, strict=True)
    ]
    readable = [
        [ids for ids, why in zip(group, whys, strict=True) if why is None]
        for group, whys in zip(completions, found, strict=True)
    ]
    asked = [p for p, group in enumerate(readable) if group]
    rewards: Iterator[float] = iter(())
    if asked:
        scores = score([prompts[p] for p in asked], [readable[p] for p in asked])
        rewards = iter(scores.reward(reward).tolist())
    return [
        [_finite(reward, next(rewards)) if why is None else why for why in whys] for whys in found
    ]


def _unreadable(n_prompt: int, n_completion: int, max_length: int | None) -> Unscorable | None:
    if n_completion == 0:
        return EMPTY
    # the last token is predicted, and never read
    if max_length is not None and n_prompt + n_completion - 1 > max_length:
        return too_long(n_prompt, n_completion, max_length)
    return None


def _finite(reward: str, value: float) -> Rated:
    return value if math.isfinite(value) else not_finite(reward, value)


# one a process: a host makes many reward functions of one model
_SHARED: dict[Rating, Any] = {}


def shared(rating: Rating, make: Callable[[], Any]) -> Any:
    """What `make` makes, made once a process for equal settings."""
    if rating not in _SHARED:
        _SHARED[rating] = make()
    return _SHARED[rating]
