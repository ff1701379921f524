"""A fraud model served by FastAPI and measured with Prometheus.

Read it from top to bottom: settings, metrics, model, API.
"""

import asyncio
import logging
import math
import os
import random
import sys
from typing import Literal

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from pydantic import BaseModel, ConfigDict, Field, ValidationError

# ------------------------------------------------------------------ Settings


class Settings(BaseModel):
    """Read from environment variables of the same names."""

    model_config = ConfigDict(str_strip_whitespace=True)  # So that " " is no name.

    FAILURE_RATE: float = Field(default=0.1, ge=0, le=1)
    MODEL_LATENCY_SECONDS: float = Field(default=0.05, ge=0, le=5)
    MODEL_NAME: str = Field(default="fraud_model", min_length=1)
    MODEL_VERSION: str = Field(default="v1", min_length=1)


try:
    settings = Settings.model_validate(dict(os.environ))
except ValidationError as error:
    mistakes = [f"{e['loc'][0]}={e['input']!r}: {e['msg']}" for e in error.errors()]
    sys.exit("\n".join(mistakes))  # Prints them, a line each, and ends with status 1.

# ------------------------------------------------------------------- Metrics

# Otherwise each counter and histogram has one more series, for the time of its creation.
disable_created_metrics()  # type: ignore[no-untyped-call]

LABELS = {"model_name": settings.MODEL_NAME, "version": settings.MODEL_VERSION}

# labels() creates each series at 0 before the first request, as Prometheus cannot see an increase
# from nothing to 1.
REQUESTS = Counter(
    "ml_predictions_total",
    "Requests for a prediction, including failed ones.",
    labelnames=list(LABELS),
).labels(**LABELS)

# No labels() here: ERRORS has one series for each reason.
ERRORS = Counter(
    "ml_prediction_errors_total",
    "Failed requests for a prediction, by reason.",
    labelnames=[*LABELS, "reason"],
)
INVALID_INPUT = ERRORS.labels(**LABELS, reason="invalid_input")
MODEL_FAILURE = ERRORS.labels(**LABELS, reason="model_failure")

IN_PROGRESS = Gauge(
    "ml_predictions_in_progress",
    "Model calls in progress.",
    labelnames=list(LABELS),
).labels(**LABELS)

# One bucket ends at 0.25 s, so that the alert HighLatency, whose limit this is, is exact.
DURATION = Histogram(
    "ml_prediction_duration_seconds",
    "Duration of model calls in seconds, including failed ones.",
    labelnames=list(LABELS),
    buckets=[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10],
).labels(**LABELS)

# A score over this is fraud. .prometheus/rules.yml reads the bucket that ends here: change both.
THRESHOLD = 0.5
SCORE = Histogram(
    "ml_prediction_score",
    "Probability of fraud of each prediction, from 0 to 1.",
    labelnames=list(LABELS),
    buckets=sorted({0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, THRESHOLD}),
).labels(**LABELS)

# --------------------------------------------------------------------- Model


class Transaction(BaseModel):
    """A payment that may be fraud."""

    model_config = ConfigDict(strict=True, extra="forbid")  # No "12" for 12, no misspelt field.

    amount: float = Field(ge=0, le=1_000_000, examples=[42.5], description="In US dollars.")
    international: bool = Field(default=False, description="Whether the money leaves the country.")


async def infer(transaction: Transaction) -> float:
    """Return the probability of fraud, from 0 to 1. Put a model of your own here.

    If it blocks, call it with asyncio.to_thread. Otherwise all other requests wait for it. If it
    is a real one, take simulate_latency_and_failures out of predict.
    """
    # A logistic regression with made-up weights.
    logit = math.log1p(transaction.amount) + 1.1 * transaction.international - 6.5
    return 1 / (1 + math.exp(-logit))


class SimulatedError(Exception):
    """A failure that FAILURE_RATE asks for."""


async def simulate_latency_and_failures() -> None:
    """Take about MODEL_LATENCY_SECONDS, and raise SimulatedError at the rate FAILURE_RATE."""
    # Some calls take much longer than most. With this sigma, 1% exceed three times the median.
    factor = random.lognormvariate(mu=0, sigma=0.472)
    await asyncio.sleep(settings.MODEL_LATENCY_SECONDS * factor)
    if random.random() < settings.FAILURE_RATE:
        raise SimulatedError


