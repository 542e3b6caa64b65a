"""What `/metrics` shows, in the format of Prometheus."""

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.answers import AnswerWriter
from serving.engine import Engine
from serving.errors import CLIENT_LEFT

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SECONDS_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """
    The metrics of one app, in a registry of its own.

    Args:
        engine ([`Engine`]): tells how busy it is.
    """

    def __init__(self, engine: Engine) -> None:
        registry = CollectorRegistry()
        self.registry = registry
        self.requests = Counter(
            "cosup_requests",
            "Requests by route and status; 499: the client left.",
            ["route", "status"],
            registry=registry,
        )
        self.duration = Histogram(
            "cosup_request_duration_seconds", "Seconds of a request.", ["route"], buckets=SECONDS, registry=registry
        )
        self.first_token = Histogram(
            "cosup_time_to_first_token_seconds",
            "Seconds from a request to the first event of each streamed answer.",
            buckets=SECONDS,
            registry=registry,
        )
        self.per_token = Histogram(
            "cosup_time_per_token_seconds",
            "Mean seconds between the tokens of each streamed answer.",
            buckets=SECONDS_PER_TOKEN,
            registry=registry,
        )
        self.prompt_tokens = Counter("cosup_prompt_tokens", "Tokens of prompts that were answered.", registry=registry)
        self.generated_tokens = Counter("cosup_generated_tokens", "Decided tokens.", registry=registry)
        self.passage_tokens = Counter(
            "cosup_passage_tokens", "Tokens of passages that Gen has read.", registry=registry
        )
        self.retrievals = Counter("cosup_retrievals", "Retrievals.", registry=registry)
        running = Gauge("cosup_requests_running", "Answers that are being generated.", registry=registry)
        running.set_function(lambda: engine.load().running)
        waiting = Gauge("cosup_requests_waiting", "Answers that wait for a slot, and embeddings.", registry=registry)
        waiting.set_function(lambda: engine.load().waiting)

    def text(self) -> bytes:
        """Return the exposition."""
        return generate_latest(self.registry)


class AnswerTimes:
    """
    What the metrics show of one answer.

    Args:
        metrics ([`Metrics`]): of the app.
        is_incremental (`bool`): events come as they happen; otherwise they say nothing about times of tokens.
        num_prompt_tokens (`int`): tokens of the prompt; they count once an event has come, not if it is refused.
    """

    def __init__(self, metrics: Metrics, is_incremental: bool, num_prompt_tokens: int) -> None:
        self.metrics = metrics
        self.is_incremental = is_incremental
        self.num_prompt_tokens = num_prompt_tokens
        self.start = time.perf_counter()
        self.first: float | None = None

    def event(self) -> None:
        """Note that an event has come."""
        if self.first is not None:
            return
        self.first = time.perf_counter()
        self.metrics.prompt_tokens.inc(self.num_prompt_tokens)
        if self.is_incremental:
            self.metrics.first_token.observe(self.first - self.start)

    def end(self, writer: AnswerWriter) -> None:
        """Add the answer, which may have been given up, to the metrics."""
        self.metrics.generated_tokens.inc(writer.num_generated_tokens)
        self.metrics.passage_tokens.inc(writer.num_passage_tokens)
        self.metrics.retrievals.inc(writer.num_retrievals)
        if self.is_incremental and self.first is not None and writer.num_generated_tokens > 1:
            seconds = time.perf_counter() - self.first
            self.metrics.per_token.observe(seconds / (writer.num_generated_tokens - 1))


class MetricsMiddleware:
    """Counts requests by route and status, and observes how long they take."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Sequence[str]) -> None:
        self.app = app
        self.metrics = metrics
        self.routes = frozenset(routes)  # any other path counts as one: clients must not make labels

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = CLIENT_LEFT
        start = time.perf_counter()

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        finally:
            route = scope["path"] if scope["path"] in self.routes else "other"
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.duration.labels(route).observe(time.perf_counter() - start)
