"""Numbers of a server for Prometheus: requests by path and status, and what the scheduler counts."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from gptjax.serve.service import Service

COUNTERS = {
    "prompt_tokens": "Tokens of prompts, reused ones among them.",
    "reused_tokens": "Tokens of prompts whose keys and values were there already.",
    "generated_tokens": "Tokens of answers.",
    "prefills": "Chunks of prompts that were read.",
    "prefill_seconds": "Time that reading prompts took.",
    "decode_chunks": "Chunks of tokens that all running answers got.",
    "decode_seconds": "Time that these chunks took.",
}
GAUGES = {
    "running": "Answers that are being written.",
    "waiting": "Answers that wait for a slot.",
    "slots": "Answers that can be written at once.",
}


class Monitor:
    """The numbers of one server."""

    def __init__(self, service: Service):
        self._service, self._registry = service, CollectorRegistry()
        self._requests = Counter(
            "gptjax_requests", "Requests that were answered.", ["path", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "gptjax_request_seconds", "Time from a request's headers to the end of its answer.", ["path"],
            registry=self._registry, buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
        )  # fmt: skip
        self._waited = Histogram(
            "gptjax_first_token_seconds", "Time from a request's last byte to its first token.",
            registry=self._registry, buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
        )  # fmt: skip
        self._registry.register(self)  # pyright: ignore[reportArgumentType]

    def note(self, path: str, status: int, seconds: float, waited: float | None) -> None:
        """Counts a request; the path is a route's, so that there are few. `waited` is the time to its first token."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)
        if waited is not None:
            self._waited.observe(waited)

    def collect(self) -> Iterator[Any]:
        """The scheduler's numbers, as they are now."""
        stats: Any = self._service.scheduler.stats
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"gptjax_{name}", text, value=getattr(stats, name))
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"gptjax_{name}", text, value=getattr(stats, name))
        finished = CounterMetricFamily("gptjax_sequences", "Answers by the reason of their end.", labels=["finish"])
        for finish, n in dict(stats.finished).items():
            finished.add_metric([finish], n)
        yield finished
        yield GaugeMetricFamily("gptjax_step", "Step of the checkpoint that answers.", value=self._service.model.step)

    def page(self) -> bytes:
        """All numbers, in Prometheus's text form."""
        return generate_latest(self._registry)
