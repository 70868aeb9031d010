"""How completions are rated inside another program: a frozen model here, or one that is served."""

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sharpen.errors import InputError
from sharpen.evaluation.parity_engines import server_logprobs
from sharpen.runs import Journal
from sharpen.sampling.endpoint_client import EndpointClient
from sharpen.scoring import Scorer, Scores
from sharpen.scoring.rewards import REWARDS, options_needed, stats_needed

from .micro_batches import Rate


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

    def __post_init__(self) -> None:
        """Refuse what cannot rate.

        Raises:
            InputError: If so.
        """
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
        return cls(**given)


def rate_by(rating: Rating, scorer: Scorer | None = None) -> Rate:
    """The function that rates by these settings.

    Args:
        rating: See there.
        scorer: Of `rating.model`, if it is loaded already.

    Raises:
        InputError: If the model cannot be loaded, or a key is not there.
    """
    rate = _by_endpoint(rating) if rating.endpoint is not None else _by_model(rating, scorer)
    return rate if rating.keep is None else _kept(rating, Path(rating.keep), rate)


def rate_each(
    rate: Rate, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> list[float]:
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

    def rate(prompts: list[list[int]], completions: list[list[list[int]]]) -> list[list[float]]:
        _check(completions)
        return _rewards(scorer.score(prompts, completions, stats=stats), rating.reward)

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

    def rate(prompts: list[list[int]], completions: list[list[list[int]]]) -> list[list[float]]:
        _check(completions)
        kept = server_logprobs(client, rating.endpoint_model, prompts, completions)
        return _rewards(Scores.from_logprobs(kept), rating.reward)

    return rate


def _check(completions: list[list[list[int]]]) -> None:
    if any(not ids for group in completions for ids in group):
        raise InputError("a completion must hold at least one token to be rated, got none.")


def _rewards(scores: Scores, reward: str) -> list[list[float]]:
    found = [group.tolist() for group in scores.by_prompt(reward)]
    if any(value != value for group in found for value in group):
        raise InputError(
            f"`reward` {reward} is NaN: the model's logits are; look for NaN in its weights, or "
            "overflow in half precision."
        )
    return found


def _kept(rating: Rating, folder: Path, rate: Rate) -> Rate:
    """`rate`, with what it found kept in a folder of JSON lines, one file a process."""
    folder.mkdir(parents=True, exist_ok=True)
    # what a reward depends on
    names = ("model", "reward", "endpoint", "endpoint_model", "dtype")
    base = json.dumps({name: asdict(rating)[name] for name in names}, sort_keys=True)
    known = dict(_read_kept(folder))
    journal = Journal(folder / f"rewards-{uuid.uuid4().hex}.jsonl")

    def key(prompt: list[int], completion: list[int]) -> str:
        text = json.dumps([base, prompt, completion])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def rate_new(prompts: list[list[int]], completions: list[list[list[int]]]) -> list[list[float]]:
        keys = [[key(p, c) for c in group] for p, group in zip(prompts, completions, strict=True)]
        # the same completion twice is rated once
        todo = [
            {k: c for k, c in zip(ks, group, strict=True) if k not in known}
            for ks, group in zip(keys, completions, strict=True)
        ]
        asked = [i for i, new in enumerate(todo) if new]
        if asked:
            groups = [list(todo[i].values()) for i in asked]
            found = rate([prompts[i] for i in asked], groups)
            fresh = {
                k: x
                for i, values in zip(asked, found, strict=True)
                for k, x in zip(todo[i], values, strict=True)
            }
            journal.append({"key": k, "reward": x} for k, x in fresh.items())
            known.update(fresh)
        return [[known[k] for k in ks] for ks in keys]

    return rate_new


def _read_kept(folder: Path) -> list[tuple[str, float]]:
    found = []
    for path in sorted(folder.glob("rewards-*.jsonl")):
        for line in path.read_bytes().splitlines(keepends=True):
            # without its newline it is one that another process is writing, or that a crash tore
            if line.endswith(b"\n"):
                row = json.loads(line)
                found.append((row["key"], row["reward"]))
    return found


# one a process: a host makes many reward functions of one model
_SHARED: dict[Rating, Any] = {}


def shared(rating: Rating, make: Callable[[], Any]) -> Any:
    """What `make` makes, made once a process for equal settings."""
    if rating not in _SHARED:
        _SHARED[rating] = make()
    return _SHARED[rating]
