"""Metrics of a running server in Prometheus' text format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from space_cli.server.shapes import Json
    from space_cli.server.shelf import Shelf
    from space_cli.server.work import Worker

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """The counters and histograms."""

    def __init__(self, worker: Worker, shelf: Shelf) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, description: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"space_{name}", description, labels, registry=self._registry)

        def gauge(name: str, description: str) -> Gauge:
            return Gauge(f"space_{name}", description, registry=self._registry)

        def histogram(name: str, description: str) -> Histogram:
            return Histogram(f"space_{name}", description, buckets=_SECONDS, registry=self._registry)

        self.requests = counter("requests", "Requests by path and status.", ("path", "status"))
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = counter("cached_tokens", "Tokens of prompts that were in a cache.")
        self.tokens = counter("tokens", "Tokens of answers.")
        self.steps = counter("steps", "Model calls for answers.")
        self.accepted = counter("accepted_drafts", "Guessed tokens that were accepted.")
        self.rejected = counter("rejected_drafts", "Guessed tokens that were not.")
        self.first = histogram("first_token_seconds", "From a request to its first token.")
        self.seconds = histogram("request_seconds", "From a request to the end of its answer.")
        gauge("requests_waiting", "Requests in the queue.").set_function(lambda: worker.waiting)
        gauge("requests_active", "Number of running requests.").set_function(lambda: worker.active)
        gauge("models_loaded", "Models in memory.").set_function(lambda: len(shelf.loaded))
        gauge("cache_bytes", "Keys and values at rest.").set_function(
            lambda: sum(model.cache_bytes for model in shelf.loaded)
        )

    def count(self, usage: Json, steps: int) -> None:
        """Count the answers to a request."""
        drafts = usage["completion_tokens_details"]
        self.prompt_tokens.inc(usage["prompt_tokens"])
        self.cached_tokens.inc(usage["prompt_tokens_details"]["cached_tokens"])
        self.tokens.inc(usage["completion_tokens"])
        self.steps.inc(steps)
        self.accepted.inc(drafts["accepted_prediction_tokens"])
        self.rejected.inc(drafts["rejected_prediction_tokens"])

    def text(self) -> bytes:
        """Return all of it."""
        return generate_latest(self._registry)
