"""Sample from any OpenAI-compatible completions endpoint, with the log-prob of every token.

The route of models that are only served, such as GPT-3.5-turbo-instruct in Huang et al. 2024
(arXiv:2412.01951). One request asks for all completions of a prompt; a server that gives fewer is
asked again for the rest, under another seed. A sample's seed is made from the run's seed, the
prompt's id and the sample's index; whether the same seed gives the same sample is up to the server.

Log-probs are what the server says they are. vLLM's are raw (temperature 1) by default; OpenAI does
not document whether `temperature` and `top_p` change them, so they are sure at 1 alone.

`EndpointSampler`, `EndpointSamples`      the `Sampler`, several prompts at a time
`completions_request`, `read_choices`     the body of a request, and its answer read strictly
`map_concurrently`                        slow calls in threads, each result as soon as it is there
`EndpointClient`, `Patience`              JSON over HTTP: retried, paced, bounded in time and size
`check_url`, `check_key`                  what may be sent where; `retry_after_s`: when to try again

A failure that may pass (no connection, a timeout, a body cut short, HTTP 408, 409, 425, 429 and
5xx) is tried again after

    wait = U(0.5, 1) * min(max_wait, 2^try) s,  and never before the server's `Retry-After`

and a `Retry-After` holds back every thread, not only the one that was told. Redirects are not
followed: they would carry the key to another host. The key is in one header and nowhere else: not
in a message, a log, or on disk.

By hand on the standard library, because the `openai` client promises less: its timeout is that of
one read, so a trickle of bytes never ends; a body has no largest size; its waits stop growing at
8 s; HTTP 425 and a proxy's page are not tried again, but an account without money is; and it sends
what OPENAI_ORG_ID and OPENAI_CUSTOM_HEADERS hold to any host.
"""

import email.utils
import http.client
import itertools
import json
import logging
import queue
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from time import monotonic, sleep
from typing import Any, Literal, TypeVar

from sharpen.errors import InputError, ServiceError

from .base import FinishReason, Prompt, Samples, SamplingConfig
from .draw import row_key

logger = logging.getLogger(__name__)

PromptForm = Literal["text", "ids"]
Item = TypeVar("Item")
Result = TypeVar("Result")

ROUTE = "/completions"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
MAX_BODY_BYTES = 1 << 28
MAX_REFUSAL_BYTES = 1 << 14
MAY_PASS = (408, 409, 425, 429)
# of the request that was sent, not of the server: others may still be answered
OF_REQUEST = (400, 413, 414, 422)
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


class EndpointError(ServiceError):
    """What an endpoint did wrong.

    Attributes:
        of_request: Whether only this request is refused, and others may be answered.
    """

    def __init__(self, message: str, *, of_request: bool = False):
        super().__init__(message)
        self.of_request = of_request


class NoLogprobsError(EndpointError):
    """An answer without log-probs."""


@dataclass(frozen=True)
class EndpointSamples(Samples):
    """Samples of a server.

    Attributes:
        tokens: Text of each token, as the server writes it; what it has for every log-prob where
            it tells no ids. OpenAI writes no end-of-sequence token, and gives no log-prob of it.
        served_model: What the server calls the model that answered.
    """

    tokens: list[list[str]]
    served_model: str


