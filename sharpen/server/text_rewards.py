"""One reward per text, for trainers: where each text is split, what is scored, what is answered.

A text that has no reward is rejected, or gets the number of `ServerState.unscorable`; a prompt of
nothing, or ids of another model, are no fault of one text and are rejected always.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from sharpen.errors import SharpenError
from sharpen_kernels import TokenStats

from .batcher import Job
from .errors import HTTPError, bad_field, check_unicode
from .state import ServerState, reject_not_finite, scores_of, stats_of
from .text import TOO_LONG
from .unscorable import Unscorable

# of every text, beside its reward
LOGS = ("logprob", "mean_logprob")

# a text to the ids of its prompt and of its completion; called with the text's name in errors
Split = Callable[[str], tuple[list[int], list[int]]]


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
                    unscorable = Unscorable.from_error("not_finite", error)
                    reward = self.state.unscorable.resolve(unscorable)
            else:
                reward = sample
            rewards.append(reward)
            rows.append(row or dict.fromkeys((*LOGS, "n_tokens"), 0.0))
            if not self.state.unscorable.is_error:
                rows[-1]["unscorable"] = float(row is None)
        names = rows[0] if rows else (*LOGS, "n_tokens")
        return rewards, {name: [row[name] for row in rows] for name in names}


def query_rewards(
    queries: Sequence[str], prompts: Sequence[str], state: ServerState
) -> TextRewards:
    """Texts as OpenRLHF has them: each begins with its prompt, or with an end of it."""
    for field, texts in (("query", queries), ("prompts", prompts)):
        for i, text in enumerate(texts):
            check_unicode(text, f"{field}[{i}]")
    if len(prompts) != len(queries):
        wanted = f"a list of {len(queries)}, one a query"
        raise bad_field("prompts", wanted, f"{len(prompts)} of them")
    pairs = zip(queries, prompts, strict=True)
    splits = [partial(state.texts.split, query, prompt) for query, prompt in pairs]
    return TextRewards.of("query", splits, state)


def _sample(split: Split, name: str, state: ServerState) -> Job | float:
    try:
        prompt, completion = split(name)
    except HTTPError as error:
        if error.code != TOO_LONG:
            raise
        return state.unscorable.resolve(Unscorable.from_error("too_long", error))
    replace(state.model, max_length=None).check(name, prompt, completion)
    try:
        # as in the scorer: the last token is predicted, and never read
        state.model.check(name, prompt, completion, unread=min(1, len(completion)))
    except SharpenError as error:
        return state.unscorable.resolve(Unscorable.from_error("too_long", error))
    if not completion:
        error = HTTPError(
            422,
            f"`{name}` must hold at least one token after its prompt, got none, which would get 0 "
            "nats and so the best reward; leave it out, or set `unscorable_reward`.",
            param=name,
            code="empty_completion",
        )
        return state.unscorable.resolve(Unscorable.from_error("empty", error))
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
