"""What a completions endpoint is asked for, and its answer read strictly."""

from dataclasses import dataclass
from typing import Any, Literal

from .endpoint_client import EndpointError
from .protocol import FinishReason, Prompt, SamplingConfig

PromptForm = Literal["text", "ids"]

# what servers call the same ends
ENDS: dict[object, FinishReason] = {
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "max_tokens": "length",
}
# how vLLM writes a token's id in the place of its text
TOKEN_ID = "token_id:"


class NoLogprobsError(EndpointError):
    """An answer without log-probs."""


@dataclass(frozen=True)
class Choice:
    """One completion of an answer.

    Attributes:
        text: Without the end-of-sequence token.
        tokens: Text of each token, as the server writes it.
        ids: Its token ids; None where the server was not asked for them.
        logprobs: Of each token in nats; NaN where the server has none.
        finish_reason: Why it ended.
    """

    text: str
    tokens: list[str]
    ids: list[int] | None
    logprobs: list[float]
    finish_reason: FinishReason


def request(
    model: str, prompt: Prompt, config: SamplingConfig, *, n: int, seed: int, form: PromptForm
) -> dict[str, Any]:
    """The body that asks for n completions of a prompt, with the log-prob of each token."""
    body = {
        "model": model,
        "prompt": prompt.text if form == "text" else list(prompt.ids),
        "n": n,
        "max_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "seed": seed,
        # of the chosen token alone
        "logprobs": 0,
    }
    if form == "ids":
        # fields of vLLM: ids back (a newer and an older way), and none of a checkpoint's own
        # sampling defaults, which its server applies to what a request leaves open
        body |= {
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
    return body


def read_choices(url: str, answer: dict[str, Any], form: PromptForm) -> list[Choice]:
    """The completions of an answer, in the order of their index.

    Raises:
        NoLogprobsError: If the log-probs are left out.
        EndpointError: If the answer is not one of a completions endpoint.
    """
    choices = answer.get("choices")
    if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
        got = ", ".join(answer) or "nothing"
        raise _bad(url, f"`choices`, a list of objects, got {got}")
    # a server may answer in the order in which they finished
    ordered = sorted(choices, key=lambda c: c["index"] if isinstance(c.get("index"), int) else 0)
    return [_read(url, choice, form) for choice in ordered]


def _read(url: str, choice: dict[str, Any], form: PromptForm) -> Choice:
    text = choice.get("text")
    if not isinstance(text, str):
        what = "; chat completions have no log-probs of a raw prompt" if "message" in choice else ""
        raise _bad(url, f"a `text` in each choice, got {', '.join(choice) or 'nothing'}{what}")
    found = choice.get("logprobs")
    if not isinstance(found, dict) or not isinstance(found.get("token_logprobs"), list):
        raise NoLogprobsError(
            f"`endpoint` {url}: must give the log-prob of each token (`logprobs`), got none; use a "
            "server and a model that give them."
        )
    values = found["token_logprobs"]
    tokens = found.get("tokens")
    if not isinstance(tokens, list) or len(tokens) != len(values):
        raise _bad(url, f"as many `tokens` as `token_logprobs`, {len(values)}")
    if not all(x is None or isinstance(x, (int, float)) for x in values):
        raise _bad(url, "numbers in `token_logprobs`")
    reason = ENDS.get(choice.get("finish_reason"), "cut")
    return Choice(
        text=text,
        tokens=[str(token) for token in tokens],
        ids=_ids(url, choice, tokens) if form == "ids" else None,
        logprobs=[float("nan") if x is None else float(x) for x in values],
        finish_reason="nan" if None in values else reason,
    )


def _ids(url: str, choice: dict[str, Any], tokens: list[Any]) -> list[int]:
    ids = choice.get("token_ids")
    if ids is None:
        named = [str(token) for token in tokens]
        if all(t.startswith(TOKEN_ID) and t[len(TOKEN_ID) :].isdecimal() for t in named):
            return [int(t[len(TOKEN_ID) :]) for t in named]
        raise EndpointError(
            f"`endpoint` {url}: must give the ids of the completion's tokens (`token_ids`, as "
            "vLLM does), got text alone; ask by `--endpoint-prompts text`."
        )
    if not isinstance(ids, list) or len(ids) != len(tokens) or any(type(i) is not int for i in ids):
        raise _bad(url, f"`token_ids` of {len(tokens)} integers")
    return ids


def _bad(url: str, wanted: str) -> EndpointError:
    return EndpointError(f"`endpoint` {url}: its answer must hold {wanted}.")
