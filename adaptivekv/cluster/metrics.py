"""What the server counts, in Prometheus' text format."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from adaptivekv.cluster.replies import Event

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_BYTES = tuple(float(1 << n) for n in range(20, 41, 2))  # 1 MiB to 1 TiB


class Metrics:
    """Counts of one ingress since it started."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        name = "adaptivekv_"
        self.running = Gauge(name + "requests_running", "Requests with a worker or in its queue", registry=registry)
        self.requests = Counter(name + "requests", "Requests by how they ended", ["status"], registry=registry)
        self.tokens = Counter(name + "tokens", "prompt, cached (of the prompt) and new", ["kind"], registry=registry)
        self.plans = Counter(name + "plans", "Answers by the plan in force at their end", ["plan"], registry=registry)
        self.first = Histogram(
            name + "first_token_seconds", "From arrival to the first text", buckets=_SECONDS, registry=registry
        )
        self.whole = Histogram(name + "request_seconds", "From arrival to the end", buckets=_SECONDS, registry=registry)
        self.bytes = Histogram(
            name + "kv_device_peak_bytes", "Most KV bytes on the device, a request", buckets=_BYTES, registry=registry
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)

    async def watch(self, events: AsyncIterator[Event]) -> AsyncIterator[Event]:
        """A request's events as they are; how it went is counted when they end, whatever ends them."""
        start, status, begun = time.perf_counter(), "left", False  # the client's leaving is the only end without a word
        self.running.inc()
        try:
            async for event in events:
                if not begun and "text" in event:
                    begun = True
                    self.first.observe(time.perf_counter() - start)
                if "done" in event:
                    status = event["done"]["finish_reason"]
                    self._done(event["done"])
                elif "error" in event:
                    status = str(event["status"])
                yield event
        except Exception as error:
            status = str(getattr(error, "status", 500))
            raise
        finally:
            self.running.dec()
            self.requests.labels(status).inc()
            self.whole.observe(time.perf_counter() - start)

    def _done(self, done: dict[str, Any]) -> None:
        usage, kv = done["usage"], done["kv"]
        self.tokens.labels("prompt").inc(usage["prompt_tokens"])
        self.tokens.labels("cached").inc(usage["prompt_tokens_details"]["cached_tokens"])
        self.tokens.labels("new").inc(usage["completion_tokens"])
        self.plans.labels(kv["plan"]).inc()
        self.bytes.observe(kv["kv_bytes"]["device_peak"])
