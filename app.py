"""A fraud model served by FastAPI and measured with Prometheus.

Read it from top to bottom: settings, metrics, model, API.
"""

import asyncio
import logging
import math
import os
import random
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse
from fastapi.routing import APIRoute
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException  # FastAPI's own is a kind of this one.
from starlette.requests import ClientDisconnect

# ------------------------------------------------------------------ Settings


class Settings(BaseModel):
    """Each setting is read from the environment variable of its name."""

    model_config = ConfigDict(str_strip_whitespace=True)

    FAILURE_RATE: float = Field(default=0.1, ge=0, le=1, description="from 0 to 1")
    MODEL_LATENCY_SECONDS: float = Field(default=0.05, ge=0, le=60, description="from 0 to 60")
    MODEL_NAME: str = Field(default="fraud_model", min_length=1, description="at least 1 character")
    MODEL_VERSION: str = Field(default="v1", min_length=1, description="at least 1 character")


try:
    settings = Settings.model_validate(dict(os.environ))
except ValidationError as error:
    refused = error.errors()[0]
    name = str(refused["loc"][0])
    sys.exit(f"{name} must be {Settings.model_fields[name].description}, not {refused['input']!r}")

# ------------------------------------------------------------------- Metrics

disable_created_metrics()  # type: ignore[no-untyped-call]

LABELS = {"model_name": settings.MODEL_NAME, "version": settings.MODEL_VERSION}

# labels() creates the series, so that each one is there, at 0, before the first request:
# Prometheus cannot see an increase from nothing to 1.
PREDICTIONS = Counter(
    "ml_predictions_total",
    "Requests to /predict that were answered, whatever the answer.",
    LABELS,
).labels(**LABELS)

ERRORS = Counter(
    "ml_prediction_errors_total",
    "Requests to /predict that were answered with an error, by reason.",
    [*LABELS, "reason"],
)
INVALID_INPUT = ERRORS.labels(**LABELS, reason="invalid_input")
MODEL_FAILURE = ERRORS.labels(**LABELS, reason="model_failure")

DURATION = Histogram(
    "ml_prediction_duration_seconds",
    "Time of each call of the model in seconds, failed calls too.",
    LABELS,
    buckets=[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5],
).labels(**LABELS)

SCORE = Histogram(
    "ml_prediction_score",
    "Probability of fraud in each prediction, from 0 to 1.",
    LABELS,
    buckets=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1],
).labels(**LABELS)

# --------------------------------------------------------------------- Model


class Transaction(BaseModel):
    """A payment that may be fraud."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        json_schema_extra={"examples": [{"amount": 42.5, "international": False}]},
    )

    amount: float = Field(ge=0, le=1_000_000, description="In US dollars.")
    international: bool = Field(default=False, description="Whether the money leaves the country.")


class Prediction(BaseModel):
    """What the model says of a transaction."""

    prediction: Literal["fraud", "legit"]
    score: float = Field(ge=0, le=1, description="Probability of fraud; from 0.5 on it is fraud.")
    model_name: str
    version: str


class ModelError(Exception):
    """The model could not make a prediction."""


async def infer(transaction: Transaction) -> Prediction:
    """Score a transaction: the place for a real model instead of this simulated one.

    Raises ModelError with the probability FAILURE_RATE.
    """
    # Inference times are log-normal. With this sigma, one in a hundred takes three medians.
    await asyncio.sleep(settings.MODEL_LATENCY_SECONDS * random.lognormvariate(mu=0, sigma=0.472))
    if random.random() < settings.FAILURE_RATE:
        raise ModelError("The model failed (simulated, see FAILURE_RATE).")

    # A logistic regression with made-up weights.
    logit = math.log1p(transaction.amount) + 1.1 * transaction.international - 6.5
    score = 1 / (1 + math.exp(-logit))
    return Prediction(
        prediction="fraud" if score >= 0.5 else "legit",
        score=score,
        model_name=settings.MODEL_NAME,
        version=settings.MODEL_VERSION,
    )


# ----------------------------------------------------------------------- API

MAX_BODY_BYTES = 64 * 1024

logger = logging.getLogger("uvicorn.error")


class Problem(BaseModel):
    """What went wrong. A 422 has a list instead, with an entry for each wrong field."""

    detail: str


async def predict(transaction: Transaction) -> Prediction:
    """Say whether a transaction is fraud."""
    try:
        with DURATION.time():
            prediction = await infer(transaction)
        SCORE.observe(prediction.score)
        return prediction
    except ModelError as error:
        raise HTTPException(500, str(error)) from error
    except Exception as error:
        logger.exception("The model failed unexpectedly.")
        raise HTTPException(500, "The model failed unexpectedly.") from error


class CountedRoute(APIRoute):
    """A route that counts each of its answers.

    FastAPI refuses bad input before it calls the endpoint, so counting belongs around both.
    How it is done: https://fastapi.tiangolo.com/how-to/custom-request-and-route/
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def counted_answer(request: Request) -> Response:
            try:
                await read_body(request)
                response = await answer(request)
            except ClientDisconnect:
                return Response()  # Nobody is left to get an answer, so none is counted.
            except RequestValidationError as error:
                response = explain(error)
            except HTTPException as error:
                response = await http_exception_handler(request, error)

            PREDICTIONS.inc()
            if response.status_code >= 500:
                MODEL_FAILURE.inc()
            elif response.status_code >= 400:
                INVALID_INPUT.inc()
            return response

        return counted_answer


async def read_body(request: Request) -> None:
    """Read the body, so that the request has it. Raises a 413 if it is over MAX_BODY_BYTES."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"The body is over {MAX_BODY_BYTES} bytes.")
    request._body = body  # Starlette looks here first when it is asked for the body.


def explain(error: RequestValidationError) -> Response:
    """Say what is wrong with the input, without quoting it: a NaN in it cannot be put in JSON."""
    if isinstance(error.body, bytes):  # FastAPI parses only what is sent as JSON.
        return JSONResponse({"detail": "Send the header Content-Type: application/json."}, 415)
    detail = [{key: e[key] for key in ("type", "loc", "msg")} for e in error.errors()]
    return JSONResponse({"detail": detail}, 422)


app = FastAPI(
    title="Fraud model",
    # Prometheus measures this service; FastAPI's hooks for OpenTelemetry would only take time.
    telemetry={"tracing": False, "metrics": False, "logs": False},
)
app.router.add_api_route(
    "/predict",
    predict,
    methods=["POST"],
    route_class_override=CountedRoute,
    responses={
        400: {"model": Problem, "description": "The body cannot be parsed."},
        413: {"model": Problem, "description": "The body is over 64 KiB."},
        415: {"model": Problem, "description": "The body is not sent as JSON."},
        500: {"model": Problem, "description": "The model failed."},
    },
)


@app.get("/metrics", response_class=PlainTextResponse)
async def metrics() -> Response:
    """Answer with all metrics in Prometheus's text format."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


@app.get("/health")
async def health() -> dict[str, str]:
    """Say that the service is up."""
    return {"status": "ok"}


@app.get("/", response_class=RedirectResponse)
async def root() -> str:
    """Lead to the interactive documentation."""
    return "/docs"
