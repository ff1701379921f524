"""Measure a model that FastAPI serves. Copy this file into a service, as README.md says.

Read it from top to bottom: metrics, requests, model calls, /metrics.
"""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# ------------------------------------------------------------------- Metrics

# Otherwise each counter and histogram has one more series, for the time of its creation.
disable_created_metrics()  # type: ignore[no-untyped-call]

LABELS = {"model_name": "fraud_model", "version": os.environ.get("MODEL_VERSION", "v1")}

# labels() creates each series at 0 before the first request, as Prometheus cannot see an increase
# from nothing to 1.
REQUESTS = Counter(
    "ml_predictions_total",
    "Requests for a prediction, including failed ones.",
    labelnames=list(LABELS),
).labels(**LABELS)

ERRORS = Counter(
    "ml_prediction_errors_total",
    "Failed requests for a prediction, by reason.",
    labelnames=[*LABELS, "reason"],
)
INVALID_INPUT = ERRORS.labels(**LABELS, reason="invalid_input")
REFUSED = ERRORS.labels(**LABELS, reason="refused")
MODEL_FAILURE = ERRORS.labels(**LABELS, reason="model_failure")
OTHER_FAILURE = ERRORS.labels(**LABELS, reason="other_failure")

IN_PROGRESS = Gauge(
    "ml_predictions_in_progress",
    "Model calls in progress.",
    labelnames=list(LABELS),
).labels(**LABELS)

DURATION = Histogram(
    "ml_prediction_duration_seconds",
    "Duration of model calls in seconds, including failed ones.",
    labelnames=list(LABELS),
    buckets=[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10],
).labels(**LABELS)

SCORE = Histogram(
    "ml_prediction_score",
    "Probability of fraud of each prediction, from 0 to 1.",
    labelnames=list(LABELS),
    buckets=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1],
).labels(**LABELS)

# ------------------------------------------------------------------ Requests


@dataclass
class Outcome:
    """What is known of a request so far."""

    status: int = 500  # Until its answer begins.
    is_complete: bool = False  # Whether its answer was sent to the end.
    model_failed: bool = False


# Each request sets its own. Threads that work for it see the same.
current_outcome: ContextVar[Outcome] = ContextVar("current_outcome")


class CountRequests:
    """Count each request to the given paths once, when it ends, by how it ended.

    Paths are those of the routes, with the prefixes of routers: /api/predict, /{model}/predict.
    Add it after all other middlewares, so that it sees what they answer.
    """

    def __init__(self, app: ASGIApp, paths: Collection[str]) -> None:
        self.app = app
        self.patterns = [compile_path(path)[0] for path in paths]  # [0] is the regex.

    def is_counted(self, scope: Scope) -> bool:
        """Whether this is a request to one of the paths, other than the preflight of a browser."""
        if scope["type"] != "http" or scope["method"] == "OPTIONS":
            return False
        # Compared without the prefix that a proxy or a mount puts before the path.
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        return any(pattern.match(path) for pattern in self.patterns)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the service answer, and watch how."""
        if not self.is_counted(scope):
            await self.app(scope, receive, send)
            return

        outcome = Outcome()
        current_outcome.set(outcome)

        async def send_and_note(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.start":
                outcome.status = message["status"]
            if message["type"] == "http.response.body":
                outcome.is_complete = not message.get("more_body", False)

        try:
            await self.app(scope, receive, send_and_note)
        except BaseException:
            outcome.is_complete = False  # Even if a background task failed behind the answer.
            raise
        finally:
            count(outcome)


def count(outcome: Outcome) -> None:
    """Count a request that has ended, and why it failed, if it did."""
    REQUESTS.inc()
    if outcome.model_failed:
        MODEL_FAILURE.inc()
    elif outcome.status >= 500 or not outcome.is_complete:
        OTHER_FAILURE.inc()
    elif outcome.status in (400, 413, 415, 422):
        INVALID_INPUT.inc()
    elif outcome.status >= 400:
        REFUSED.inc()


# --------------------------------------------------------------- Model calls


@contextmanager
def model_call() -> Iterator[None]:
    """Measure a call of the model: `with model_call(): score = model.predict(payment)`.

    Whatever the block raises is a failure of the model, whatever the answer is. It passes through.
    """
    with IN_PROGRESS.track_inprogress(), DURATION.time():
        try:
            yield
        except BaseException:
            # Outside of a counted request, this marks an Outcome that nobody reads.
            current_outcome.get(Outcome()).model_failed = True
            raise


# ------------------------------------------------------------------ /metrics


async def metrics(_: Request) -> Response:
    """Answer with all metrics in Prometheus's text format."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
