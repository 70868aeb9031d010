"""What `/metrics` tells, in the words of Prometheus."""

from collections.abc import Callable
from functools import partial

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from .batcher import Batch
from .unscorable import Cause

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        counter = partial(Counter, namespace="sharpen", registry=self._registry)
        histogram = partial(Histogram, namespace="sharpen", registry=self._registry)

        self._requests = counter("requests", "Requests answered.", ("route", "status"))
        text = "From a request's head to its answer."
        self._seconds = histogram("request_seconds", text, ("route",), buckets=SECONDS)
        self._abandoned = counter("abandoned", "Requests whose client went away.")
        text = "Samples that got the reward of `--unscorable-reward`."
        self._unscorable = counter("unscorable", text, ("cause",))
        self._calls = histogram("batch_prompts", "Distinct prompts a call.", buckets=SIZES)
        self._jobs = histogram("batch_jobs", "Jobs a call of the scorer.", buckets=SIZES)
        self._completions = counter("completions", "Completions scored.")
        self._tokens = counter("tokens", "Tokens scored, a shared prompt once.")
        self._busy = counter("scorer_seconds", "Seconds inside the scorer.")

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Tell `value()` as the gauge `sharpen_{name}`."""
        Gauge(name, text, namespace="sharpen", registry=self._registry).set_function(value)

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
        """One sample that had no reward, and got the number that was chosen for these."""
        self._unscorable.labels(cause).inc()

    def text(self) -> tuple[bytes, str]:
        """Everything, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
