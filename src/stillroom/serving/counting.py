"""Numbers for Prometheus (extra ``serve``): requests, seconds, batches, and what reached the teacher."""

from __future__ import annotations

from typing import Any

from stillroom.errors import missing_extra

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Counts:
    """The counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise missing_extra("prometheus-client", "serve") from error
        self._library: Any = prometheus
        self.registry = prometheus.CollectorRegistry()
        own: Any = {"registry": self.registry}
        self.requests = prometheus.Counter(
            "stillroom_requests", "Requests by path and status", ["path", "status"], **own
        )
        self.seconds = prometheus.Histogram(
            "stillroom_request_seconds", "From the first byte to the last", ["path"], buckets=SECONDS, **own
        )
        self.open = prometheus.Gauge("stillroom_open_requests", "Requests that are being answered", **own)
        self.batches = prometheus.Histogram("stillroom_batch_size", "Questions answered together", buckets=SIZES, **own)
        self.answers = prometheus.Counter("stillroom_answers", "Answers by who gave them", ["by"], **own)

    def text(self) -> tuple[bytes, str]:
        """The page for Prometheus, and its content type."""
        return self._library.generate_latest(self.registry), self._library.CONTENT_TYPE_LATEST
