"""How much one request may ask for, and how many bytes all of them may hold at a time."""

from dataclasses import asdict, dataclass

from sharpen.errors import check_value

from .errors import HTTPError

# requests of the largest size that may be in flight together; chosen
N_INSIDE = 32
# far more than tokens of text have; chosen, so that no text that fits the context is rejected
CHARS_PER_TOKEN = 256


@dataclass(frozen=True)
class ServerLimits:
    """Bounds of a request and of the queue; the defaults were chosen, not measured.

    Attributes:
        max_request_bytes: Body of a request.
        max_request_tokens: Tokens of all prompts and completions of a request.
        max_n: Completions, or prompts, of a request.
        max_queue: Prompts with their completions that may wait. A request that has more is accepted
            only while the queue is empty.
    """

    max_request_bytes: int = 8 * 2**20
    max_request_tokens: int = 262_144
    max_n: int = 512
    max_queue: int = 1024

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check_value(name, value, value >= 1, "at least 1")

    def max_chars(self, context: int | None) -> int:
        """Characters of a text that is tokenised at all.

        Args:
            context: Tokens that the model can read; None if it has no limit.
        """
        n_tokens = self.max_request_tokens if context is None else context
        return CHARS_PER_TOKEN * min(n_tokens, self.max_request_tokens)

    def check_bytes(self, n_bytes: int) -> None:
        """Reject a body with 413; `n_bytes` may be what has arrived of it so far."""
        if n_bytes > self.max_request_bytes:
            raise HTTPError(
                413,
                f"a request must be at most {self.max_request_bytes} bytes, got {n_bytes} or more; "
                "send several, or start the server with a larger `--max-request-bytes`.",
                code="request_too_large",
            )

    def check_bytes_in_flight(self, n_bytes: int) -> None:
        """Reject a body with 429 that would make the bytes in flight too many."""
        most = N_INSIDE * self.max_request_bytes
        if n_bytes > most:
            raise HTTPError(
                429,
                f"requests in flight hold more than {most} bytes already, {N_INSIDE} times "
                "`--max-request-bytes`; send it again later.",
                code="too_many_bytes",
                retry_after=1,
            )

    def check_n(self, field: str, n: int) -> None:
        """Reject too many completions or prompts, with 422."""
        if n > self.max_n:
            raise HTTPError(
                422,
                f"`{field}` must hold at most {self.max_n}, got {n}; send several requests, or "
                "start the server with a larger `--max-n`.",
                param=field,
                code="too_many",
            )

    def check_tokens(self, n_tokens: int) -> None:
        """Reject too many tokens, with 413."""
        if n_tokens > self.max_request_tokens:
            raise HTTPError(
                413,
                f"a request must have at most {self.max_request_tokens} tokens, prompts and "
                f"completions together, got {n_tokens}; send several, or start the server with a "
                "larger `--max-request-tokens`.",
                code="too_many_tokens",
            )


class InFlight:
    """Requests that are accepted and not answered, and their bytes; used from one event loop.

    Attributes:
        n_requests: How many.
        n_bytes: Of their bodies, and of answers that are being sent.
    """

    def __init__(self, limits: ServerLimits):
        self.n_requests = 0
        self.n_bytes = 0
        self.limits = limits

    def enter(self) -> "RequestUsage":
        """One more request, until its `leave`."""
        self.n_requests += 1
        return RequestUsage(self)


class RequestUsage:
    """The bytes that one request holds."""

    def __init__(self, all_of_them: InFlight):
        self._all = all_of_them
        self._n_body = 0
        self._n_answer = 0

    def check(self, n_more: int) -> None:
        """Reject a body that has `n_more` bytes yet to come: 413 for its own size, 429 for all."""
        self._all.limits.check_bytes(self._n_body + n_more)
        self._all.limits.check_bytes_in_flight(self._all.n_bytes + n_more)

    def receive(self, n_bytes: int) -> None:
        """Count a part of the body, or reject it as `check` does."""
        self.check(n_bytes)
        self._n_body += n_bytes
        self._all.n_bytes += n_bytes

    def send(self, n_bytes: int) -> None:
        """Count a part of the answer; what is computed already is never rejected."""
        self._n_answer += n_bytes
        self._all.n_bytes += n_bytes

    def leave(self) -> None:
        """The request is answered."""
        self._all.n_requests -= 1
        self._all.n_bytes -= self._n_body + self._n_answer
