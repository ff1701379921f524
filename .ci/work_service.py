"""A service like those at work, for test_processes.py. It uses .work/monitoring.py.

It has a factory, a lifespan, a router with a prefix, a key, a dependency that fails, a middleware
that answers on its own, sync and async endpoints, a batch and a stream. A request says what shall
happen: `do`.
"""

# As many services have it.
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Header, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from monitoring import SCORE, CountRequests, metrics, model_call
from pydantic import BaseModel, Field
from starlette.types import ASGIApp, Receive, Scope, Send


class Order(BaseModel):
    """What a request asks for."""

    do: str = Field(min_length=1)


class BodyLimit:
    """A middleware that answers 413 on its own."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a body of 1,000 bytes or more by its header."""
        length = dict(scope.get("headers", [])).get(b"content-length", b"0")
        app = self.app if int(length) < 1000 else JSONResponse({"detail": "Too long."}, 413)
        await app(scope, receive, send)


def check_key(key: Annotated[str, Header()] = "") -> None:
    """Refuse a request without the key."""
    if key != "secret":
        raise HTTPException(401)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load the model."""
    app.state.model = "loaded"
    yield


def get_model(request: Request, model: Annotated[str, Header()] = "there") -> None:
    """Fail if the model is away or broken."""
    if model == "away":
        raise HTTPException(503)
    if model == "broken" or request.app.state.model != "loaded":
        raise RuntimeError("no model")


router = APIRouter(prefix="/api", dependencies=[Depends(check_key), Depends(get_model)])

ERRORS: dict[str, BaseException] = {
    "raise": ValueError("boom"),
    "raise 404": HTTPException(404),
    "exit": SystemExit(1),
    "cancel": asyncio.CancelledError(),
}


def predict(order: Order) -> float:
    """A model."""
    if order.do in ERRORS:
        raise ERRORS[order.do]
    return 0.1


@router.post("/sync")
def predict_sync(order: Order) -> float:
    if order.do == "route 415":
        raise HTTPException(415)
    if order.do == "route 500":
        raise KeyError
    with model_call():
        score = predict(order)
    SCORE.observe(score)
    return score


@router.post("/async/{name}")
async def predict_async(order: Order, name: str, tasks: BackgroundTasks) -> float:
    if order.do == "background":
        tasks.add_task(predict, Order(do="raise"))
    try:
        with model_call():
            score = predict(order)
    except ValueError:
        return 0  # It has an answer all the same.
    SCORE.observe(score)
    return score


@router.post("/batch")
def predict_batch(orders: list[Order]) -> list[float]:
    with model_call():
        return [predict(order) for order in orders]


@router.post("/stream")
async def stream(order: Order) -> StreamingResponse:
    async def lines() -> AsyncIterator[str]:
        with model_call():
            for _ in range(3):
                yield "a line\n"
                await asyncio.sleep(0.01)
            predict(order)
        if order.do == "route 500":
            raise KeyError
        while order.do == "endless":
            yield "a line\n"
            await asyncio.sleep(0.01)

    return StreamingResponse(lines())


@router.post("/other")
def other(order: Order) -> None:
    """Not one of the paths that are counted."""


def create_app() -> FastAPI:
    """Return the service."""
    app = FastAPI(lifespan=lifespan)
    app.include_router(router)
    app.add_middleware(BodyLimit)
    app.add_middleware(
        CountRequests, paths=["/api/sync", "/api/async/{name}", "/api/batch", "/api/stream"]
    )
    app.add_route("/metrics", metrics)
    return app
