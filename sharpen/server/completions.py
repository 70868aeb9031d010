"""`/v1/completions`: log-probs of given text, in the words of OpenAI's clients.

What is answered: `echo` with `max_tokens` 0, or 1 for one greedy token more, and `logprobs`; that
is what lm-eval's `local-completions` sends. Sampling is not, and is refused by name.

A text of n tokens is scored as its first token and a completion of n - 1. The greedy token after
it is read off one more position, whose own token is never read by the model.
"""

from collections.abc import Sequence
from typing import Any

from sharpen_kernels import TokenStats

from .bodies import Made
from .choices import Given, Style, choice
from .dialect import Answer, Asked, Desk
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
