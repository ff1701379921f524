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

    model_config = ConfigDict(str_strip_whitespace=True)

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
    list(LABELS),
).labels(**LABELS)

# No labels() here: REQUESTS is one series, and ERRORS has one for each reason.
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
    list(LABELS),
).labels(**LABELS)

# One bucket ends at 0.25 s, the limit of the alert HighLatency.
DURATION = Histogram(
    "ml_prediction_duration_seconds",
    "Duration of model calls in seconds, including failed ones.",
    list(LABELS),
    buckets=[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10],
).labels(**LABELS)

# A score over this is fraud. One bucket ends there, which .prometheus/rules.yml reads.
THRESHOLD = 0.5
SCORE = Histogram(
    "ml_prediction_score",
    "Probability of fraud in each prediction, from 0 to 1.",
    list(LABELS),
    buckets=[0.1, 0.2, 0.3, 0.4, THRESHOLD, 0.6, 0.7, 0.8, 0.9, 1],
).labels(**LABELS)

# --------------------------------------------------------------------- Model


class Transaction(BaseModel):
    """A payment that may be fraud."""

    model_config = ConfigDict(strict=True, extra="forbid")

    amount: float = Field(ge=0, le=1_000_000, examples=[42.5], description="In US dollars.")
    international: bool = Field(default=False, description="Whether the money leaves the country.")


async def infer(transaction: Transaction) -> float:
    """Return the probability of fraud, from 0 to 1. Put a model of your own here.

    If it blocks, call it with asyncio.to_thread. Otherwise all other requests wait for it.
    """
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
        raise SimulatedError


# ----------------------------------------------------------------------- API


class Prediction(BaseModel):
    """What the model says of a transaction."""

    score: float = Field(ge=0, le=1, description=f"Probability of fraud; over {THRESHOLD} is fraud.")
    prediction: Literal["fraud", "legit"]
    model_name: str
    version: str


class ErrorResponse(BaseModel):
    """What went wrong."""

    detail: str


logger = logging.getLogger("uvicorn.error")  # uvicorn prints this one.

app = FastAPI(title="Fraud model")


@app.post(
    "/predict",
    max_body_size=4 * 1024,  # In bytes. A transaction has fewer than 100.
    responses={status: {"model": ErrorResponse} for status in (400, 413, 415, 500)},
)
async def predict(transaction: Transaction) -> Prediction:
    """Say whether a transaction is fraud."""
    try:
        with (
            MODEL_FAILURE.count_exceptions(BaseException),  # A cancelled request is no Exception.
            IN_PROGRESS.track_inprogress(),  # Comes down however the call ends.
            DURATION.time(),  # Failed calls are timed, too.
        ):
            score = float(await infer(transaction))  # A model may return np.float32.
            await simulate_latency_and_failures()
            # Raises ValidationError if the score is not from 0 to 1: one more failure.
            prediction = Prediction(
                score=score,
                prediction="fraud" if score > THRESHOLD else "legit",
                model_name=settings.MODEL_NAME,
                version=settings.MODEL_VERSION,
            )
    except Exception as error:
        is_simulated = isinstance(error, SimulatedError)
        logger.error("The model failed: %s", type(error).__name__, exc_info=not is_simulated)
        # An error that is raised again and again, as by a model that could not be loaded, keeps
        # the traceback of each time.
        error.__traceback__ = None
        raise HTTPException(500, "The model failed. The log says why.") from error
    finally:
        REQUESTS.inc()
    SCORE.observe(score)
    return prediction


def count_invalid_input(request: Request) -> None:
    """Count a request for a prediction that was refused before it reached predict."""
    # The handlers below answer for all routes. The path does not tell which one it is, as a proxy
    # may put a prefix before it.
    if request.scope.get("endpoint") is predict:
        REQUESTS.inc()
        INVALID_INPUT.inc()


@app.exception_handler(RequestValidationError)
async def refuse_invalid_input(request: Request, error: RequestValidationError) -> Response:
    """Answer 422 with what is wrong and where, or 415 if the body is not sent as JSON."""
    count_invalid_input(request)
    # Only a body that is sent as JSON is parsed. Any other is bytes still.
    if isinstance(error.body, bytes):
        return JSONResponse({"detail": "Send the header Content-Type: application/json."}, 415)
    # Without "input": it may be NaN, which JSON cannot hold.
    detail = [{key: wrong[key] for key in ("type", "loc", "msg")} for wrong in error.errors()]
    return JSONResponse({"detail": detail}, 422)


@app.exception_handler(400)
@app.exception_handler(413)
async def refuse_body(request: Request, error: HTTPException) -> Response:
    """Count it, and answer 400 or 413 as FastAPI does."""
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
