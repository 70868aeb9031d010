"""What the server says no with: a status, one line, and OpenAI's shape of an error."""

from typing import Any

from sharpen.errors import SharpenError

# characters; a refusal that quotes its request must not be as large
LONGEST = 1000
TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class RefusedError(SharpenError):
    """A request that is not answered.

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
        message = _shortened(message, LONGEST)
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = None if param is None else _shortened(param, 100)
        self.code = code
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """What goes beside the body."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        # of a body that came too slowly more may follow, of a server that ends nothing
        if self.status in (408, 503):
            headers["Connection"] = "close"
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read an error."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }


def shutting_down() -> RefusedError:
    """What everybody is told who is not answered any more; another server may be there soon."""
    return RefusedError(503, "the server is shutting down.", code="shutting_down", retry_after=1)


def refusal_of(error: Exception) -> RefusedError:
    """What a client is told of an error that came out of scoring or of reading its request."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, SharpenError):
        return RefusedError(422, " ".join(str(error).split()), code="invalid_input")
    reason = " ".join(str(error).split())[:200]
    if "out of memory" in reason.lower() or isinstance(error, MemoryError):
        message = "the request alone needs more memory than the device has; send fewer tokens."
        return RefusedError(413, message, code="out_of_memory")
    return RefusedError(
        500, f"scoring failed ({type(error).__name__}: {reason}).", code="scoring_failed"
    )


def _shortened(text: str, n: int) -> str:
    return text if len(text) <= n else text[: n - 3] + "..."
