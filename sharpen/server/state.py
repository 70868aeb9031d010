"""What the routes know of the server, and what each makes of a body: jobs, and then an answer.

    ServerLimits   how much one request may ask for
    ServerState    what a route needs to know: the model, the limits, the tokenizer
    ParsedRequest  jobs, and the way from their statistics to an answer
    TextRewards    one reward per text, as trainers ask for them

A text that has no reward is rejected, or gets the number of `ServerState.unscorable`; a prompt of
nothing, or ids of another model, are no fault of one text and are rejected always.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch

from sharpen.errors import SharpenError, check_value
from sharpen.models import ModelLimits
from sharpen.scoring.rewards import stats_needed
from sharpen.scoring.scores import Scores
from sharpen_kernels import TokenStats

from .batcher import Job
from .errors import HTTPError, bad_field, check_unicode
from .text import TOO_LONG, Texts
from .unscorable import Cause, Unscorable, UnscorableReward, why_not_finite

# requests of the largest size that may be in flight together; chosen
N_INSIDE = 32
# far more than tokens of text have; chosen, so that no text that fits the context is rejected
CHARS_PER_TOKEN = 256
# of every text, beside its reward
LOGS = ("logprob", "mean_logprob")

# a text to the ids of its prompt and of its completion; called with the text's name in errors
Split = Callable[[str], tuple[list[int], list[int]]]

Answer = Mapping[str, Any]


@dataclass(frozen=True)
class ServerLimits:
    """Bounds of a request and of the queue; the defaults were chosen, not measured.

    Attributes:
        max_request_bytes: Body of a request.
        max_request_tokens: Tokens of all prompts and completions of a request.
        max_n: Completions, or prompts, of a request.
        max_queue: Prompts with their completions that may wait. A request that has more is accepted
            only while the queue is empty.
    """

    max_request_bytes: int = 8 * 2**20
    max_request_tokens: int = 262_144
    max_n: int = 512
    max_queue: int = 1024

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check_value(name, value, value >= 1, "at least 1")

    def max_chars(self, context: int | None) -> int:
        """Characters of a text that is tokenised at all.

        Args:
            context: Tokens that the model can read; None if it has no limit.
        """
        n_tokens = self.max_request_tokens if context is None else context
        return CHARS_PER_TOKEN * min(n_tokens, self.max_request_tokens)

    def check_bytes(self, n_bytes: int) -> None:
        """Reject a body with 413; `n_bytes` may be what has arrived of it so far."""
        if n_bytes > self.max_request_bytes:
            raise HTTPError(
                413,
                f"a request must be at most {self.max_request_bytes} bytes, got {n_bytes} or more; "
                "send several, or start the server with a larger `--max-request-bytes`.",
                code="request_too_large",
            )

    def check_bytes_in_flight(self, n_bytes: int) -> None:
        """Reject a body with 429 that would make the bytes in flight too many."""
        most = N_INSIDE * self.max_request_bytes
        if n_bytes > most:
            raise HTTPError(
                429,
                f"requests in flight hold more than {most} bytes already, {N_INSIDE} times "
                "`--max-request-bytes`; send it again later.",
                code="too_many_bytes",
                retry_after=1,
            )

    def check_n(self, field: str, n: int) -> None:
        """Reject too many completions or prompts, with 422."""
        if n > self.max_n:
            raise HTTPError(
                422,
                f"`{field}` must hold at most {self.max_n}, got {n}; send several requests, or "
                "start the server with a larger `--max-n`.",
                param=field,
                code="too_many",
            )

    def check_tokens(self, n_tokens: int) -> None:
        """Reject too many tokens, with 413."""
        if n_tokens > self.max_request_tokens:
            raise HTTPError(
                413,
                f"a request must have at most {self.max_request_tokens} tokens, prompts and "
                f"completions together, got {n_tokens}; send several, or start the server with a "
                "larger `--max-request-tokens`.",
                code="too_many_tokens",
            )


@dataclass(frozen=True)
class ParsedRequest:
    """A request that has been read and checked.

    Attributes:
        jobs: What to score, checked against the model.
        answer: From the statistics of each job, in order, to the body of the answer.
    """

    jobs: list[Job]
    answer: Callable[[Sequence[TokenStats]], Answer]


@dataclass(frozen=True)
class ServerState:
    """What a route needs to know of the server.

    Attributes:
        name: What the model is called.
        model: What ids the model accepts.
        limits: Of a request.
        texts: Reads text.
        reward: The reward of routes that answer one number per sample.
        unscorable: What they answer for a sample that has none.
    """

    name: str
    model: ModelLimits
    limits: ServerLimits
    texts: Texts
    reward: str = "logprob"
    unscorable: UnscorableReward = field(default_factory=UnscorableReward)

    def parsed(
        self, jobs: list[Job], answer: Callable[[Sequence[TokenStats]], Answer]
    ) -> ParsedRequest:
        """The request, unless it has too many tokens (413)."""
        self.limits.check_tokens(sum(job.n_tokens for job in jobs))
        return ParsedRequest(jobs, answer)

    def unscored(self, cause: Cause, error: SharpenError) -> float:
        """The reward of a sample for which a check raised `error`, or that error."""
        return self.unscorable.resolve(Unscorable(cause, str(error).rstrip("."), error))


def stats_of(rewards: Sequence[str], more: Sequence[str] = ()) -> tuple[str, ...]:
    """The token statistics behind some rewards, and others; the log-prob first."""
    needs = [stat for reward in rewards for stat in stats_needed(reward)]
    return tuple(dict.fromkeys(["logprob", *needs, *more]))


def scores_of(job: Job, tokens: TokenStats, valid: Sequence[bool] | None = None) -> Scores:
    """The scores of one job."""
    lengths = [[len(completion) for completion in job.completions]]
    return Scores.of(tokens, lengths, None if valid is None else [valid])


def not_finite(logprob: torch.Tensor) -> str | None:
    """Why the log-probs of a completion are not all finite, or None if they are."""
    bad = (~logprob.isfinite()).nonzero().flatten().tolist()
    if not bad:
        return None
    value = logprob[bad[0]].item()
    return f"the log-prob of token {bad[0]} is {value}: {why_not_finite(value)}"


def reject_not_finite(name: str, logprob: torch.Tensor) -> None:
    """Reject an answer with 422 that would hold log-probs which are not finite."""
    why = not_finite(logprob)
    if why is not None:
        raise HTTPError(422, f"`{name}`: {why}.", param=name, code="not_finite")


@dataclass(frozen=True)
class TextRewards:
    """The texts of one request.

    Attributes:
        field: Of the request, that holds them.
        samples: Of each text what to score, or the reward that it gets unscored.
        state: Of the server.
    """

    field: str
    samples: list[Job | float]
    state: ServerState

    @classmethod
    def of(cls, field: str, splits: Sequence[Split], state: ServerState) -> "TextRewards":
        """The texts, each checked; one that has no reward may be an error."""
        state.limits.check_n(field, len(splits))
        samples = [_sample(split, f"{field}[{i}]", state) for i, split in enumerate(splits)]
        return cls(field, samples, state)

    @property
    def jobs(self) -> list[Job]:
        """What to score."""
        return [sample for sample in self.samples if isinstance(sample, Job)]

    def rewards(self, results: Sequence[TokenStats]) -> tuple[list[float], dict[str, list[float]]]:
        """Reward of each text, and columns to log; those of a text that has no reward are 0."""
        rewards: list[float] = []
        rows: list[dict[str, float]] = []
        left = iter(results)
        for i, sample in enumerate(self.samples):
            row = None
            if isinstance(sample, Job):
                try:
                    reward, row = _rated(sample, next(left), f"{self.field}[{i}]", self.state)
                except HTTPError as error:
                    reward = self.state.unscored("not_finite", error)
            else:
                reward = sample
            rewards.append(reward)
            rows.append(row or dict.fromkeys((*LOGS, "n_tokens"), 0.0))
            if not self.state.unscorable.is_error:
                rows[-1]["unscorable"] = float(row is None)
        names = rows[0] if rows else (*LOGS, "n_tokens")
        return rewards, {name: [row[name] for row in rows] for name in names}


# a trainer that calls this in its process may hand over anything
def query_rewards(
    queries: Sequence[object], prompts: Sequence[object], state: ServerState
) -> TextRewards:
    """Texts as OpenRLHF has them: each begins with its prompt, or with an end of it."""
    query_texts = [_text(value, f"query[{i}]") for i, value in enumerate(queries)]
    prompt_texts = [_text(value, f"prompts[{i}]") for i, value in enumerate(prompts)]
    if len(prompts) != len(queries):
        wanted = f"a list of {len(queries)}, one a query"
        raise bad_field("prompts", wanted, f"{len(prompts)} of them")
    pairs = zip(query_texts, prompt_texts, strict=True)
    splits = [partial(state.texts.split, query, prompt) for query, prompt in pairs]
    return TextRewards.of("query", splits, state)


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise bad_field(name, "text", value)
    check_unicode(value, name)
    return value


def _sample(split: Split, name: str, state: ServerState) -> Job | float:
    try:
        prompt, completion = split(name)
    except HTTPError as error:
        if error.code != TOO_LONG:
            raise
        return state.unscored("too_long", error)
    replace(state.model, max_length=None).check(name, prompt, completion)
    try:
        # as in the scorer: the last token is predicted, and never read
        state.model.check(name, prompt, completion, unread=min(1, len(completion)))
    except SharpenError as error:
        return state.unscored("too_long", error)
    if not completion:
        error = HTTPError(
            422,
            f"`{name}` must hold at least one token after its prompt, got none, which would get 0 "
            "nats and so the best reward; leave it out, or set `unscorable_reward`.",
            param=name,
            code="empty_completion",
        )
        return state.unscored("empty", error)
    return Job(prompt, [completion], stats_of([state.reward, *LOGS]))


def _rated(
    job: Job, tokens: TokenStats, name: str, state: ServerState
) -> tuple[float, dict[str, float]]:
    """Reward of a job, which has one completion, and what to log; 422 if it is not finite."""
    assert tokens.logprob is not None
    reject_not_finite(name, tokens.logprob)
    scores = scores_of(job, tokens)
    reward = scores.reward(state.reward).item()
    if not math.isfinite(reward):
        raise HTTPError(422, f"`{name}`: {state.reward} is {reward}.", code="not_finite")
    row = {log: scores.reward(log).item() for log in LOGS}
    return reward, row | {"n_tokens": float(len(tokens.logprob))}
