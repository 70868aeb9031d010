"""What `/metrics` tells, in the words of Prometheus."""

from typing import Any

from .calls import Batch
from .inside import Inside
from .micro_batcher import MicroBatcher
from .optional import needed
from .unscorable import Cause

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
