"""Completions rated inside another program, by a frozen model here or one that is served.

A completion that has no reward is an `Unscorable` in its place, so that the others of its batch
keep theirs; the host then gets the number that the user named, or an error.
"""

import asyncio
import functools
import hashlib
import json
import math
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from sharpen.errors import InputError
from sharpen.evaluation.parity import server_logprobs
from sharpen.models import ModelLimits
from sharpen.records import PromptRecord, check_prompt
from sharpen.runs import Journal
from sharpen.sampling.base import render
from sharpen.sampling.endpoint import EndpointClient
from sharpen.scoring import Scorer, Scores
from sharpen.scoring.rewards import check_reward, stats_needed
from sharpen.server.batcher import Job, MicroBatcher
from sharpen.server.unscorable import (
    Unscorable,
    UnscorableReward,
    finite_or_none,
    why_not_finite,
)
from sharpen.text import TextCodec

if TYPE_CHECKING:
    import transformers

Rated: TypeAlias = float | Unscorable
# prompts, completions of each -> rewards of each, or why there is none
Rate = Callable[[list[list[int]], list[list[list[int]]]], list[list[Rated]]]

# fields of `Rating` that a reward depends on
NUMBERS_OF = ("model", "reward", "endpoint", "endpoint_model", "dtype")
EMPTY = Unscorable("empty", "a completion must hold at least one token to be rated, got none")


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
        finite_or_none(self.unscorable_reward)
        check_reward(self.reward, "which no host hands over")
        if self.endpoint is None and not self.model:
            raise InputError("`model` must be given, or `endpoint`, got neither.")
        if self.endpoint is not None:
            if not self.endpoint_model:
                raise InputError("`endpoint_model` must be given with `endpoint`: its name there.")
            why = "which an endpoint does not give; give `model` alone"
            check_reward(self.reward, why, stats=("logprob",))

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
        otherwise = finite_or_none(given.get("unscorable_reward"))
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


class RewardModel:
    """What a `Rating` names, opened at first use: text to ids, concurrent calls to batches.

    Args:
        rating: See there.

    Attributes:
        unscorable: What a response gets that has no reward.
    """

    def __init__(self, rating: Rating):
        self.rating = rating
        self.unscorable = UnscorableReward(rating.unscorable_reward)

    @functools.cached_property
    def scorer(self) -> Scorer:
        """The model, loaded.

        Raises:
            InputError: If `rating` names an endpoint alone, or the model cannot be loaded.
        """
        if not self.rating.model:
            raise InputError("`model` must be given for text: its tokenizer makes the ids.")
        return scorer_of(self.rating)

    @property
    def tokenizer(self) -> "transformers.PreTrainedTokenizerBase":
        """Of the model that rates."""
        return self.scorer.tokenizer

    @functools.cached_property
    def codec(self) -> TextCodec:
        """Text to ids and back, for the model that rates."""
        return TextCodec(self.tokenizer, self.scorer.model.generation_config)

    @functools.cached_property
    def rate(self) -> Rate:
        """See `rate_by`."""
        return rate_by(self.rating, None if self.rating.endpoint is not None else self.scorer)

    @functools.cached_property
    def _batcher(self) -> MicroBatcher[Rated]:
        return reward_batcher(self.rate, wait_seconds=self.rating.wait_ms / 1000)

    def load(self) -> "RewardModel":
        """Load what rates now, and not at first use."""
        _ = self.rate
        return self

    async def reward(self, prompt: Sequence[int], completion: Sequence[int]) -> float:
        """The reward of one completion, rated together with others that are asked for now.

        Raises:
            InputError: If it has none and `unscorable_reward` is not given, or it cannot be rated.
        """
        return self.unscorable.resolve(await reward_of(self._batcher, prompt, completion))

    def rewards(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[float]:
        """The reward of each row, a prompt and one completion.

        Raises:
            InputError: As `reward`.
        """
        return rate_rows(self.rate, prompts, completions, self.unscorable)


# one a process for equal settings: a host makes many reward functions of one model
shared_reward_model = functools.cache(RewardModel)


def rate_rows(
    rate: Rate,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    unscorable: UnscorableReward,
) -> list[float]:
    """The reward of each row, a prompt and one completion; the scorer reads equal prompts once."""
    rated = rate([list(prompt) for prompt in prompts], [[list(ids)] for ids in completions])
    return [unscorable.resolve(one) for (one,) in rated]


def reward_batcher(rate: Rate, *, wait_seconds: float) -> MicroBatcher[Rated]:
    """A batcher of single completions; its batches are all that wait, the scorer cuts them."""

    def score(
        prompts: list[list[int]], completions: list[list[list[int]]], *, stats: Sequence[str]
    ) -> list[list[Rated]]:
        return rate(prompts, completions)

    batcher: MicroBatcher[Rated] = MicroBatcher(
        score,
        lambda rated, _: [one for (one,) in rated],
        max_tokens=sys.maxsize,
        max_queue=sys.maxsize,
        wait_seconds=wait_seconds,
    )
    batcher.start()
    return batcher


async def reward_of(
    batcher: MicroBatcher[Rated], prompt: Sequence[int], completion: Sequence[int]
) -> Rated:
    """The reward of one completion, or why it has none; whatever rating it alone raises."""
    pending = batcher.submit([Job(list(prompt), [list(completion)])])
    try:
        (rated,) = await asyncio.wrap_future(pending.future)
    except asyncio.CancelledError:
        batcher.abandon(pending)
        raise
    return rated


# messages may be an array, as parquet has them
def conversation_ids(
    tokenizer: "transformers.PreTrainedTokenizerBase", place: str, prompt: Any
) -> list[int]:
    """Token ids of a host's prompt: text, or messages under the tokenizer's chat template.

    Raises:
        InputError: If it is neither, or there is no template.
    """
    plain = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    record = PromptRecord(place, place, check_prompt(place, {"prompt": plain}))
    return list(render(record, tokenizer).ids)


def scorer_of(rating: Rating) -> Scorer:
    """The model of `rating`, loaded."""
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
        return Unscorable(
            "too_long",
            f"prompt and completion must fit the context of {max_length} tokens of the model that "
            f"rates, got {n_prompt} + {n_completion}",
        )
    return None


def _finite(reward: str, value: float) -> Rated:
    return value if math.isfinite(value) else not_finite(reward, value)


def not_finite(reward: str, value: float) -> Unscorable:
    """Of a completion whose reward is NaN or infinite."""
    shown = "NaN" if math.isnan(value) else value
    return Unscorable("not_finite", f"`reward` {reward} is {shown}: {why_not_finite(value)}")


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
        new = {
            k: (prompt, completion)
            for ks, prompt, group in zip(keys, prompts, completions, strict=True)
            for k, completion in zip(ks, group, strict=True)
            if k not in known
        }
        fresh: dict[str, Rated] = {}
        if new:
            rated = rate([prompt for prompt, _ in new.values()], [[c] for _, c in new.values()])
            fresh = {k: one for k, (one,) in zip(new, rated, strict=True)}
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
