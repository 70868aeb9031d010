"""`/v1/completions`: log-probs of given text, in the words of OpenAI's clients.

What is answered: `echo` with `max_tokens` 0, or 1 for one greedy token more, and `logprobs`; that
is what lm-eval's `local-completions` sends. Sampling is not, and is rejected by name.

A text of n tokens is scored as its first token and a completion of n - 1. The greedy token after
it is read off one more position, whose own token is never read by the model.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from pydantic import Field

from sharpen_kernels import TokenStats

from .batcher import Job
from .errors import HTTPError, bad_field, check_unicode
from .schemas import RequestModel, TextOrIds, parse
from .state import Answer, ParsedRequest, ServerState, reject_not_finite
from .text import Texts

# how many per position the kernel finds
MAX_LOGPROBS = 20
STANDIN = 0  # the token at the position that predicts the one greedy token; it is not read

# what a client may send only to say that it does not want it
OFF: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "stream_options": (),
    "suffix": ("",),
    "stop": ([], ""),
    "top_p": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
}

Best = list[tuple[int, float]]


class CompletionsRequest(RequestModel):
    """Text to echo with log-probs; `user` and `seed` change nothing."""

    model: str | None = None
    prompt: TextOrIds = Field(
        description="text, token ids, or a list of these",
    )
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
    top_p: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
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
    """

    echo: bool
    extra: int
    k: int | None
    as_ids: bool


def read_completions(body: object, state: ServerState, created: int | None = None) -> ParsedRequest:
    """What a request asks for; `created` is in seconds since 1970, by default now."""
    asked = parse(CompletionsRequest, body)
    _check(asked, state.name)
    assert asked.max_tokens is not None
    extra, k = asked.max_tokens, asked.logprobs
    prompts = _prompts(asked, state)
    state.limits.check_n("prompt", len(prompts))
    style = Style(asked.echo, extra, k, asked.return_tokens_as_token_ids)
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
                choice(i, one, tokens, style, state.texts)
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
        if value is not None and value not in allowed:
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
    if not isinstance(value, list) or not isinstance(value[0], (str, list)):
        return [_given(value, "prompt", special, state)]
    return [_given(one, f"prompt[{i}]", special, state) for i, one in enumerate(value)]


def _given(value: object, field: str, special: bool, state: ServerState) -> Given:
    ids = state.texts.ids(value, field, special=special)
    return Given(value if isinstance(value, str) else None, ids)


def _job(name: str, ids: list[Any], style: Style, state: ServerState) -> Job:
    """What to score of a prompt: its tokens after the first, and the one after them."""
    first = 1 if style.echo else len(ids)
    after = [*ids[first:], *[STANDIN] * style.extra]
    # as in the scorer: the last token is predicted, and never read
    state.model.check(name, ids, [STANDIN] * style.extra, unread=min(1, len(after)))
    stats = ("logprob", "topk", "topk_id") if style.k or style.extra else ("logprob",)
    return Job(ids[:first], [after], stats)


def choice(
    index: int, given: Given, tokens: TokenStats | None, style: Style, texts: Texts
) -> dict[str, Any]:
    """As a client reads it.

    Args:
        index: Of the prompt in its request.
        given: The prompt.
        tokens: Statistics of what the prompt's first token (echo) or all of it predict; None if
            nothing was scored.
        style: What is wanted.
        texts: Names tokens.

    Raises:
        HTTPError: 422 if a log-prob is not finite.
    """
    ids, logprobs, best = _positions(given.ids, tokens, style)
    names = [_name(token, style, texts) for token in ids]
    n_echoed = len(ids) - style.extra
    after = "".join(texts.token_text(token) for token in ids[n_echoed:])
    text = (given.text or texts.decoded(ids[:n_echoed])) if style.echo else ""
    found: dict[str, Any] = {"index": index, "text": text + after, "finish_reason": "length"}
    if style.k is None:
        return found | {"logprobs": None}
    return found | {
        "logprobs": {
            "tokens": names,
            "token_logprobs": logprobs,
            "top_logprobs": [
                None if own is None else _top(token, own, near[: style.k], style, texts)
                for token, own, near in zip(ids, logprobs, best, strict=True)
            ],
            "text_offset": _offsets([texts.token_text(token) for token in ids], text + after),
        }
    }


def _positions(
    prompt: Sequence[int], tokens: TokenStats | None, style: Style
) -> tuple[list[int], list[float | None], list[Best]]:
    """Tokens of the answer, the log-prob of each, None for the first, and the best at each."""
    # nothing predicts the first token
    first: list[float | None] = [None] if style.echo else []
    ids = list(prompt) if style.echo else []
    if tokens is None:
        return ids, [None for _ in ids], [[] for _ in ids]
    assert tokens.logprob is not None
    given_S = tokens.logprob[: len(tokens.logprob) - style.extra]
    reject_not_finite("prompt", given_S)
    logprobs = first + given_S.tolist()
    best = [[] for _ in first] + _best(tokens, style.k or style.extra)
    if style.extra:
        token, logprob = best[-1][0] if best[-1] else (0, math.nan)
        reject_not_finite("the token after the prompt", torch.tensor([logprob]))
        ids.append(token)
        logprobs.append(logprob)
    return ids, logprobs, best


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


def _top(token: int, own: float, best: Best, style: Style, texts: Texts) -> dict[str, float]:
    """The best tokens at a position, and the one that stands there, by name."""
    found: dict[str, float] = {}
    for i, logprob in best:
        if i != token:
            name = _name(i, style, texts)
            found[name] = max(logprob, found.get(name, logprob))
    # a token has one log-prob, wherever it is named: clients compare the two for equality
    name = _name(token, style, texts)
    found[name] = max(own, found.get(name, own))
    return found


def _name(token: int, style: Style, texts: Texts) -> str:
    return f"token_id:{token}" if style.as_ids else texts.token_text(token)


def _offsets(names: Sequence[str], text: str) -> list[int]:
    """Where each token begins in the text, in characters; tokens before it begin at 0.

    Sums of lengths: right where a tokenizer writes a token alike after any other.
    """
    ends = list(accumulate(map(len, names)))
    # special tokens before a prompt, or a first space, may be no part of its text
    before = max(0, ends[-1] - len(text)) if ends else 0
    return [max(0, end - len(name) - before) for name, end in zip(names, ends, strict=True)]
