"""One prompt of a completions answer: its tokens, their log-probs, the greedy token after them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from sharpen_kernels import TokenStats

from .dialect import refuse_broken
from .texts import Texts

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
