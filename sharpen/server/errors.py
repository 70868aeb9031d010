"""Errors of the HTTP API: a status, one line of text, and the body that OpenAI's clients read."""

from typing import Any

from sharpen.errors import SharpenError

# characters; an error that quotes its request must not be as large
MAX_MESSAGE, MAX_PARAM = 1000, 100
TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class HTTPError(SharpenError):
    """A request that is rejected.

    Attributes:
        status: The HTTP status.
        message: One line, shortened if it is very long: name, wanted, got, fix.
        param: The field at fault, or None.
        code: A word for programs.
        retry_after: Whole seconds after which the same request may succeed, or None.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str = "invalid_request",
        retry_after: int | None = None,
    ):
        message = _shortened(message, MAX_MESSAGE)
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = None if param is None else _shortened(param, MAX_PARAM)
        self.code = code
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response, beside those of its body."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        # the rest of a slow body may still arrive, and a server that ends reads nothing more
        if self.status in (408, 503):
            headers["Connection"] = "close"
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers

    @property
    def body(self) -> dict[str, Any]:
        """Body of the response, in OpenAI's shape."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }


def shutting_down() -> HTTPError:
    """503; another server may listen here soon."""
    return HTTPError(503, "the server is shutting down.", code="shutting_down", retry_after=1)


def bad_field(field: str, wanted: str, got: object, fix: str = "") -> HTTPError:
    """422: a field with a value that is not accepted."""
    is_plain = isinstance(got, (str, int, float, bool, type(None)))
    shown = _shortened(repr(got), 60) if is_plain else type(got).__name__
    end = f"; {fix}." if fix else "."
    message = f"`{field}` must be {wanted}, got {shown}{end}"
    return HTTPError(422, message, param=field, code="bad_field")


def check_unicode(text: str, field: str) -> None:
    """Reject a text that cannot be written as UTF-8, with 422."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise HTTPError(
            422,
            f"`{field}` must be valid Unicode, got half of a surrogate pair at character "
            f"{error.start}; encode the text again.",
            param=field,
            code="bad_field",
        ) from error


def http_error_of(error: Exception) -> HTTPError:
    """The response to a request whose parsing or scoring raised `error`."""
    if isinstance(error, HTTPError):
        return error
    reason = " ".join(str(error).split())
    if isinstance(error, SharpenError):
        return HTTPError(422, reason, code="invalid_input")
    if "out of memory" in reason.lower() or isinstance(error, MemoryError):
        message = "the request alone needs more memory than the device has; send fewer tokens."
        return HTTPError(413, message, code="out_of_memory")
    message = f"scoring failed ({type(error).__name__}: {reason[:200]})."
    return HTTPError(500, message, code="scoring_failed")


def _shortened(text: str, n: int) -> str:
    return text if len(text) <= n else text[: n - 3] + "..."
