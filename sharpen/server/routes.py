"""The routes: what each asks, checked by a pydantic model and against the server, and its answer.

A model checks types, strictly, and every error is in the words of this server; what depends on the
scored model, the limits or other fields is checked by the route.

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

`/v1/completions` gives log-probs of given text, in the words of OpenAI's clients. What is answered:
`echo` with `max_tokens` 0, or 1 for one greedy token more, and `logprobs`; that is what lm-eval's
`local-completions` sends. Sampling is not, and is rejected by name. A text of n tokens is scored as
its first token and a completion of n - 1. The greedy token after it is read off one more position,
whose own token is never read by the model.
"""

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, Field, ValidationError
from pydantic_core import ErrorDetails

from sharpen.records import TEMPLATE_FIELDS
from sharpen.scoring.rewards import REWARDS, options_needed
from sharpen.text import REPLACEMENT
from sharpen_kernels import TokenStats
from sharpen_kernels.stats import NAMES

from .batcher import Job
from .errors import HTTPError, bad_field, check_unicode
from .state import (
    Answer,
    ParsedRequest,
    ServerState,
    TextRewards,
    not_finite,
    query_rewards,
    reject_not_finite,
    scores_of,
    stats_of,
)
from .text import Texts

# ids of a request are whatever it holds, until the model's limits have seen them
TextOrIds = str | list[Any]
# lists fail fast: thousands of bad items are one error
ListOfTexts = Annotated[list[str], Field(description="a list of texts", fail_fast=True)]

# what is wanted by fields that have no description, and of items that are not any text
WANTED = {"bool_type": "true or false", "string_type": "text"}
WANTED_ITEMS = {"answers": "text or null"}
MAX_LOGPROBS = 20  # how many per position the kernel finds
STANDIN = 0  # the token at the position that predicts the one greedy token; it is not read

# what a client may send only to say that it does not want it
OFF: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "stream_options": (),
    "suffix": ("",),
    "use_beam_search": (False,),
    "logit_bias": ({},),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "top_p": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_tokens": (0, 1),
    "ignore_eos": (False,),
}
# of these, what is about the token to come alone: without one, any value changes nothing
OF_SAMPLING = ("top_p", "top_k", "min_p", "min_tokens", "ignore_eos", "length_penalty")
OF_SAMPLING += ("presence_penalty", "frequency_penalty", "repetition_penalty")

Best = list[tuple[int, float]]


class RequestModel(BaseModel, strict=True, extra="forbid"):
    """The body of a request; a field that no one would read is an error."""


Model = TypeVar("Model", bound=RequestModel)
Entry = TypeVar("Entry")


def parse(model: type[Model], body: object) -> Model:
    """The body as `model`; 422 for an unknown field if there is one, else for the first bad one."""
    if not isinstance(body, dict):
        message = f"the body must be an object, got {type(body).__name__}."
        raise HTTPError(422, message, code="bad_body")
    known = model.model_fields
    # null is what clients send for what they leave open
    body = {
        key: value
        for key, value in body.items()
        if value is not None or (key in known and known[key].is_required())
    }
    unknown = [str(key) for key in body if key not in known]
    if unknown and model.model_config.get("extra") == "forbid":
        message = f"unknown field `{unknown[0]}`; known: {', '.join(sorted(known))}."
        raise HTTPError(422, message, param=unknown[0], code="bad_field")
    try:
        return model.model_validate({name: body[name] for name in known if name in body})
    except ValidationError as error:
        raise _http_error(model, error.errors(include_url=False)[0]) from None


def _http_error(model: type[RequestModel], error: ErrorDetails) -> HTTPError:
    kind, place = error["type"], [*error["loc"]]
    name, index = str(place[0]), place[1] if len(place) > 1 else None
    is_item = isinstance(index, int)
    # pydantic appends the member of the union to the place
    if place[-1] == "str":
        wanted = "text or a list of token ids"
    else:
        wanted = WANTED_ITEMS.get(name) if is_item else model.model_fields[name].description
    got = None if kind == "missing" else error["input"]
    return bad_field(f"{name}[{index}]" if is_item else name, wanted or WANTED[kind], got)


