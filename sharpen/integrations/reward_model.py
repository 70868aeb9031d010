"""Responses that have no reward: empty ones, those too long, those whose reward is no number.

A rating puts `Unscorable` in their place, so that the others of their batch keep their rewards.
The host is then given the number that the user named, or an error.

Concurrent calls of one completion each, rated together: grouped by prompt, in one thread.

Hosts that ask for one reward at a time ask for many at once. Calls that arrive within a short wait,
or while a batch is being rated, make the next batch; completions of one prompt stand together, so
that the prompt is read once. A call that cannot be rated fails alone: its batch is halved until it
is found.

Rewards kept in a folder: a run that is begun again does not rate the same completion twice.

How completions are rated inside another program: a frozen model here, or one that is served.
"""

import asyncio
import hashlib
import json
import logging
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

from sharpen.errors import InputError, ServiceError
from sharpen.evaluation.parity import server_logprobs
from sharpen.models import ModelLimits
from sharpen.runs import Journal
from sharpen.sampling.endpoint import EndpointClient
from sharpen.scoring import Scorer, Scores
from sharpen.scoring.rewards import REWARDS, options_needed, stats_needed

logger = logging.getLogger(__name__)

SETTING = "unscorable_reward"


@dataclass(frozen=True)
class Unscorable:
    """In place of a reward.

    Attributes:
        cause: Of which kind.
        why: In words, without a full stop.
    """

    cause: Literal["empty", "too_long", "not_finite"]
    why: str


Rated: TypeAlias = float | Unscorable

EMPTY = Unscorable("empty", "a completion must hold at least one token to be rated, got none")


def too_long(n_prompt: int, n_completion: int, max_length: int) -> Unscorable:
    """Of a completion that the model that rates cannot read to its end."""
    return Unscorable(
        "too_long",
        f"prompt and completion must fit the context of {max_length} tokens of the model that "
        f"rates, got {n_prompt} + {n_completion}",
    )


def not_finite(reward: str, value: float) -> Unscorable:
    """Of a completion whose reward is NaN or infinite."""
    why = "the model's logits are; look for NaN in its weights, or overflow in half precision"
    if not math.isnan(value):
        why = "the model calls one of its tokens impossible"
    return Unscorable("not_finite", f"`reward` {reward} is {value}: {why}".replace("nan", "NaN"))


# of a configuration
def checked(given: Any) -> float | None:
    """The setting `unscorable_reward`.

    Raises:
        InputError: If it is neither a finite number nor None.
    """
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not math.isfinite(given):
        raise InputError(f"`{SETTING}` must be a finite number, or left out, got {given!r}.")
    return float(given)


def settled(rated: Rated, otherwise: float | None) -> float:
    """The number that a host gets which takes numbers alone.

    Args:
        rated: A reward, or why there is none.
        otherwise: What the user wants in place of one; told once for each cause in the log.

    Raises:
        InputError: If there is no reward and nothing in its place.
    """
    if not isinstance(rated, Unscorable):
        return rated
    if otherwise is None:
        raise InputError(
            f"{rated.why}; set `{SETTING}` to what such a response shall get, a finite number, "
            "and training goes on."
        )
    tell(rated, f"`{SETTING}`, {otherwise:g}")
    return otherwise


# causes that the log has told
_TOLD: set[str] = set()


def tell(found: Unscorable, given: str) -> None:
    """Log that a response has no reward, once a process for each cause."""
    if found.cause in _TOLD:
        return
    _TOLD.add(found.cause)
    logger.warning(
        "a response has no reward (%s); it gets %s. Others of its kind will too, untold.",
        found.why,
        given,
    )


Ids = tuple[int, ...]
# prompts, completions of each -> rewards of each, or why there is none
Rate = Callable[[list[list[int]], list[list[list[int]]]], list[list[Rated]]]


@dataclass(frozen=True, eq=False)
class Call:
    """One completion that waits for its reward."""

    prompt: Ids
    completion: Ids
    future: "asyncio.Future[Rated]"


