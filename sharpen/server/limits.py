"""How much one request may ask for, and how much may wait."""

from dataclasses import dataclass, fields

from sharpen.errors import InputError

from .refusal import RefusedError

# requests of the largest size that may be inside together; chosen
N_INSIDE = 32
# far more than tokens of text have; chosen, so that no text of the context is refused by its size
CHARS_PER_TOKEN = 256


@dataclass(frozen=True)
class ServerLimits:
    """Bounds of a request and of the queue; the defaults were chosen, not measured.

    Attributes:
        max_request_bytes: Body of a request.
        max_request_tokens: Tokens of all prompts and completions of a request.
        max_n: Completions, or prompts, of a request.
        max_queue: Prompts with their completions that may wait; a request that would make them
            more is told to come back, unless none waits.
    """

    max_request_bytes: int = 8 * 2**20
    max_request_tokens: int = 262_144
    max_n: int = 512
    max_queue: int = 1024

    def __post_init__(self) -> None:
        """Refuse a limit that nothing could keep to.

        Raises:
            InputError: If one is below 1.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 1:
                raise InputError(f"`{field.name}` must be at least 1, got {value}.")

    def max_chars(self, context: int | None) -> int:
        """Characters that a text may have to be tokenised at all.

        Args:
            context: Tokens that the model can read; None if it has no limit.
        """
        n_tokens = self.max_request_tokens if context is None else context
        return CHARS_PER_TOKEN * min(n_tokens, self.max_request_tokens)

    def check_bytes(self, n_bytes: int) -> None:
        """Refuse a body that is too large; `n_bytes` may be what has come of it so far.

        Raises:
            RefusedError: 413.
        """
        if n_bytes > self.max_request_bytes:
            raise RefusedError(
                413,
                f"a request must be at most {self.max_request_bytes} bytes, got {n_bytes} or more; "
                "send several, or start the server with a larger `--max-request-bytes`.",
                code="request_too_large",
            )

    def check_inside(self, n_bytes: int) -> None:
        """Refuse a body that would make the bytes inside too many.

        Raises:
            RefusedError: 429.
        """
        most = N_INSIDE * self.max_request_bytes
        if n_bytes > most:
            raise RefusedError(
                429,
                f"requests inside hold more than {most} bytes already, {N_INSIDE} times "
                "`--max-request-bytes`; send it again later.",
                code="too_many_bytes",
                retry_after=1,
            )

    def check_n(self, field: str, n: int) -> None:
        """Refuse too many completions or prompts.

        Raises:
            RefusedError: 422.
        """
        if n > self.max_n:
            raise RefusedError(
                422,
                f"`{field}` must hold at most {self.max_n}, got {n}; send several requests, or "
                "start the server with a larger `--max-n`.",
                param=field,
                code="too_many",
            )

    def check_tokens(self, n_tokens: int) -> None:
        """Refuse too many tokens.

        Raises:
            RefusedError: 413.
        """
        if n_tokens > self.max_request_tokens:
            raise RefusedError(
                413,
                f"a request must have at most {self.max_request_tokens} tokens, prompts and "
                f"completions together, got {n_tokens}; send several, or start the server with a "
                "larger `--max-request-tokens`.",
                code="too_many_tokens",
            )