class ScoreRequest(RequestModel):
    """One prompt with completions to score."""

    prompt: TextOrIds = Field(description="text or a list of token ids")
    completions: list[TextOrIds] = Field(
        description="a list of texts, or of lists of token ids", fail_fast=True
    )
    # checked by `_names`, in its words
    rewards: list[Any] = Field(
        ["logprob"],
        description="a list of names",
        json_schema_extra={"items": {"enum": [*REWARDS]}},
    )
    token_stats: list[Any] = Field(
        [], description="a list of names", json_schema_extra={"items": {"enum": [*NAMES]}}
    )
    add_special_tokens: bool = True
    add_eos: bool = False
    # for messages; checked by `template_fields`, in its words
    tools: Any = None
    documents: Any = None
    chat_template_kwargs: Any = None
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
    rewards = _names("rewards", asked.rewards, REWARDS)
    stats = _names("token_stats", asked.token_stats, NAMES)
    answers, valid = _one_each("answers", asked.answers, n), _one_each("valid", asked.valid, n)
    job = Job(*_ids(asked, state), stats_of(rewards, stats))
    options = _options(answers, rewards, job)

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


def _names(field: str, values: list[Any], known: Collection[str]) -> list[str]:
    """Some of the known names, each once."""
    for value in values:
        if not isinstance(value, str) or value not in known:
            raise bad_field(field, f"of {', '.join(known)}", value)
    return list(dict.fromkeys(values))