# ----------------------------------------------------------------------- API


class Prediction(BaseModel):
    """What the model says of a transaction."""

    score: float = Field(ge=0, le=1, description=f"Probability of fraud. Over {THRESHOLD}: fraud.")
    prediction: Literal["fraud", "legit"]
    model_name: str
    version: str


class ErrorResponse(BaseModel):
    """What went wrong."""

    detail: str


logger = logging.getLogger("uvicorn.error")  # Despite its name, the one that uvicorn prints.

app = FastAPI(title="Fraud model")


@app.post(
    "/predict",
    max_body_size=4 * 1024,  # Bytes, or the answer is 413. A transaction has fewer than 100.
    # For the documentation, to which FastAPI adds 422 itself.
    responses={status: {"model": ErrorResponse} for status in (400, 413, 415, 500)},
)
async def predict(transaction: Transaction) -> Prediction:
    """Say whether a transaction is fraud."""
    try:
        with (
            MODEL_FAILURE.count_exceptions(BaseException),  # CancelledError is no Exception.
            IN_PROGRESS.track_inprogress(),  # Down again, however the call ends.
            DURATION.time(),  # Failed calls are timed, too.
        ):
            # One float for the answer and the metrics, even if the model returns np.float32.
            score = float(await infer(transaction))
            await simulate_latency_and_failures()
            # A score that is not from 0 to 1 raises ValidationError: a failure of the model, too.
            prediction = Prediction(
                score=score,
                prediction="fraud" if score > THRESHOLD else "legit",
                model_name=settings.MODEL_NAME,
                version=settings.MODEL_VERSION,
            )
    except Exception as error:
        # A simulated failure needs no traceback.
        with_traceback = not isinstance(error, SimulatedError)
        logger.error("The model failed: %s", type(error).__name__, exc_info=with_traceback)
        # If the model raises this very object again, Python would add to its traceback each time.
        error.__traceback__ = None
        raise HTTPException(500, "The model failed. The log says why.") from error
    finally:
        REQUESTS.inc()
    SCORE.observe(score)
    return prediction


def count_invalid_input(request: Request) -> None:
    """Count a request for a prediction that was refused before it reached predict."""
    # The handlers below answer for all routes. Compare the endpoint, as a path may have a prefix.
    if request.scope.get("endpoint") is predict:
        REQUESTS.inc()
        INVALID_INPUT.inc()


@app.exception_handler(RequestValidationError)
async def refuse_invalid_input(request: Request, error: RequestValidationError) -> Response:
    """Answer 422 with what is wrong and where, or 415 if the body is not sent as JSON."""
    count_invalid_input(request)
    # FastAPI parses only a body that is sent as JSON. Any other is still bytes.
    if isinstance(error.body, bytes):
        return JSONResponse({"detail": "Send the header Content-Type: application/json."}, 415)
    # Without "input": it may be NaN, which JSON cannot hold.
    detail = [{"type": e["type"], "loc": e["loc"], "msg": e["msg"]} for e in error.errors()]
    return JSONResponse({"detail": detail}, 422)


@app.exception_handler(400)
@app.exception_handler(413)
async def refuse_body(request: Request, error: HTTPException) -> Response:
    """Count a body that cannot be read (400) or is too large (413). Answer as FastAPI does."""
    count_invalid_input(request)
    return await http_exception_handler(request, error)


@app.get("/metrics", include_in_schema=False)
async def metrics() -> Response:
    """Answer with all metrics in Prometheus's text format."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


@app.get("/health")
async def health() -> dict[str, str]:
    """Say that the service is up."""
    return {"status": "ok"}


@app.get("/", include_in_schema=False)
async def root(request: Request) -> RedirectResponse:
    """Lead to the interactive documentation."""
    return RedirectResponse(request.scope["root_path"] + "/docs")


if __name__ == "__main__":
    uvicorn.run(app, workers=1, ws="none")  # Dockerfile says why.
