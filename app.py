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

from fastapi import FastAPI, Request, Response
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException  # FastAPI raises this one and its subclass.

# ------------------------------------------------------------------ Settings


class Settings(BaseModel):
    """Environment variables of these names. Each description completes the message below."""

    model_config = ConfigDict(str_strip_whitespace=True)

    FAILURE_RATE: float = Field(default=0.1, ge=0, le=1, description="from 0 to 1")
    MODEL_LATENCY_SECONDS: float = Field(default=0.05, ge=0, le=5, description="from 0 to 5")
    MODEL_NAME: str = Field(default="fraud_model", min_length=1, description="at least 1 character")
    MODEL_VERSION: str = Field(default="v1", min_length=1, description="at least 1 character")


try:
    settings = Settings.model_validate(dict(os.environ))
except ValidationError as error:
    refused = error.errors()[0]
    name = str(refused["loc"][0])
    sys.exit(f"{name} must be {Settings.model_fields[name].description}, not {refused['input']!r}")

# ------------------------------------------------------------------- Metrics

# Otherwise each counter and histogram has one more series, for the time of its creation.
disable_created_metrics()  # type: ignore[no-untyped-call]

LABELS = {"model_name": settings.MODEL_NAME, "version": settings.MODEL_VERSION}

# labels() creates each series at 0 before the first request, as Prometheus cannot see an increase
# from nothing to 1.
PREDICTIONS = Counter(
    "ml_predictions_total",
    "Requests for a prediction, including failed ones.",
    [*LABELS],
).labels(**LABELS)

ERRORS = Counter(
    "ml_prediction_errors_total",
    "Failed requests for a prediction, by reason.",
    [*LABELS, "reason"],
)
INVALID_INPUT = ERRORS.labels(**LABELS, reason="invalid_input")
MODEL_FAILURE = ERRORS.labels(**LABELS, reason="model_failure")

IN_PROGRESS = Gauge(
    "ml_predictions_in_progress",
    "Model calls in progress.",
    [*LABELS],
).labels(**LABELS)

# One bucket ends at 0.25 s, the limit of the alert HighLatency.
DURATION = Histogram(
    "ml_prediction_duration_seconds",
    "Duration of model calls in seconds, including failed ones.",
    [*LABELS],
    buckets=[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10],
).labels(**LABELS)

# One bucket ends at 0.5, the limit of fraud.
SCORE = Histogram(
    "ml_prediction_score",
    "Probability of fraud in each prediction, from 0 to 1.",
    [*LABELS],
    buckets=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1],
).labels(**LABELS)

# --------------------------------------------------------------------- Model


class Transaction(BaseModel):
    """A payment that may be fraud."""

    model_config = ConfigDict(strict=True, extra="forbid")

    amount: float = Field(ge=0, le=1_000_000, examples=[42.5], description="In US dollars.")
    international: bool = Field(default=False, description="Whether the money leaves the country.")


async def infer(transaction: Transaction) -> float:
    """Return the probability of fraud, from 0 to 1. Put a model of your own here."""
    # A logistic regression with made-up weights.
    logit = math.log1p(transaction.amount) + 1.1 * transaction.international - 6.5
    return 1 / (1 + math.exp(-logit))


class SimulatedError(Exception):
    """A failure that FAILURE_RATE asks for."""


async def simulate_latency_and_failures() -> None:
    """Take about MODEL_LATENCY_SECONDS, and raise SimulatedError at the rate FAILURE_RATE."""
    # Inference times are log-normal. With this sigma, 1% of them exceed three times the median.
    await asyncio.sleep(settings.MODEL_LATENCY_SECONDS * random.lognormvariate(mu=0, sigma=0.472))
    if random.random() < settings.FAILURE_RATE:
        raise SimulatedError(f"FAILURE_RATE is {settings.FAILURE_RATE}")


# ----------------------------------------------------------------------- API


class Prediction(BaseModel):
    """What the model says of a transaction."""

    prediction: Literal["fraud", "legit"]
    score: float = Field(ge=0, le=1, description="Probability of fraud; over 0.5 it is fraud.")
    model_name: str
    version: str


class ErrorResponse(BaseModel):
    """What went wrong. A 422 has a list instead, with an entry for each wrong field."""

    detail: str


logger = logging.getLogger("uvicorn.error")  # The log of uvicorn, not of errors alone.

# Without FastAPI's hooks for OpenTelemetry, each request takes 5 microseconds less.
app = FastAPI(title="Fraud model", telemetry={"tracing": False, "metrics": False, "logs": False})


@app.post(
    "/predict",
    max_body_size=4 * 1024,
    responses={
        400: {"model": ErrorResponse, "description": "The body cannot be read."},
        413: {
            "model": ErrorResponse,
            "content": {"text/plain": {}},
            "description": "The body is over 4 KiB. In JSON only if it was sent in chunks.",
        },
        415: {"model": ErrorResponse, "description": "The body is not sent as JSON."},
        500: {"model": ErrorResponse, "description": "The model failed."},
    },
)
async def predict(transaction: Transaction) -> Prediction:
    """Say whether a transaction is fraud."""
    try:
        with IN_PROGRESS.track_inprogress(), DURATION.time():
            score = await infer(transaction)
            await simulate_latency_and_failures()
        # This refuses a score that is not from 0 to 1, as one more failure of the model.
        prediction = Prediction(
            prediction="fraud" if score > 0.5 else "legit", score=score, **LABELS
        )
    # Exception would miss sys.exit, a panic in Rust, and what uvicorn cancels 8 s after SIGTERM.
    except BaseException as error:
        MODEL_FAILURE.inc()
        is_simulated = isinstance(error, SimulatedError)
        logger.error("The model failed: %r", error, exc_info=not is_simulated)
        raise HTTPException(500, "The model failed. The log says why.") from error
    finally:
        PREDICTIONS.inc()
    SCORE.observe(prediction.score)
    return prediction


def count_invalid_input(request: Request) -> None:
    """Count a request that FastAPI refused, if it was for a prediction."""
    if request.scope["endpoint"] is predict:  # The function that would have answered.
        PREDICTIONS.inc()
        INVALID_INPUT.inc()


@app.exception_handler(RequestValidationError)
async def refuse_invalid_input(request: Request, error: RequestValidationError) -> Response:
    """Answer 422 with what is wrong and where, or 415 if the body is not sent as JSON."""
    count_invalid_input(request)
    if isinstance(error.body, bytes):  # Not parsed, as it is not sent as JSON.
        return JSONResponse({"detail": "Send the header Content-Type: application/json."}, 415)
    # Without "input": it may be NaN, which JSON cannot hold.
    detail = [
        {"type": wrong["type"], "loc": wrong["loc"], "msg": wrong["msg"]}
        for wrong in error.errors()
    ]
    return JSONResponse({"detail": detail}, 422)


@app.exception_handler(400)
@app.exception_handler(413)
async def refuse_body(request: Request, error: HTTPException) -> Response:
    """Count it, and answer 400 or 413 as FastAPI does."""
    count_invalid_input(request)
    return await http_exception_handler(request, error)


@app.get("/metrics", response_class=PlainTextResponse)
async def metrics() -> Response:
    """Answer with all metrics in Prometheus's text format."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


@app.get("/health")
async def health() -> dict[str, str]:
    """Say that the service is up."""
    return {"status": "ok"}


@app.get("/", include_in_schema=False)
async def root() -> RedirectResponse:
    """Lead to the interactive documentation."""
    return RedirectResponse("/docs")