class MicroBatches:
    """Rates single completions in batches; for one event loop.

    Args:
        rate: Rates completions of several prompts; called from one thread of its own, never twice
            at a time.
        wait_s: How long the first call of a batch waits for others.
        max_calls: Most calls in a batch.
    """

    def __init__(self, rate: Rate, *, wait_s: float = 0.01, max_calls: int = 1024):
        self._rate = rate
        self._wait_s = wait_s
        self._max_calls = max_calls
        self._pending: list[Call] = []
        self._runner: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sharpen-rate")

    async def reward(self, prompt: Sequence[int], completion: Sequence[int]) -> Rated:
        """The reward of one completion, or why it has none.

        Raises:
            Exception: Whatever rating it alone raises.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Rated] = loop.create_future()
        self._pending.append(Call(tuple(prompt), tuple(completion), future))
        if self._runner is None or self._runner.done():
            self._runner = loop.create_task(self._run())
        return await future

    async def _run(self) -> None:
        while self._pending:
            await asyncio.sleep(self._wait_s)
            # a caller that was cancelled wants nothing any more
            waiting = [call for call in self._pending if not call.future.done()]
            batch, self._pending = waiting[: self._max_calls], waiting[self._max_calls :]
            if batch:
                await self._answer(batch)

    async def _answer(self, batch: list[Call]) -> None:
        groups: dict[Ids, list[Call]] = {}
        for call in batch:
            groups.setdefault(call.prompt, []).append(call)
        prompts = [list(prompt) for prompt in groups]
        completions = [[list(call.completion) for call in calls] for calls in groups.values()]
        loop = asyncio.get_running_loop()
        try:
            rewards = await loop.run_in_executor(self._thread, self._rate, prompts, completions)
        except Exception as error:
            # a server that is away is away for all of them
            if len(batch) == 1 or isinstance(error, ServiceError):
                for call in batch:
                    _fail(call, error)
                return
            half = len(batch) // 2
            await self._answer(batch[:half])
            await self._answer(batch[half:])
            return
        for calls, values in zip(groups.values(), rewards, strict=True):
            for call, value in zip(calls, values, strict=True):
                if not call.future.done():
                    call.future.set_result(value)


def _fail(call: Call, error: Exception) -> None:
    if not call.future.done():
        call.future.set_exception(error)


# settings, ready for JSON
def kept(depends: Mapping[str, Any], folder: Path, rate: Rate) -> Rate:
    """`rate`, with what it found kept as JSON lines, one file a process.

    What has no reward is not kept: it is asked for again.

    Args:
        depends: What a reward depends on beside prompt and completion.
        folder: Made if it is not there; several processes may share it.
        rate: Rates what is not known yet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base = json.dumps(dict(depends), sort_keys=True)
    known = dict(_read(folder))
    journal = Journal(folder / f"rewards-{uuid.uuid4().hex}.jsonl")

    def key(prompt: list[int], completion: list[int]) -> str:
        text = json.dumps([base, prompt, completion])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def rate_new(prompts: list[list[int]], completions: list[list[list[int]]]) -> list[list[Rated]]:
        keys = [[key(p, c) for c in group] for p, group in zip(prompts, completions, strict=True)]
        # the same completion twice is rated once
        todo = [
            {k: c for k, c in zip(ks, group, strict=True) if k not in known}
            for ks, group in zip(keys, completions, strict=True)
        ]
        asked = [i for i, new in enumerate(todo) if new]
        fresh: dict[str, Rated] = {}
        if asked:
            groups = [list(todo[i].values()) for i in asked]
            found = rate([prompts[i] for i in asked], groups)
            fresh = {
                k: x
                for i, values in zip(asked, found, strict=True)
                for k, x in zip(todo[i], values, strict=True)
            }
            numbers = {k: x for k, x in fresh.items() if not isinstance(x, Unscorable)}
            journal.append({"key": k, "reward": x} for k, x in numbers.items())
            known.update(numbers)
        return [[known[k] if k in known else fresh[k] for k in ks] for ks in keys]

    return rate_new


def _read(folder: Path) -> list[tuple[str, float]]:
    found = []
    for path in sorted(folder.glob("rewards-*.jsonl")):
        for line in path.read_bytes().splitlines(keepends=True):
            # without its newline it is one that another process is writing, or that a crash tore
            if line.endswith(b"\n"):
                row = json.loads(line)
                found.append((row["key"], row["reward"]))
    return found


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
