"""Bytes that requests hold while they are inside the server, bounded all together."""

from .limits import ServerLimits


class Inside:
    """Requests that are inside and the bytes they hold; used from one event loop alone.

    Attributes:
        n_requests: That were let in and are not answered yet.
        n_bytes: Of their bodies, and of answers that are being sent.
    """

    def __init__(self, limits: ServerLimits):
        self.n_requests = 0
        self.n_bytes = 0
        self._limits = limits

    def enter(self) -> "Held":
        """One more request, until its `leave`."""
        self.n_requests += 1
        return Held(self, self._limits)


class Held:
    """What one request holds."""

    def __init__(self, inside: Inside, limits: ServerLimits):
        self._inside = inside
        self._limits = limits
        self._n_body = 0
        self._n_answer = 0

    def check(self, n_bytes: int) -> None:
        """Refuse a body that says it has so many.

        Raises:
            RefusedError: As `receive`.
        """
        self._limits.check_bytes(n_bytes)
        self._limits.check_inside(self._inside.n_bytes + n_bytes)

    def receive(self, n_bytes: int) -> None:
        """More of its body has come.

        Raises:
            RefusedError: 413 if the body is too large, 429 if all together are.
        """
        self._limits.check_bytes(self._n_body + n_bytes)
        self._limits.check_inside(self._inside.n_bytes + n_bytes)
        self._n_body += n_bytes
        self._inside.n_bytes += n_bytes

    def send(self, n_bytes: int) -> None:
        """More of its answer is on its way; what was worked for is never refused."""
        self._n_answer += n_bytes
        self._inside.n_bytes += n_bytes

    def leave(self) -> None:
        """It is answered."""
        self._inside.n_requests -= 1
        self._inside.n_bytes -= self._n_body + self._n_answer
