"""Routes that answer rewards: `/score`, and those that trainers ask for one number per text.

`/score` has one prompt and N completions:

    {"prompt": text | ids | messages, "completions": [text | ids, ...],
     "rewards": ["logprob"], "token_stats": [], "add_special_tokens": true, "add_eos": false,
     "answers": null, "valid": null}

    {"model": ..., "rewards": {name: [N]}, "n_tokens": [N], "offsets": [N + 1],
     "token_stats": {name: [S]}, "errors": [N]}

Completion n owns the tokens offsets[n] ... offsets[n + 1] - 1 of each statistic, as in `Scores`. An
error is null, or says why the log-prob of its completion is not finite.

OpenRLHF, `/get_reward`: {"query": [text], "prompts": [text], "labels": [...]} to {"rewards": [x],
"scores": [x], "extra_logs": {name: [x]}}; it sends one query a request.
LLaMA-Factory, `/v1/score/evaluation`: {"model": ..., "messages": [text]} to {"scores": [x]}; a text
is a whole conversation as the chat template wrote it. Both send what they decoded from ids with its
special tokens, so none are added here.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field

from sharpen.scoring.rewards import REWARDS, options_needed
from sharpen_kernels import TokenStats
from sharpen_kernels.stats import NAMES

from .batcher import Job
from .errors import bad_field
from .schemas import RequestModel, TextOrIds, Texts, one_of, parse
from .state import Answer, ParsedRequest, ServerState, not_finite, scores_of, stats_of
from .text_rewards import TextRewards, query_rewards

Entry = TypeVar("Entry")


class ScoreRequest(RequestModel):
    """One prompt with completions to score."""

    prompt: TextOrIds = Field(description="text or a list of token ids")
    completions: list[TextOrIds] = Field(
        description="a list of texts, or of lists of token ids", fail_fast=True
    )
    rewards: list[Annotated[str, one_of(REWARDS)]] = Field(
        ["logprob"],
        description="a list of names",
        fail_fast=True,
        json_schema_extra={"items": {"enum": [*REWARDS]}},
    )
    token_stats: list[Annotated[str, one_of(NAMES)]] = Field(
        [],
        description="a list of names",
        fail_fast=True,
        json_schema_extra={"items": {"enum": [*NAMES]}},
    )
    add_special_tokens: bool = True
    add_eos: bool = False
    answers: list[str | None] | None = Field(
        None, description="a list of one answer or null per completion", fail_fast=True
    )
    valid: list[bool] | None = Field(
        None, description="a list of true or false per completion", fail_fast=True
    )
    model: Any = None


def read_score(body: object, state: ServerState) -> ParsedRequest:
    """What a request to `/score` asks for."""
    asked = parse(ScoreRequest, body)
    n = len(asked.completions)
    state.limits.check_n("completions", n)
    rewards, stats = dict.fromkeys(asked.rewards), dict.fromkeys(asked.token_stats)
    answers, valid = _one_each("answers", asked.answers, n), _one_each("valid", asked.valid, n)
    job = Job(*_ids(asked, state), stats_of([*rewards], [*stats]))
    options = _options(answers, [*rewards], job)

    def answer(results: Sequence[TokenStats]) -> Answer:
        (tokens,) = results
        scores = scores_of(job, tokens, valid)
        assert tokens.logprob is not None
        offsets = scores.offsets.tolist()
        return {
            "model": state.name,
            "rewards": {r: scores.reward(r, **options[r]).numpy() for r in rewards},
            "n_tokens": scores.offsets.diff().numpy(),
            "offsets": scores.offsets.numpy(),
            "token_stats": {name: getattr(tokens, name).numpy() for name in stats},
            "errors": [not_finite(tokens.logprob[a:b]) for a, b in pairwise(offsets)],
        }

    return state.parsed([job], answer)


def _ids(asked: ScoreRequest, state: ServerState) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt and of each completion, checked against the model."""
    end = state.texts.eos() if asked.add_eos else []
    prompt = state.texts.prompt_ids(asked.prompt, special=asked.add_special_tokens)
    state.model.check("prompt", prompt)
    # before each completion is checked with it
    state.limits.check_tokens(len(prompt))
    completions = []
    for i, value in enumerate(asked.completions):
        ids = state.texts.ids(value, f"completions[{i}]", special=False)
        # the end of a completion given as ids is in its ids
        ids = [*ids, *end] if isinstance(value, str) else ids
        # as in the scorer: the last token is predicted, and never read
        state.model.check(f"completions[{i}]", prompt, ids, unread=min(1, len(ids)))
        completions.append(ids)
    return prompt, completions


def _options(
    answers: list[str | None] | None, rewards: Sequence[str], job: Job
) -> dict[str, dict[str, Any]]:
    """What each reward needs beside statistics: answers of the request, keys of the ids."""
    options = {}
    for reward in rewards:
        needed = options_needed(reward)
        if "answers" in needed and answers is None:
            fix = f"the reward {reward} votes on them"
            raise bad_field("answers", "a list of one answer or null per completion", None, fix)
        given = {"answers": answers, "keys": [tuple(ids) for ids in job.completions]}
        options[reward] = {name: given[name] for name in needed}
    return options


def _one_each(field: str, values: list[Entry] | None, n: int) -> list[Entry] | None:
    if values is not None and len(values) != n:
        raise bad_field(field, f"a list of {n}, one a completion", f"{len(values)} of them")
    return values


class GetRewardRequest(RequestModel):
    """What OpenRLHF sends: texts, and the prompts that they begin with."""

    model_config = ConfigDict(extra="ignore")

    query: Texts
    prompts: Texts


def read_get_reward(body: object, state: ServerState) -> ParsedRequest:
    """What OpenRLHF asks for."""
    asked = parse(GetRewardRequest, body)
    texts = query_rewards(asked.query, asked.prompts, state)

    def answer(results: Sequence[TokenStats]) -> Answer:
        rewards, logs = texts.rewards(results)
        return {"rewards": rewards, "scores": rewards, "extra_logs": logs}

    return state.parsed(texts.jobs, answer)


class EvaluationRequest(RequestModel):
    """What LLaMA-Factory sends: whole conversations."""

    model_config = ConfigDict(extra="ignore")

    messages: Texts


def read_evaluation(body: object, state: ServerState) -> ParsedRequest:
    """What LLaMA-Factory asks for."""
    asked = parse(EvaluationRequest, body)
    splits = [partial(state.texts.split_last, text) for text in asked.messages]
    texts = TextRewards.of("messages", splits, state)

    def answer(results: Sequence[TokenStats]) -> Answer:
        rewards, _ = texts.rewards(results)
        return {"object": "score.evaluation", "model": state.name, "scores": rewards}

    return state.parsed(texts.jobs, answer)
