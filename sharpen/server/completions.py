"""`/v1/completions`: log-probs of given text, in the words of OpenAI's clients.

What is answered: `echo` with `max_tokens` 0, or 1 for one greedy token more, and `logprobs`; that
is what lm-eval's `local-completions` sends. Sampling is not, and is refused by name.

A text of n tokens is scored as its first token and a completion of n - 1. The greedy token after
it is read off one more position, whose own token is never read by the model.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from sharpen_kernels import TokenStats

from .dialect import Answer, Asked, Desk, refuse_broken
from .fields import Body, as_object, boolean, text, whole, wrong
from .jobs import Job
from .refusal import RefusedError

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
    for i, ids in enumerate(prompts):
        first = 1 if echo else len(ids)
        desk.model.check(f"prompt[{i}]", ids, [STANDIN] * extra)
        jobs.append(Job(ids[:first], [[*ids[first:], *[STANDIN] * extra]], stats))
    as_ids = boolean(fields, "return_tokens_as_token_ids", False)

    def answer(results: Sequence[TokenStats]) -> Answer:
        found = results if is_scored else [None] * len(prompts)
        choices = [
            _Choice(desk, ids, tokens, echo, extra, k, as_ids).body(i)
            for i, (ids, tokens) in enumerate(zip(prompts, found, strict=True))
        ]
        n_prompt = sum(map(len, prompts))
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


def _prompts(fields: Body, desk: Desk) -> list[list[int]]:
    """Text, texts, ids, or lists of ids, as lists of ids."""
    value = fields.get("prompt")
    special = boolean(fields, "add_special_tokens", True)
    is_many = isinstance(value, list) and bool(value) and isinstance(value[0], (str, list))
    values = value if isinstance(value, list) and is_many else [value]
    if value == []:
        raise wrong("prompt", "text, token ids, or a list of these", "an empty list")
    return [
        desk.texts.ids(one, f"prompt[{i}]" if is_many else "prompt", special=special)
        for i, one in enumerate(values)
    ]


class _Choice:
    """One prompt of the answer: its tokens, their log-probs, and the greedy token after them."""

    def __init__(
        self,
        desk: Desk,
        prompt: Sequence[int],
        tokens: TokenStats | None,
        echo: bool,
        extra: int,
        k: int | None,
        as_ids: bool,
    ):
        self.desk = desk
        self.k = k
        self.as_ids = as_ids
        self.ids: list[int] = list(prompt) if echo else []
        self.logprob: list[float | None] = []
        self.top: list[list[tuple[int, float]]] = []
        if tokens is None:
            return
        assert tokens.logprob is not None
        n_given = len(tokens.logprob) - extra
        refuse_broken("prompt", tokens.logprob[:n_given])
        # nothing predicts the first token
        self.logprob = [*([None] if echo else []), *tokens.logprob[:n_given].tolist()]
        self.top = [*([[]] if echo else []), *_best(tokens, k or extra)]
        if extra:
            token, logprob = self.top[-1][0] if self.top[-1] else (STANDIN, math.nan)
            refuse_broken("the token after the prompt", torch.tensor([logprob]))
            self.ids.append(token)
            self.logprob.append(logprob)

    def body(self, index: int) -> dict[str, Any]:
        """As a client reads it.

        Raises:
            RefusedError: If a log-prob is not finite.
        """
        choice: dict[str, Any] = {
            "index": index,
            "text": self.desk.texts.decoded(self.ids),
            "finish_reason": "length",
            "logprobs": None,
        }
        if self.k is not None:
            tokens = [self._text(token) for token in self.ids]
            choice["logprobs"] = {
                "tokens": tokens,
                "token_logprobs": self.logprob,
                "top_logprobs": [self._top(i) for i in range(len(self.ids))],
                "text_offset": [0, *accumulate(map(len, tokens))][:-1],
            }
        return choice

    def _top(self, i: int) -> dict[str, float] | None:
        """The best tokens at a position and the one that stands there, by their texts."""
        own = self.logprob[i]
        if own is None:
            return None
        best = self.top[i][: self.k] if self.top else []
        found: dict[str, float] = {}
        for token, logprob in best:
            # two ids may have one text; and a token has one log-prob, wherever it is named
            value = own if token == self.ids[i] else logprob
            key = self._text(token)
            found[key] = max(value, found.get(key, value))
        key = self._text(self.ids[i])
        found[key] = max(own, found.get(key, own))
        return found

    def _text(self, token: int) -> str:
        return f"token_id:{token}" if self.as_ids else self.desk.texts.token_text(token)


def _best(tokens: TokenStats, k: int) -> list[list[tuple[int, float]]]:
    """The k most probable tokens at each position, best first; fewer in a small vocabulary."""
    if not k:
        assert tokens.logprob is not None
        return [[] for _ in range(len(tokens.logprob))]
    assert tokens.topk is not None
    assert tokens.topk_id is not None
    ids, logprobs = tokens.topk_id[:, :k].tolist(), tokens.topk[:, :k].tolist()
    return [
        [(token, x) for token, x in zip(*row, strict=True) if token >= 0]
        for row in zip(ids, logprobs, strict=True)
    ]
