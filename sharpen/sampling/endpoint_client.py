"""JSON over HTTP to one endpoint: retried with backoff, paced, bounded in time and size.

A failure that may pass (no connection, a timeout, a body cut short, HTTP 408, 409, 425, 429 and
5xx) is tried again after

    wait = U(0.5, 1) * min(max_wait, 2^try) s,  and never before the server's `Retry-After`

and a `Retry-After` holds back every thread, not only the one that was told. Redirects are not
followed: they would carry the key to another host. The key is in one header and nowhere else: not
in a message, a log, or on disk.
"""

import http.client
import itertools
import json
import logging
import random
import threading
import urllib.error
import urllib.parse
import urllib.request
from time import monotonic, sleep
from typing import Any

from sharpen.errors import ServiceError

from .endpoint_config import LOOPBACK, Patience, check_key, check_url
from .retry_after import retry_after_s

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 1 << 28
MAY_PASS = (408, 409, 425, 429)
# of the request that was sent, not of the server: others may still be answered
OF_REQUEST = (400, 413, 414, 422)


class EndpointError(ServiceError):
    """What an endpoint did wrong.

    Attributes:
        of_request: Whether only this request is refused, and others may be answered.
    """

    def __init__(self, message: str, *, of_request: bool = False):
        super().__init__(message)
        self.of_request = of_request


class EndpointClient:
    """Sends JSON to one endpoint and returns the JSON that it answers; thread-safe.

    Args:
        url: Where the routes begin, such as "https://api.openai.com/v1".
        key: Bearer key; sent over TLS, or to this machine, only.
        patience: See there.

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
            wait = self._random.uniform(0.5, 1) * min(patience.max_wait_s, 2.0 ** (attempt - 1))
            if failure.retry_after_s is not None:
                if failure.retry_after_s > patience.max_wait_s:
                    raise EndpointError(
                        f"`endpoint` {self.url}: {failure}; it asks to wait "
                        f"{failure.retry_after_s:.0f} s, longer than {patience.max_wait_s:.0f} s. "
                        "Run the same command later: it goes on from here."
                    )
                self._hold(failure.retry_after_s)
                wait = failure.retry_after_s + self._random.uniform(0, 0.1) * wait
            log.info("endpoint: %s; try %d in %.1f s.", failure, attempt + 1, wait)
            sleep(wait)
        raise AssertionError

    def _wait_for_turn(self) -> None:
        per_minute = self.patience.per_minute
        with self._lock:
            now = monotonic()
            turn = max(now, self._next)
            self._next = turn + (60 / per_minute if per_minute else 0)
        sleep(turn - now)

    def _hold(self, seconds: float) -> None:
        with self._lock:
            self._next = max(self._next, monotonic() + seconds)

    def _once(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
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
        code = error.code
        try:
            told = _told(error.read(1 << 14))
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
    return " ".join(text.split())[:300]