class EndpointSampler:
    """The `Sampler` of a completions endpoint.

    Args:
        client: Where it is.
        model: Its name there.
        form: "text" sends text and takes text: any server. "ids" sends token ids and wants those
            of the completions back: vLLM's server.
        concurrency: Prompts asked for at a time.
        choices: Most completions asked for in one request.

    Raises:
        InputError: If a number is not positive, or the model has no name.
    """

    route = "endpoint"

    def __init__(
        self,
        client: "EndpointClient",
        model: str,
        *,
        form: PromptForm = "text",
        concurrency: int = 8,
        choices: int = 128,
    ):
        for name, value in (("concurrency", concurrency), ("choices", choices)):
            if value < 1:
                raise InputError(f"`{name}` of an endpoint must be at least 1, got {value}.")
        if not model:
            raise InputError("`endpoint_model` must be given with `--endpoint`: its name there.")
        self.client = client
        self.model = model
        self.form: PromptForm = form
        self.concurrency = concurrency
        self.choices = choices
        self._logprobs = 0
        self._warned: set[str] = set()

    def check(self, prompts: Sequence[Prompt], config: SamplingConfig) -> None:
        """Reject prompts that cannot be sent.

        Raises:
            InputError: If ids are to be sent and a prompt has none.
        """
        if self.form == "ids":
            for prompt in prompts:
                if not prompt.ids:
                    raise InputError(
                        f"{prompt.place}: prompts must have token ids to be sent as ids; give "
                        "`--model` for its tokenizer, or `--endpoint-prompts text`."
                    )
        if config.temperature not in (0, 1) or config.top_p != 1:
            self._warn_once(
                "log-probs at a temperature or top-p other than 1 are what the server makes of "
                "them: vLLM's are raw, others may not say."
            )

    def sample(
        self, prompts: Sequence[Prompt], config: SamplingConfig, *, done: Collection[str] = ()
    ) -> Iterator[list[Samples]]:
        """See `Sampler`. Each prompt is yielded when it is whole, in any order.

        A refusal of one prompt is raised when the others are finished; one of the server itself
        as soon as what is under way is finished or given up.

        Raises:
            InputError: As `check` does.
            EndpointError: If any prompt was not answered.
        """
        self.check(prompts, config)
        refused: list[tuple[Prompt, Exception]] = []
        broken: list[Exception] = []
        todo = (prompt for prompt in prompts if prompt.id not in done)
        going = itertools.takewhile(lambda _: not broken, todo)
        for prompt, result in map_concurrently(
            lambda prompt: self._draw(prompt, config), going, self.concurrency
        ):
            if not isinstance(result, Exception):
                yield [result]
            elif isinstance(result, EndpointError) and result.of_request:
                refused.append((prompt, result))
            else:
                broken.append(result)
        if broken:
            raise broken[0]
        if refused:
            prompt, first = refused[0]
            raise EndpointError(
                f"{len(refused)} of {len(prompts)} prompts were refused, first {prompt.place}: "
                f"{first} The others are kept.",
                of_request=True,
            )

    def _draw(self, prompt: Prompt, config: SamplingConfig) -> EndpointSamples:
        """All completions of one prompt, by as many requests as it takes."""
        drawn: list[Choice] = []
        served = self.model
        while len(drawn) < config.n:
            wanted = min(config.n - len(drawn), self.choices)
            fresh, served = self._ask(prompt, config, config.first + len(drawn), wanted)
            if not fresh:
                url = self.client.url
                raise EndpointError(f"`endpoint` {url}: must give {wanted} completions, got none.")
            if len(fresh) < wanted:
                self._warn_once(
                    f"it gave {len(fresh)} completions where {wanted} were asked for; the rest is "
                    "asked for again, and every request pays for its prompt."
                )
            drawn += fresh[:wanted]
        ids = [choice.ids for choice in drawn if choice.ids is not None]
        return EndpointSamples(
            prompt_id=prompt.id,
            completions=[choice.text for choice in drawn],
            completion_ids=ids,
            logprobs=[choice.logprobs for choice in drawn],
            finish_reasons=[choice.finish_reason for choice in drawn],
            tokens=[choice.tokens for choice in drawn],
            served_model=served,
        )

    def _ask(
        self, prompt: Prompt, config: SamplingConfig, first: int, n: int
    ) -> "tuple[list[Choice], str]":
        """The completions that one request gives, and the name of the model that answered."""
        # as many bits as every server takes
        seed = row_key(config.seed, prompt.id, first) % (1 << 31)
        body = completions_request(self.model, prompt, config, n=n, seed=seed, form=self.form)
        body["logprobs"] = self._logprobs
        answer = self.client.post(ROUTE, body)
        try:
            choices = read_choices(self.client.url, answer, self.form)
        except NoLogprobsError:
            if body["logprobs"] > 0:
                raise
            # some servers take 0 for "none"
            self._logprobs = 1
            return self._ask(prompt, config, first, n)
        return choices, str(answer.get("model", self.model))

    def _warn_once(self, what: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("endpoint %s: %s", self.client.url, what)


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


def completions_request(
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
    return [_read_choice(url, choice, form) for choice in ordered]


def _read_choice(url: str, choice: dict[str, Any], form: PromptForm) -> Choice:
    """One completion; every value that is relied on is checked."""
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
    """A completion's token ids, of either way in which vLLM gives them."""
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
    """An answer that lacks something."""
    return EndpointError(f"`endpoint` {url}: its answer must hold {wanted}.")


def map_concurrently(
    work: Callable[[Item], Result], items: Iterable[Item], n: int
) -> Iterator[tuple[Item, Result | Exception]]:
    """(item, result or error) of each item, in the order in which they finish; n run at a time.

    The next item is taken when a place is free, in the caller's thread, so an iterable that ends
    early stops the rest. Daemon threads, unlike an executor's, do not keep
    an interrupted program alive until their requests have timed out.

    Example:
        >>> sorted(map_concurrently(lambda x: x * x, [3, 4], n=2))
        [(3, 9), (4, 16)]
    """
    finished: queue.SimpleQueue[tuple[Item, Result | Exception]] = queue.SimpleQueue()

    def run(item: Item) -> None:
        try:
            finished.put((item, work(item)))
        # whatever it is, it is the caller's to judge
        except Exception as error:
            finished.put((item, error))

    waiting = iter(items)
    running = 0
    while True:
        for item in itertools.islice(waiting, n - running):
            threading.Thread(target=run, args=(item,), daemon=True).start()
            running += 1
        if not running:
            return
        yield finished.get()
        running -= 1


@dataclass(frozen=True)
class Patience:
    """How long to wait, and for what.

    Attributes:
        timeout_s: For one answer, from the first byte sent to the last one read.
        tries: Times a request is sent in all.
        max_wait_s: Longest pause between two tries; a server that asks for a longer one is given
            up on.
        per_minute: Requests begun in a minute, tries included; None for no limit.

    Raises:
        InputError: If a number is not positive.
    """

    timeout_s: float = 600.0
    tries: int = 8
    max_wait_s: float = 120.0
    per_minute: float | None = None

    def __post_init__(self) -> None:
        rules = [
            ("timeout", self.timeout_s > 0, self.timeout_s),
            ("tries", self.tries >= 1, self.tries),
            ("max_wait", self.max_wait_s > 0, self.max_wait_s),
            ("per_minute", self.per_minute is None or self.per_minute > 0, self.per_minute),
        ]
        for name, holds, got in rules:
            if not holds:
                raise InputError(f"`{name}` of an endpoint must be positive, got {got}.")


class EndpointClient:
    """Sends JSON to one endpoint and returns the JSON that it answers; thread-safe.

    Args:
        url: Where the routes begin, such as "https://api.openai.com/v1".
        key: Bearer key; sent over TLS, or to this machine, only.
        patience: How long to wait, and for what.

    Raises:
        InputError: If `url` is not one, or holds what may be a secret; or the key would travel in
            the clear, or cannot be a header.
    """

    def __init__(self, url: str, *, key: str | None = None, patience: Patience | None = None):
        host = check_url(url)
        check_key(url, key)
        self.url = url.rstrip("/")
        self.patience = patience or Patience()
        self._key = key
        self._random = random.Random()
        self._lock = threading.Lock()
        self._next = 0.0
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if host in LOOPBACK:
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to `body` at `route`.

        Raises:
            EndpointError: If the endpoint refuses, or does not answer in all tries.
        """
        patience = self.patience
        started = monotonic()
        for attempt in itertools.count(1):
            self._wait_for_turn()
            try:
                return self._once(route, body)
            except _MayPassError as error:
                failure = error
            if attempt == patience.tries:
                raise EndpointError(
                    f"`endpoint` {self.url}: {failure}; given up after {attempt} tries in "
                    f"{monotonic() - started:.0f} s. What is finished is kept: the same "
                    "command goes on from here."
                )
            wait = self._wait_after(failure, attempt)
            logger.info("endpoint: %s; try %d in %.1f s.", failure, attempt + 1, wait)
            sleep(wait)
        raise AssertionError

    def _wait_after(self, failure: "_MayPassError", attempt: int) -> float:
        """Seconds to wait for the next try; a server that asks for too many is given up on."""
        longest, asked = self.patience.max_wait_s, failure.retry_after_s
        wait = self._random.uniform(0.5, 1) * min(longest, 2.0 ** (attempt - 1))
        if asked is None:
            return wait
        if asked > longest:
            raise EndpointError(
                f"`endpoint` {self.url}: {failure}; it asks to wait {asked:.0f} s, longer than "
                f"{longest:.0f} s. Run the same command later: it goes on from here."
            )
        self._hold(asked)
        return asked + self._random.uniform(0, 0.1) * wait

    def _wait_for_turn(self) -> None:
        """Sleep until the rate, and whatever `_hold` was told, let a request begin."""
        per_minute = self.patience.per_minute
        with self._lock:
            now = monotonic()
            turn = max(now, self._next)
            self._next = turn + (60 / per_minute if per_minute else 0)
        sleep(turn - now)

    def _hold(self, seconds: float) -> None:
        """Begin no request for so long, in any thread."""
        with self._lock:
            self._next = max(self._next, monotonic() + seconds)

    def _once(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer of one try; `_MayPassError` where another may do."""
        headers = {"Content-Type": "application/json", "User-Agent": "sharpen"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + route, data, headers, method="POST")
        deadline = monotonic() + self.patience.timeout_s
        try:
            with self._opener.open(request, timeout=self.patience.timeout_s) as response:
                raw = _read(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error) from None
        # its reason names no header
        except urllib.error.URLError as error:
            raise _MayPassError(f"no connection ({_one_line(str(error.reason))})") from None
        except TimeoutError:
            raise _MayPassError(f"no answer in {self.patience.timeout_s:g} s") from None
        except http.client.IncompleteRead:
            raise _MayPassError("the answer was cut short") from None
        except (OSError, http.client.HTTPException) as error:
            raise _MayPassError(f"the connection broke ({type(error).__name__})") from None
        try:
            answer = json.loads(raw)
        except ValueError:
            raise _MayPassError(f"the answer of {len(raw)} bytes is not whole JSON") from None
        if not isinstance(answer, dict):
            raise EndpointError(
                f"`endpoint` {self.url}: must answer with a JSON object, got "
                f"{type(answer).__name__}; is it an OpenAI-compatible completions endpoint?"
            )
        return answer

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        """What an HTTP status means: another try, or an error with its fix."""
        code = error.code
        try:
            told = _told(error.read(MAX_REFUSAL_BYTES))
        except (OSError, http.client.HTTPException):
            told = ""
        if self._key:
            told = told.replace(self._key, "***")
        what = f"HTTP {code}" + (f" ({told})" if told else "")
        # no later try has more money
        if (code >= 500 or code in MAY_PASS) and "insufficient_quota" not in told:
            return _MayPassError(what, retry_after_s(error.headers))
        fix = {
            401: "check the key in the environment variable that `--endpoint-key-env` names",
            403: "check what the key may do",
            404: "check the URL (it ends where /completions begins) and `--endpoint-model`",
        }.get(code, "check what is asked for")
        if 300 <= code < 400:
            fix = "give the URL that it redirects to"
        return EndpointError(
            f"`endpoint` {self.url}: {what}; {fix}.", of_request=code in OF_REQUEST
        )


class _MayPassError(Exception):
    """A failure worth another try."""

    def __init__(self, message: str, retry_after_s: float | None = None):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    # a None makes it an HTTPError; the parameters are the base class's
    def redirect_request(self, *_args: Any, **_kwargs: Any) -> None:
        """Follow none."""
        return


def _read(response: Any, deadline: float) -> bytes:
    """The whole body, by the deadline: a timeout of a socket begins anew with each byte."""
    parts, size = [], 0
    while part := response.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if monotonic() > deadline:
            raise TimeoutError
        if size > MAX_BODY_BYTES:
            raise EndpointError(f"the endpoint's answer is longer than {MAX_BODY_BYTES} bytes.")
    # `read1` does not tell a body from one that ends early
    if response.length:
        raise http.client.IncompleteRead(b"")
    return b"".join(parts)


def _told(body: bytes) -> str:
    """What a server says of its refusal."""
    text = body.decode("utf-8", "replace")
    try:
        told = json.loads(text)
        told = told.get("error", told)
        if isinstance(told, dict):
            kind = told.get("code") or told.get("type")
            told = f"{told.get('message', told)}" + (f", {kind}" if kind else "")
    except (ValueError, AttributeError):
        told = text
    return _one_line(str(told))


def _one_line(text: str) -> str:
    """Text of a server, fit for a message."""
    return " ".join(text.split())[:300]


def check_url(url: str) -> str:
    """The host of an endpoint's URL.

    Raises:
        InputError: If it is not an http(s) URL, or holds a user, a password or a query, which may
            be secrets and would be written down with the settings of the run.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts, host = urllib.parse.urlsplit(""), None
    if parts.scheme not in ("http", "https") or not host or any(c.isspace() for c in url):
        raise InputError("`endpoint` must be an http:// or https:// URL, such as http://HOST/v1.")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise InputError(
            "`endpoint` must be a URL without user, password, query or fragment; a key belongs "
            "into the environment variable that `--endpoint-key-env` names."
        )
    return host


def check_key(url: str, key: str | None) -> None:
    """Refuse a key that cannot be a header, or that would travel in the clear.

    Raises:
        InputError: If so; the message does not hold it.
    """
    if key is None:
        return
    if not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise InputError("the key of `endpoint` must be printable ASCII without spaces around it.")
    if not url.startswith("https://") and check_url(url) not in LOOPBACK:
        raise InputError(
            f"`endpoint` {url!r} must be https:// when a key is sent: the key would travel in the "
            "clear."
        )


def retry_after_s(headers: Mapping[str, str] | Message, now: float | None = None) -> float | None:
    """Seconds that the headers of an answer ask to wait; None where they do not say.

    Args:
        headers: Of the answer; names in any case as `http.client` has them.
        now: Seconds since the epoch, for a date; default: this moment.

    Example:
        >>> retry_after_s({"Retry-After": "2"})
        2.0
        >>> retry_after_s({"Retry-After": "Thu, 01 Jan 1970 00:01:00 GMT"}, now=50.0)
        10.0
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("Retry-After") or headers.get("retry-after")
    if text is None:
        return None
    seconds = _number(text)
    if seconds is not None:
        return seconds
    try:
        then = email.utils.parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None
    return max(0.0, then - (time.time() if now is None else now))


def _number(text: str | None) -> float | None:
    """A number of seconds, or None where `text` is none."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None
