"""One prompt of a completions answer: its tokens, their log-probs, the greedy token after them.

`/v1/completions`: log-probs of given text, in the words of OpenAI's clients.

What is answered: `echo` with `max_tokens` 0, or 1 for one greedy token more, and `logprobs`; that
is what lm-eval's `local-completions` sends. Sampling is not, and is refused by name.

A text of n tokens is scored as its first token and a completion of n - 1. The greedy token after
it is read off one more position, whose own token is never read by the model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from sharpen_kernels import TokenStats

from .batcher import Job
from .dialect import Answer, Asked, Desk, refuse_broken
from .schemas import Body, Made, RefusedError, as_object, boolean, text, whole, wrong
from .text import Texts

Best = list[tuple[int, float]]


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
        RefusedError: If a log-prob is not finite.
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
    refuse_broken("prompt", given_S)
    logprobs = first + given_S.tolist()
    best = [[] for _ in first] + _best(tokens, style.k or style.extra)
    if style.extra:
        token, logprob = best[-1][0] if best[-1] else (0, math.nan)
        refuse_broken("the token after the prompt", torch.tensor([logprob]))
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


# how many a position the kernel finds
MAX_LOGPROBS = 20
STANDIN = 0

# what a client may send only to say that it does not want it
OFF: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "stream": (False,), "stream_options": (), "suffix": ("",),
    "stop": ([], ""), "top_p": (1,), "presence_penalty": (0,), "frequency_penalty": (0,),
    "logit_bias": ({},),
}  # fmt: skip
# what changes nothing here
IGNORED = ("user", "seed")
FIELDS = (
    "model", "prompt", "echo", "max_tokens", "logprobs", "temperature", "add_special_tokens",
    "return_tokens_as_token_ids", *OFF, *IGNORED,
)  # fmt: skip


def read_completions(body: object, desk: Desk, created: int) -> Asked:
    """What a request asks for.

    Args:
        body: Of the request.
        desk: What the server is.
        created: Seconds since 1970, for the answer.

    Raises:
        SharpenError: If it is malformed, asks for sampling, is beyond a limit, or nothing the model
            can read.
    """
    fields = as_object(body, FIELDS)
    _refuse_sampling(fields, desk.name)
    echo = boolean(fields, "echo", False)
    extra = whole(fields, "max_tokens", None, (0, 1))
    if extra is None or (extra == 0 and not echo):
        fix = "this server scores text and does not generate"
        raise wrong("max_tokens", "0 or 1 with `echo`, or 1 without", extra, fix)
    if extra == 1 and fields.get("temperature") not in (0, None):
        raise wrong("temperature", "0, as the one token is the greedy one", fields["temperature"])
    k = whole(fields, "logprobs", None, (0, MAX_LOGPROBS))
    prompts = _prompts(fields, desk)
    desk.limits.check_n("prompt", len(prompts))
    stats = ("logprob", "topk", "topk_id") if k or extra else ("logprob",)
    # without log-probs there may be nothing to compute
    is_scored = k is not None or extra == 1
    jobs = []
    for i, (_, ids) in enumerate(prompts):
        first = 1 if echo else len(ids)
        after = [*ids[first:], *[STANDIN] * extra]
        # as in the scorer: the last token is predicted, and never read
        desk.model.check(f"prompt[{i}]", ids, [STANDIN] * extra, unread=min(1, len(after)))
        jobs.append(Job(ids[:first], [after], stats))
    style = Style(echo, extra, k, boolean(fields, "return_tokens_as_token_ids", False))

    def answer(results: Sequence[TokenStats]) -> Answer:
        found = results if is_scored else [None] * len(prompts)
        # a dictionary a token is much where there are a hundred thousand
        choices = Made(len(prompts), lambda i: choice(i, prompts[i], found[i], style, desk.texts))
        n_prompt = sum(len(ids) for _, ids in prompts)
        usage = {"prompt_tokens": n_prompt, "completion_tokens": extra * len(prompts)}
        return {
            "id": f"cmpl-{created}",
            "object": "text_completion",
            "created": created,
            "model": desk.name,
            "choices": choices,
            "usage": usage | {"total_tokens": sum(usage.values())},
        }

    return desk.check(Asked(jobs if is_scored else [], answer))


def _refuse_sampling(fields: Body, name: str) -> None:
    asked = fields.get("model")
    if asked is not None and asked != name:
        raise RefusedError(
            404,
            f"`model` must be {name!r}, got {text(asked, 'model')!r}; this server has no other.",
            param="model",
            code="model_not_found",
        )
    for field, allowed in OFF.items():
        value = fields.get(field)
        if value is not None and value not in allowed:
            raise RefusedError(
                422,
                f"`{field}` is not supported: this server scores text and does not sample; "
                "leave it out.",
                param=field,
                code="unsupported",
            )


def _prompts(fields: Body, desk: Desk) -> list[Given]:
    """Text, texts, ids, or lists of ids."""
    value = fields.get("prompt")
    special = boolean(fields, "add_special_tokens", True)
    is_many = isinstance(value, list) and bool(value) and isinstance(value[0], (str, list))
    values = value if isinstance(value, list) and is_many else [value]
    if value == []:
        raise wrong("prompt", "text, token ids, or a list of these", "an empty list")
    return [
        Given(
            one if isinstance(one, str) else None,
            desk.texts.ids(one, f"prompt[{i}]" if is_many else "prompt", special=special),
        )
        for i, one in enumerate(values)
    ]
