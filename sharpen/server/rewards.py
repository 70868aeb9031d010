"""`/score`: one prompt, N completions, to rewards and the statistics of their tokens.

    {"prompt": text | ids | messages, "completions": [text | ids, ...],
     "rewards": ["logprob"], "token_stats": [], "add_special_tokens": true, "add_eos": false,
     "answers": null, "valid": null}

    {"model": ..., "rewards": {name: [N]}, "n_tokens": [N], "offsets": [N + 1],
     "token_stats": {name: [S]}, "errors": [N]}

Completion n owns the tokens offsets[n] ... offsets[n + 1] - 1 of each statistic, as in `Scores`.
An error is null, or says why the log-prob of its completion is not finite.

Routes of trainers that ask a server for one number a text.

OpenRLHF, `/get_reward`: {"query": [text], "prompts": [text], "labels": [...]} to {"rewards": [x],
"scores": [x], "extra_logs": {name: [x]}}; it sends one query a request.
LLaMA-Factory, `/v1/score/evaluation`: {"model": ..., "messages": [text]} to {"scores": [x]}; a text
is a whole conversation as the chat template wrote it.

Both send what they decoded from ids with its special tokens, so none are added here. What cannot be
rated (an empty completion, whose 0 nats would be more than any other's; a text that is longer than
the context; a log-prob that is no number) is refused, or gets the reward of `Desk.unscorable`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

from sharpen.errors import SharpenError
from sharpen.scoring.rewards import REWARDS, options_needed
from sharpen_kernels import TokenStats
from sharpen_kernels.stats import NAMES

from .batcher import Job
from .dialect import Answer, Asked, Desk, broken, refuse_broken, scores_of, stats_of
from .schemas import Body, RefusedError, as_object, boolean, chosen, texts, wrong
from .text import TOO_LONG

FIELDS = (
    "prompt", "completions", "rewards", "token_stats", "add_special_tokens", "add_eos",
    "answers", "valid", "model",
)  # fmt: skip


def read_score(body: object, desk: Desk) -> Asked:
    """What a request asks for.

    Raises:
        SharpenError: If it is malformed, beyond a limit, or nothing the model can read.
    """
    fields = as_object(body, FIELDS)
    values = fields.get("completions")
    if not isinstance(values, list):
        raise wrong("completions", "a list of texts, or of lists of token ids", values)
    desk.limits.check_n("completions", len(values))
    rewards = chosen(fields, "rewards", ["logprob"], tuple(REWARDS))
    stats = chosen(fields, "token_stats", [], NAMES)
    special = boolean(fields, "add_special_tokens", True)
    end = desk.texts.eos() if boolean(fields, "add_eos", False) else []
    prompt = desk.texts.prompt_ids(fields.get("prompt"), special=special)
    desk.model.check("prompt", prompt)
    # before each completion is checked with it
    desk.limits.check_tokens(len(prompt))
    completions = []
    for i, value in enumerate(values):
        ids = desk.texts.ids(value, f"completions[{i}]", special=False)
        # the end of a completion given as ids is in its ids
        ids = [*ids, *end] if isinstance(value, str) else ids
        # as in the scorer: the last token is predicted, and never read
        desk.model.check(f"completions[{i}]", prompt, ids, unread=min(1, len(ids)))
        completions.append(ids)
    job = Job(prompt, completions, stats_of(rewards, stats))
    options = _options(fields, rewards, job)
    valid = _one_each(fields, "valid", bool, len(values))

    def answer(results: Sequence[TokenStats]) -> Answer:
        (tokens,) = results
        scores = scores_of(job, tokens, valid)
        assert tokens.logprob is not None
        offsets = scores.offsets.tolist()
        return {
            "model": desk.name,
            "rewards": {r: scores.reward(r, **options[r]).numpy() for r in rewards},
            "n_tokens": scores.offsets.diff().numpy(),
            "offsets": scores.offsets.numpy(),
            "token_stats": {name: getattr(tokens, name).numpy() for name in stats},
            "errors": [broken(tokens.logprob[a:b]) for a, b in pairwise(offsets)],
        }

    return desk.check(Asked([job], answer))


def _options(fields: Body, rewards: Sequence[str], job: Job) -> dict[str, dict[str, Any]]:
    """What each reward wants beside statistics: answers of the request, keys of the ids."""
    answers = _one_each(fields, "answers", (str, type(None)), len(job.completions))
    options = {}
    for reward in rewards:
        needed = options_needed(reward)
        if "answers" in needed and answers is None:
            fix = f"the reward {reward} votes on them"
            raise wrong("answers", "a list of one answer or null per completion", None, fix)
        given = {"answers": answers, "keys": [tuple(ids) for ids in job.completions]}
        options[reward] = {name: given[name] for name in needed}
    return options


# what the list holds is what `kind` says
def _one_each(fields: Body, field: str, kind: Any, n: int) -> list[Any] | None:
    values = fields.get(field)
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != n:
        got = f"{len(values)} of them" if isinstance(values, list) else values
        raise wrong(field, f"a list of {n}, one a completion", got)
    for i, value in enumerate(values):
        if not isinstance(value, kind):
            raise wrong(f"{field}[{i}]", "true or false" if kind is bool else "text or null", value)
    return values


# of every completion, beside the reward
LOGS = ("logprob", "mean_logprob", "n_tokens")

# of a text, by the name it has in refusals
Split = Callable[[str], tuple[list[int], list[int]]]


@dataclass(frozen=True)
class _Sample:
    """One text: what to score of it, or the reward that it gets unscored."""

    job: Job | None
    reward: float = 0.0


def read_get_reward(body: object, desk: Desk) -> Asked:
    """What OpenRLHF asks for.

    Raises:
        SharpenError: If it is malformed, beyond a limit, or nothing the model can read.
    """
    fields = as_object(body)
    queries = texts(fields, "query")
    prompts = texts(fields, "prompts")
    if len(prompts) != len(queries):
        raise wrong("prompts", f"a list of {len(queries)}, one a query", f"{len(prompts)} of them")
    desk.limits.check_n("query", len(queries))

    samples = [
        _sample(partial(desk.texts.split, query, prompt), f"query[{i}]", desk)
        for i, (query, prompt) in enumerate(zip(queries, prompts, strict=True))
    ]

    def answer(results: Sequence[TokenStats]) -> Answer:
        rewards, logs = _rewards(samples, results, "query", desk)
        return {"rewards": rewards, "scores": rewards, "extra_logs": logs}

    return desk.check(Asked(_jobs(samples), answer))


def read_evaluation(body: object, desk: Desk) -> Asked:
    """What LLaMA-Factory asks for.

    Raises:
        SharpenError: As `read_get_reward`.
    """
    whole = texts(as_object(body), "messages")
    desk.limits.check_n("messages", len(whole))

    samples = [
        _sample(partial(desk.texts.split_last, text), f"messages[{i}]", desk)
        for i, text in enumerate(whole)
    ]

    def answer(results: Sequence[TokenStats]) -> Answer:
        rewards, _ = _rewards(samples, results, "messages", desk)
        return {"object": "score.evaluation", "model": desk.name, "scores": rewards}

    return desk.check(Asked(_jobs(samples), answer))


def _sample(split: Split, name: str, desk: Desk) -> _Sample:
    try:
        prompt, completion = split(name)
    except RefusedError as refusal:
        if refusal.code != TOO_LONG:
            raise
        return _Sample(None, desk.unscorable.reward_of("too_long", refusal))
    # a prompt of nothing, or ids of another model, are no fault of one sample
    replace(desk.model, max_length=None).check(name, prompt, completion)
    try:
        # as in the scorer: the last token is predicted, and never read
        desk.model.check(name, prompt, completion, unread=min(1, len(completion)))
    except SharpenError as refusal:
        return _Sample(None, desk.unscorable.reward_of("too_long", refusal))
    if not completion:
        refusal = RefusedError(
            422,
            f"`{name}` must hold at least one token after its prompt, got none, which would get 0 "
            "nats and so the best reward; leave it out, or set `unscorable_reward`.",
            param=name,
            code="empty_completion",
        )
        return _Sample(None, desk.unscorable.reward_of("empty", refusal))
    return _Sample(Job(prompt, [completion], stats_of([desk.reward, "logprob", "mean_logprob"])))


def _jobs(samples: Sequence[_Sample]) -> list[Job]:
    return [sample.job for sample in samples if sample.job is not None]


def _rewards(
    samples: Sequence[_Sample], results: Sequence[TokenStats], field: str, desk: Desk
) -> tuple[list[float], dict[str, Any]]:
    """Reward of each sample, and what to log; logs of one that was not rated are 0."""
    rewards: list[float] = []
    rows: list[dict[str, float]] = []
    left = iter(results)
    for i, sample in enumerate(samples):
        reward, row = sample.reward, None
        if sample.job is not None:
            try:
                reward, row = _rated(sample.job, next(left), f"{field}[{i}]", desk.reward)
            except RefusedError as refusal:
                reward = desk.unscorable.reward_of("not_finite", refusal)
        rewards.append(reward)
        rows.append(dict.fromkeys(LOGS, 0.0) if row is None else row)
        if not desk.unscorable.is_refused:
            rows[-1]["unscorable"] = float(row is None)
    names = rows[0] if rows else LOGS
    return rewards, {name: [row[name] for row in rows] for name in names}


def _rated(job: Job, tokens: TokenStats, name: str, reward: str) -> tuple[float, dict[str, float]]:
    """Reward of a job, which has one completion, and what to log.

    Raises:
        RefusedError: If one is no finite number: these hosts read numbers alone.
    """
    assert tokens.logprob is not None
    refuse_broken(name, tokens.logprob)
    scores = scores_of(job, tokens)
    found = {key: scores.reward(key).item() for key in {reward, "logprob", "mean_logprob"}}
    if not math.isfinite(found[reward]):
        raise RefusedError(422, f"`{name}`: {reward} is {found[reward]}.", code="not_finite")
    n_tokens = float(len(tokens.logprob))
    row = {"logprob": found["logprob"], "mean_logprob": found["mean_logprob"], "n_tokens": n_tokens}
    return found[reward], row