def _ids(asked: ScoreRequest, state: ServerState) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt and of each completion, checked against the model."""
    if asked.add_eos:
        state.texts.codec.check_has_end()
    template = {name: getattr(asked, name) for name in TEMPLATE_FIELDS}
    prompt = state.texts.prompt_ids(
        asked.prompt, special=asked.add_special_tokens, template=template
    )
    state.model.check("prompt", prompt)
    # before each completion is checked with it
    state.limits.check_tokens(len(prompt))
    completions = []
    for i, value in enumerate(asked.completions):
        # the end of a completion given as ids is in its ids
        name = f"completions[{i}]"
        ids = state.texts.completion_ids(prompt, value, name, add_eos=asked.add_eos)
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


class GetRewardRequest(RequestModel, extra="ignore"):
    """What OpenRLHF sends: texts, and the prompts that they begin with."""

    query: ListOfTexts
    prompts: ListOfTexts


def read_get_reward(body: object, state: ServerState) -> ParsedRequest:
    """What OpenRLHF asks for."""
    asked = parse(GetRewardRequest, body)
    texts = query_rewards(asked.query, asked.prompts, state)

    def answer(results: Sequence[TokenStats]) -> Answer:
        rewards, logs = texts.rewards(results)
        return {"rewards": rewards, "scores": rewards, "extra_logs": logs}

    return state.parsed(texts.jobs, answer)


class EvaluationRequest(RequestModel, extra="ignore"):
    """What LLaMA-Factory sends: whole conversations."""

    messages: ListOfTexts


def read_evaluation(body: object, state: ServerState) -> ParsedRequest:
    """What LLaMA-Factory asks for."""
    asked = parse(EvaluationRequest, body)
    splits = [partial(state.texts.split_last, text) for text in asked.messages]
    texts = TextRewards.of("messages", splits, state)

    def answer(results: Sequence[TokenStats]) -> Answer:
        rewards, _ = texts.rewards(results)
        return {"object": "score.evaluation", "model": state.name, "scores": rewards}

    return state.parsed(texts.jobs, answer)


class CompletionsRequest(RequestModel):
    """Text to echo with log-probs; `stop`, `stop_token_ids`, `user` and `seed` change nothing."""

    model: str | None = None
    prompt: TextOrIds = Field(description="text, token ids, or a list of these")
    echo: bool = False
    max_tokens: int | None = Field(None, ge=0, le=1, description="a whole number from 0 to 1")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description=f"a whole number from 0 to {MAX_LOGPROBS}"
    )
    temperature: Any = None
    add_special_tokens: bool = True
    return_tokens_as_token_ids: bool = False
    n: Any = None
    best_of: Any = None
    stream: Any = None
    stream_options: Any = None
    suffix: Any = None
    stop: Any = None
    stop_token_ids: Any = None
    include_stop_str_in_output: Any = None
    skip_special_tokens: Any = None
    spaces_between_special_tokens: Any = None
    use_beam_search: Any = None
    top_p: Any = None
    top_k: Any = None
    min_p: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    repetition_penalty: Any = None
    length_penalty: Any = None
    min_tokens: Any = None
    ignore_eos: Any = None
    logit_bias: Any = None
    user: Any = None
    seed: Any = None


class Given(NamedTuple):
    """A prompt of the request: its text, if it came as text, and its ids."""

    text: str | None
    # whatever the request holds, until the model's limits have seen them
    ids: list[Any]


@dataclass(frozen=True)
class Style:
    """What a choice holds.

    Attributes:
        echo: The prompt.
        extra: How many greedy tokens after it: 0 or 1.
        k: How many of the most probable tokens at each position; None leaves log-probs out.
        as_ids: Name tokens "token_id:7" instead of by their texts, which two may share.
        texts: Names tokens.
    """

    echo: bool
    extra: int
    k: int | None
    as_ids: bool
    texts: Texts

    def name(self, token: int) -> str:
        """What a token is called."""
        return f"token_id:{token}" if self.as_ids else self.texts.token_text(token)


def read_completions(body: object, state: ServerState, created: int | None = None) -> ParsedRequest:
    """What a request asks for; `created` is in seconds since 1970, by default now."""
    asked = parse(CompletionsRequest, body)
    _check(asked, state.name)
    assert asked.max_tokens is not None
    extra, k = asked.max_tokens, asked.logprobs
    prompts = _prompts(asked, state)
    state.limits.check_n("prompt", len(prompts))
    style = Style(asked.echo, extra, k, asked.return_tokens_as_token_ids, state.texts)
    # without log-probs there may be nothing to compute
    is_scored = k is not None or extra == 1
    jobs = [_job(f"prompt[{i}]", one.ids, style, state) for i, one in enumerate(prompts)]
    created = int(time.time()) if created is None else created

    def answer(results: Sequence[TokenStats]) -> Answer:
        found = results if is_scored else [None] * len(prompts)
        n_prompt = sum(len(one.ids) for one in prompts)
        n_extra = extra * len(prompts)
        return {
            "id": f"cmpl-{created}",
            "object": "text_completion",
            "created": created,
            "model": state.name,
            # one at a time: a dictionary per token is much where there are a hundred thousand
            "choices": (
                choice(i, one, tokens, style)
                for i, (one, tokens) in enumerate(zip(prompts, found, strict=True))
            ),
            "usage": {
                "prompt_tokens": n_prompt,
                "completion_tokens": n_extra,
                "total_tokens": n_prompt + n_extra,
            },
        }

    return state.parsed(jobs if is_scored else [], answer)


def _check(asked: CompletionsRequest, name: str) -> None:
    """Reject another model, and what would need sampling."""
    if asked.model is not None and asked.model != name:
        check_unicode(asked.model, "model")
        raise HTTPError(
            404,
            f"`model` must be {name!r}, got {asked.model!r}; this server has no other.",
            param="model",
            code="model_not_found",
        )
    for field, allowed in OFF.items():
        value = getattr(asked, field)
        is_idle = asked.max_tokens == 0 and field in OF_SAMPLING
        if value is not None and value not in allowed and not is_idle:
            raise HTTPError(
                422,
                f"`{field}` is not supported: this server scores text and does not sample; "
                "leave it out.",
                param=field,
                code="unsupported",
            )
    if asked.max_tokens is None or (asked.max_tokens == 0 and not asked.echo):
        fix = "this server scores text and does not generate"
        raise bad_field("max_tokens", "0 or 1 with `echo`, or 1 without", asked.max_tokens, fix)
    if asked.max_tokens == 1 and asked.temperature not in (0, None):
        wanted = "0, as the one token is the greedy one"
        raise bad_field("temperature", wanted, asked.temperature)


def _prompts(asked: CompletionsRequest, state: ServerState) -> list[Given]:
    """Text, texts, ids, or lists of ids."""
    value, special = asked.prompt, asked.add_special_tokens
    if value == []:
        raise bad_field("prompt", "text, token ids, or a list of these", "an empty list")
    named: list[tuple[str, object]] = [("prompt", value)]
    if isinstance(value, list) and isinstance(value[0], (str, list)):
        named = [(f"prompt[{i}]", one) for i, one in enumerate(value)]
    return [
        Given(one if isinstance(one, str) else None, state.texts.ids(one, name, special=special))
        for name, one in named
    ]


def _job(name: str, ids: list[Any], style: Style, state: ServerState) -> Job:
    """What to score of a prompt: its tokens after the first, and the one after them."""
    first = 1 if style.echo else len(ids)
    after = [*ids[first:], *[STANDIN] * style.extra]
    # as in the scorer: the last token is predicted, and never read
    state.model.check(name, ids, [STANDIN] * style.extra, unread=min(1, len(after)))
    stats = ("logprob", "topk", "topk_id") if style.k or style.extra else ("logprob",)
    return Job(ids[:first], [after], stats)


def choice(index: int, given: Given, tokens: TokenStats | None, style: Style) -> dict[str, Any]:
    """As a client reads it.

    Args:
        index: Of the prompt in its request.
        given: The prompt.
        tokens: Statistics of what the prompt's first token (echo) or all of it predict; None if
            nothing was scored.
        style: What is wanted.

    Raises:
        HTTPError: 422 if a log-prob is not finite.
    """
    ids = list(given.ids) if style.echo else []
    text = (given.text or style.texts.decoded(ids)) if style.echo else ""
    # nothing predicts the first token
    logprobs: list[float | None] = [None] if style.echo else []
    best: list[Best] = [[] for _ in logprobs]
    if tokens is not None:
        assert tokens.logprob is not None
        given_S = tokens.logprob[: len(tokens.logprob) - style.extra]
        reject_not_finite("prompt", given_S)
        logprobs += given_S.tolist()
        best += _best(tokens, style.k or style.extra)
    if style.extra:
        token, logprob = best[-1][0] if best[-1] else (0, math.nan)
        reject_not_finite("the token after the prompt", torch.tensor([logprob]))
        ids.append(token)
        logprobs.append(logprob)
        text += style.texts.token_text(token)
    found: dict[str, Any] = {"index": index, "text": text, "finish_reason": "length"}
    if style.k is None:
        return found | {"logprobs": None}
    return found | {
        "logprobs": {
            "tokens": [style.name(token) for token in ids],
            "token_logprobs": logprobs,
            "top_logprobs": [
                None if own is None else _top(token, own, near[: style.k], style)
                for token, own, near in zip(ids, logprobs, best, strict=True)
            ],
            "text_offset": _offsets(ids, text, style.texts),
        }
    }


def _best(tokens: TokenStats, k: int) -> list[Best]:
    """The k most probable tokens at each position, best first; fewer in a small vocabulary."""
    if not k:
        assert tokens.logprob is not None
        return [[] for _ in range(len(tokens.logprob))]
    assert tokens.topk is not None
    assert tokens.topk_id is not None
    # numpy reads a table into lists many times faster than torch
    rows = zip(
        tokens.topk_id[:, :k].numpy().tolist(), tokens.topk[:, :k].numpy().tolist(), strict=True
    )
    # a vocabulary of fewer tokens leaves places empty
    return [[(i, x) for i, x in zip(*row, strict=True) if i >= 0] for row in rows]


def _top(token: int, own: float, best: Best, style: Style) -> dict[str, float]:
    """The best tokens at a position, and the one that stands there, by name."""
    found: dict[str, float] = {}
    for i, logprob in best:
        if i != token:
            name = style.name(i)
            found[name] = max(logprob, found.get(name, logprob))
    # a token has one log-prob, wherever it is named: clients compare the two for equality
    name = style.name(token)
    found[name] = max(own, found.get(name, own))
    return found


def _offsets(ids: list[int], text: str, texts: Texts) -> list[int]:
    """Where each token begins in the text, in characters; tokens before it begin at 0."""
    token_texts = [texts.token_text(token) for token in ids]
    if any(REPLACEMENT in x for x in token_texts):
        # a character of several tokens: what each is alone says nothing of its place
        ends = texts.codec.character_ends(ids)
    else:
        ends = list(accumulate(map(len, token_texts)))
    # special tokens before a prompt, or a first space, may be no part of its text
    before = max(0, ends[-1] - len(text)) if ends else 0
    return [max(0, start - before) for start in [0, *ends[:-1]]] if ends else []
