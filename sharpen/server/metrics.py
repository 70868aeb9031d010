"""Bytes that requests hold while they are inside the server, bounded all together.

What `/metrics` tells, in the words of Prometheus.
"""

from typing import Any

from .batcher import Batch, MicroBatcher
from .dialect import Cause
from .schemas import ServerLimits, needed


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


SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        prometheus = needed("prometheus_client")
        self._prometheus = prometheus
        self._registry = registry = prometheus.CollectorRegistry()

        # each metric is a class of a package that type checks do without
        def made(kind: str, name: str, text: str, *labels: str, **more: Any) -> Any:
            kind_of = getattr(prometheus, kind)
            return kind_of(f"sharpen_{name}", text, labels, registry=registry, **more)

        self._requests = made("Counter", "requests", "Requests answered.", "route", "status")
        self._seconds = made(
            "Histogram", "request_seconds", "From a request's head to its answer.", "route",
            buckets=SECONDS,
        )  # fmt: skip
        self._abandoned = made("Counter", "abandoned", "Requests whose client went away.")
        self._unscorable = made(
            "Counter", "unscorable", "Samples that got the reward of `--unscorable-reward`.",
            "cause",
        )  # fmt: skip
        self._waiting = made("Gauge", "queue_prompts", "Prompts that wait for the scorer.")
        self._inside = made("Gauge", "requests_inside", "Requests not answered yet, this one too.")
        self._bytes = made("Gauge", "inside_bytes", "Bytes of their bodies, and of answers sent.")
        self._calls = made("Histogram", "batch_prompts", "Distinct prompts a call.", buckets=SIZES)
        self._jobs = made("Histogram", "batch_jobs", "Jobs a call of the scorer.", buckets=SIZES)
        self._completions = made("Counter", "completions", "Completions scored.")
        self._tokens = made("Counter", "tokens", "Tokens scored, a shared prompt once.")
        self._busy = made("Counter", "scorer_seconds", "Seconds inside the scorer.")

    def watch(self, batcher: MicroBatcher) -> None:
        """Tell the length of its queue."""
        self._waiting.set_function(lambda: batcher.n_waiting)

    def watch_inside(self, inside: Inside) -> None:
        """Tell how many requests are inside, and what they hold."""
        self._inside.set_function(lambda: inside.n_requests)
        self._bytes.set_function(lambda: inside.n_bytes)

    def batch(self, batch: Batch) -> None:
        """One call of the scorer."""
        self._calls.observe(batch.n_prompts)
        self._jobs.observe(batch.n_jobs)
        self._completions.inc(batch.n_completions)
        self._tokens.inc(batch.n_tokens)
        self._busy.inc(batch.seconds)

    def request(self, route: str, status: int, seconds: float) -> None:
        """One answer."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def abandoned(self) -> None:
        """One client that did not wait for its answer."""
        self._abandoned.inc()

    def unscorable(self, cause: Cause) -> None:
        """One sample that was not rated, and got the reward that was chosen for these."""
        self._unscorable.labels(cause).inc()

    def text(self) -> tuple[bytes, str]:
        """Everything, and its content type."""
        return (
            self._prometheus.generate_latest(self._registry),
            self._prometheus.CONTENT_TYPE_LATEST,
        )
