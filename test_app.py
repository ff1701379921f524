"""Tests of the service: what it answers, and what it counts.

Read it from top to bottom: tools, answers, failures, bad input, other routes, settings, the demo
model.
"""

import asyncio
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from unittest.mock import AsyncMock

import httpx
import pytest
from fastapi import FastAPI, HTTPException
from httpx import AsyncClient
from prometheus_client import REGISTRY
from pytest import LogCaptureFixture, MonkeyPatch, approx

import app

pytestmark = pytest.mark.anyio  # AnyIO, which FastAPI brings along, runs the async tests.

# ---------------------------------------------------------------------- Tools

TRANSACTION = {"amount": 42.5}
JSON = {"Content-Type": "application/json"}
# Padded with spaces, which JSON allows.
FOUR_KIB = b'{"amount": 42.5}'.ljust(4 * 1024)

demo_model = app.infer  # The real one: the fixture model replaces app.infer in each test.


@pytest.fixture
def anyio_backend() -> str:
    """Run the async tests on asyncio only, as the service does."""
    return "asyncio"


@pytest.fixture(autouse=True)
def model(monkeypatch: MonkeyPatch) -> AsyncMock:
    """A model that answers 0.1 at once and never fails. A test can let it do something else."""
    model = AsyncMock(return_value=0.1)
    monkeypatch.setattr(app, "infer", model)
    monkeypatch.setattr(app.settings, "FAILURE_RATE", 0)
    monkeypatch.setattr(app.settings, "MODEL_LATENCY_SECONDS", 0)
    return model


@pytest.fixture
async def client() -> AsyncIterator[AsyncClient]:
    """A client that calls the service in this process, without a network."""
    transport = httpx.ASGITransport(app=app.app)
    async with AsyncClient(transport=transport, base_url="http://api") as client:
        yield client


def sample(name: str, **labels: str) -> float:
    """The value of a series."""
    value = REGISTRY.get_sample_value(name, app.LABELS | labels)
    assert value is not None, f"there is no series {name} {labels}"
    return value


def counts() -> dict[str, float]:
    """What the service has counted so far."""
    return {
        "requests": sample("ml_predictions_total"),
        "invalid_input": sample("ml_prediction_errors_total", reason="invalid_input"),
        "model_failure": sample("ml_prediction_errors_total", reason="model_failure"),
        "in_progress": sample("ml_predictions_in_progress"),
        "calls": sample("ml_prediction_duration_seconds_count"),
        "scores": sample("ml_prediction_score_count"),
        "legit": sample("ml_prediction_score_bucket", le=str(app.THRESHOLD)),
    }


@contextmanager
def counts_exactly(**expected: int) -> Iterator[None]:
    """Check that a block counts this and nothing else."""
    before = counts()
    yield
    after = counts()
    changes = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert changes == expected


# -------------------------------------------------------------------- Answers


async def test_a_prediction_is_answered_and_counted(client: AsyncClient) -> None:
    with counts_exactly(requests=1, calls=1, scores=1, legit=1):
        answer = await client.post("/predict", json=TRANSACTION)
    assert answer.status_code == 200
    assert answer.json() == {
        "score": 0.1,
        "prediction": "legit",
        "model_name": app.settings.MODEL_NAME,
        "version": app.settings.MODEL_VERSION,
    }


@pytest.mark.parametrize(
    ("score", "prediction", "counted"),
    [
        pytest.param(0.5, "legit", {"legit": 1}, id="the threshold"),
        pytest.param(0.500001, "fraud", {}, id="over it"),
        pytest.param(Decimal("0.50000000000000000001"), "legit", {"legit": 1}, id="Decimal"),
    ],
)
async def test_answer_and_metrics_agree_on_fraud(
    client: AsyncClient,
    model: AsyncMock,
    score: float | Decimal,
    prediction: str,
    counted: dict[str, int],
) -> None:
    model.return_value = score
    with counts_exactly(requests=1, calls=1, scores=1, **counted):
        answer = await client.post("/predict", json=TRANSACTION)
    assert answer.json()["score"] == float(score)
    assert answer.json()["prediction"] == prediction


async def test_requests_at_once_are_counted_exactly(client: AsyncClient, model: AsyncMock) -> None:
    """Of eight, two are bad input (-1). Six meet in the model, where two of them fail (1)."""
    all_are_in_the_model = asyncio.Barrier(6)
    in_progress = []

    async def infer(transaction: app.Transaction) -> float:
        await all_are_in_the_model.wait()
        in_progress.append(counts()["in_progress"])
        if transaction.amount == 1:
            raise ValueError("boom")
        return 0.1

    model.side_effect = infer
    amounts = [-1, -1, 1, 1, 2, 2, 2, 2]
    with counts_exactly(requests=8, invalid_input=2, model_failure=2, calls=6, scores=4, legit=4):
        async with asyncio.timeout(60):
            answers = await asyncio.gather(
                *(client.post("/predict", json={"amount": amount}) for amount in amounts)
            )
    statuses = [answer.status_code for answer in answers]
    assert statuses == [422, 422, 500, 500, 200, 200, 200, 200]
    assert max(in_progress) == 6


async def test_the_model_and_its_simulated_latency_are_timed(
    client: AsyncClient, model: AsyncMock, monkeypatch: MonkeyPatch
) -> None:
    async def infer(_: app.Transaction) -> float:
        await asyncio.sleep(0.1)
        return 0.1

    model.side_effect = infer
    monkeypatch.setattr(app.settings, "MODEL_LATENCY_SECONDS", 0.1)
    monkeypatch.setattr(random, "lognormvariate", lambda mu, sigma: 1)
    start = time.monotonic()
    before = sample("ml_prediction_duration_seconds_sum")
    await client.post("/predict", json=TRANSACTION)
    measured = sample("ml_prediction_duration_seconds_sum") - before
    assert 0.19 < measured < time.monotonic() - start  # Not 0.2, as some clocks are coarse.


@pytest.fixture
def hang(model: AsyncMock) -> tuple[asyncio.Event, asyncio.Event]:
    """The model sets one event when it starts, and waits for the other."""
    started, go_on = asyncio.Event(), asyncio.Event()

    async def infer(_: app.Transaction) -> float:
        started.set()
        await go_on.wait()
        return 0.1

    model.side_effect = infer
    return started, go_on


async def test_a_request_is_counted_when_it_ends(
    client: AsyncClient, hang: tuple[asyncio.Event, asyncio.Event]
) -> None:
    started, go_on = hang
    with counts_exactly(in_progress=1):
        request = asyncio.create_task(client.post("/predict", json=TRANSACTION))
        await asyncio.wait_for(started.wait(), timeout=60)
    with counts_exactly(in_progress=-1, requests=1, calls=1, scores=1, legit=1):
        go_on.set()
        await request


# ------------------------------------------------------------------- Failures


@pytest.mark.parametrize(
    "outcome",
    [ZeroDivisionError("boom"), HTTPException(404), None, "high", 1.5, -0.1, math.nan],
    ids=repr,
)
async def test_what_is_no_score_is_a_failure(
    client: AsyncClient, model: AsyncMock, outcome: object
) -> None:
    """What the model raises, and what it returns instead of a number from 0 to 1."""
    model.side_effect = [outcome]
    with counts_exactly(requests=1, model_failure=1, calls=1):
        answer = await client.post("/predict", json=TRANSACTION)
    assert answer.status_code == 500
    assert answer.json().keys() == {"detail"}


async def test_a_cancelled_request_is_a_failure(
    client: AsyncClient, hang: tuple[asyncio.Event, asyncio.Event]
) -> None:
    """uvicorn cancels what is still in flight when its time to stop is over."""
    started, _ = hang
    with counts_exactly(requests=1, model_failure=1, calls=1):
        request = asyncio.create_task(client.post("/predict", json=TRANSACTION))
        await asyncio.wait_for(started.wait(), timeout=60)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request


def logged(caplog: LogCaptureFixture) -> str:
    """The only entry that the service has logged, as text."""
    (record,) = (record for record in caplog.records if record.name == "uvicorn.error")
    return caplog.handler.format(record)


async def test_a_failure_is_logged_with_its_traceback(
    client: AsyncClient, model: AsyncMock, caplog: LogCaptureFixture
) -> None:
    model.side_effect = ZeroDivisionError("boom")
    await client.post("/predict", json=TRANSACTION)
    assert "Traceback" in logged(caplog)
    assert "ZeroDivisionError: boom" in logged(caplog)


async def test_a_simulated_failure_is_counted_and_logged_without_a_traceback(
    client: AsyncClient, monkeypatch: MonkeyPatch, caplog: LogCaptureFixture
) -> None:
    monkeypatch.setattr(app.settings, "FAILURE_RATE", 1)
    with counts_exactly(requests=1, model_failure=1, calls=1):
        await client.post("/predict", json=TRANSACTION)
    assert "SimulatedError" in logged(caplog)
    assert "Traceback" not in logged(caplog)


async def test_an_error_that_is_raised_again_does_not_grow(
    client: AsyncClient, model: AsyncMock, caplog: LogCaptureFixture
) -> None:
    """For example, a model that could not be loaded raises the same error on each call."""
    model.side_effect = RuntimeError("no model")
    lengths = set()
    for _ in range(10):
        caplog.clear()
        await client.post("/predict", json=TRANSACTION)
        lengths.add(len(logged(caplog)))
    assert len(lengths) == 1


# ------------------------------------------------------------------ Bad input

BAD_INPUT = {
    "no amount": (b"{}", 422, "missing"),
    "unknown field": (b'{"amount": 1, "no_such_field": 1}', 422, "extra_forbidden"),
    "text": (b'{"amount": "12"}', 422, "float_type"),
    "negative": (b'{"amount": -0.01}', 422, "greater_than_equal"),
    "too large": (b'{"amount": 1000000.01}', 422, "less_than_equal"),
    "broken JSON": (b'{"amount": 4', 422, "json_invalid"),
    "not UTF-8": (b'{"amount": 1, "\xff": 1}', 400, "error parsing the body"),
    "over 4 KiB": (FOUR_KIB + b" ", 413, "Too Large"),
}


@pytest.mark.parametrize(("body", "status", "says"), BAD_INPUT.values(), ids=BAD_INPUT)
async def test_bad_input_is_refused_and_counted(
    client: AsyncClient, body: bytes, status: int, says: str
) -> None:
    with counts_exactly(requests=1, invalid_input=1):
        answer = await client.post("/predict", content=body, headers=JSON)
    assert answer.status_code == status
    assert says in answer.text


async def test_a_body_that_is_not_sent_as_json_is_refused(client: AsyncClient) -> None:
    with counts_exactly(requests=1, invalid_input=1):
        answer = await client.post("/predict", content=b'{"amount": 1}')
    assert answer.status_code == 415
    assert "Content-Type: application/json" in answer.text


async def test_a_422_names_each_wrong_field_and_repeats_no_input(client: AsyncClient) -> None:
    """JSON could not repeat NaN."""
    body = b'{"amount": NaN, "international": "yes"}'
    answer = await client.post("/predict", content=body, headers=JSON)
    assert answer.status_code == 422
    wrong = answer.json()["detail"]
    assert [one["loc"] for one in wrong] == [["body", "amount"], ["body", "international"]]
    assert all(one.keys() == {"type", "loc", "msg"} for one in wrong)


async def in_chunks(body: bytes) -> AsyncIterator[bytes]:
    """A body that is sent without its length."""
    for start in range(0, len(body), 1024):
        yield body[start : start + 1024]


async def test_a_body_of_4_kib_is_the_largest_that_is_read(client: AsyncClient) -> None:
    """Even if its length is not sent first."""
    with counts_exactly(requests=1, calls=1, scores=1, legit=1):
        answer = await client.post("/predict", content=in_chunks(FOUR_KIB), headers=JSON)
    assert answer.status_code == 200
    with counts_exactly(requests=1, invalid_input=1):
        answer = await client.post("/predict", content=in_chunks(FOUR_KIB + b" "), headers=JSON)
    assert answer.status_code == 413


# ------------------------------------------------- Other routes, other places


@pytest.fixture
def extensible_app() -> Iterator[FastAPI]:
    """The app, to which a test may add routes. They are taken away again."""
    before = list(app.app.router.routes)
    yield app.app
    app.app.router.routes[:] = before


async def test_bad_input_of_another_route_is_not_counted(
    client: AsyncClient, extensible_app: FastAPI
) -> None:
    @extensible_app.post("/added", max_body_size=4 * 1024)
    async def added(transaction: app.Transaction) -> None:
        pass

    with counts_exactly():
        answers = [
            await client.post("/added", content=body, headers=JSON)
            for body in (b"{}", b"\xff", FOUR_KIB + b" ")
        ]
    assert [answer.status_code for answer in answers] == [422, 400, 413]


@pytest.fixture(params=["proxy", "mount"])
async def client_with_a_prefix(request: pytest.FixtureRequest) -> AsyncIterator[AsyncClient]:
    """A client of the service behind a proxy, or inside another app, at the path /fraud."""
    outer = FastAPI()
    outer.mount("/fraud", app.app)
    transport = {
        "proxy": httpx.ASGITransport(app=app.app, root_path="/fraud"),
        "mount": httpx.ASGITransport(app=outer),
    }[request.param]
    async with AsyncClient(transport=transport, base_url="http://api/fraud") as client:
        yield client


async def test_bad_input_is_counted_behind_a_prefix(client_with_a_prefix: AsyncClient) -> None:
    with counts_exactly(requests=1, invalid_input=1):
        answer = await client_with_a_prefix.post("/predict", json={})
    assert answer.status_code == 422


async def test_the_root_leads_to_the_documentation_behind_a_prefix(
    client_with_a_prefix: AsyncClient,
) -> None:
    answer = await client_with_a_prefix.get("/", follow_redirects=True)
    assert str(answer.url) == "http://api/fraud/docs"
    assert "swagger" in answer.text


async def test_the_documentation_names_each_status(client: AsyncClient) -> None:
    schema = (await client.get("/openapi.json")).json()
    documented = schema["paths"]["/predict"]["post"]["responses"]
    assert {*documented} == {"200", "400", "413", "415", "422", "500"}


async def test_a_wrong_method_and_health_are_not_counted(
    client: AsyncClient, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(app.settings, "FAILURE_RATE", 1)  # A failing model does not stop health.
    with counts_exactly():
        wrong_method = await client.get("/predict")
        health = await client.get("/health")
    assert wrong_method.status_code == 405
    assert health.status_code == 200


async def test_metrics_are_what_prometheus_reads(client: AsyncClient) -> None:
    answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert "\nml_predictions_total{" in answer.text
    assert "_created" not in answer.text, "disable_created_metrics() is missing"


# ------------------------------------------------------------------- Settings


def run_app(code: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run code in the folder of app.py, in a process with these settings."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(app.__file__).parent,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )


def test_bad_settings_end_the_process_with_a_line_each() -> None:
    run = run_app("import app", FAILURE_RATE="2", MODEL_LATENCY_SECONDS="a", MODEL_NAME=" ")
    assert run.returncode == 1
    assert run.stdout == ""
    lines = run.stderr.splitlines()
    assert lines[0] == "FAILURE_RATE='2': Input should be less than or equal to 1"
    names = [line.partition("=")[0] for line in lines]
    assert names == ["FAILURE_RATE", "MODEL_LATENCY_SECONDS", "MODEL_NAME"]


def test_settings_are_the_labels_and_every_series_starts_at_0() -> None:
    code = "import app; print(app.generate_latest().decode())"
    run = run_app(code, MODEL_NAME="m", MODEL_VERSION=" v9 ")
    labels = 'model_name="m",version="v9"'
    for series in (
        f"ml_predictions_total{{{labels}}}",
        'ml_prediction_errors_total{model_name="m",reason="invalid_input",version="v9"}',
        'ml_prediction_errors_total{model_name="m",reason="model_failure",version="v9"}',
        f"ml_predictions_in_progress{{{labels}}}",
        f"ml_prediction_duration_seconds_count{{{labels}}}",
        f"ml_prediction_score_count{{{labels}}}",
    ):
        assert f"\n{series} 0.0\n" in run.stdout, run.stdout + run.stderr


# ------------------------------------------------------------- The demo model
#
# With a model of your own: pytest -k "not demo_model"


@pytest.mark.parametrize(
    ("amount", "international", "score"),
    [
        (0, False, 0.0015),
        (42.5, False, 0.0614),
        (42.5, True, 0.1642),
        (900, True, 0.8027),
        (1_000_000, False, 0.9993),
    ],
)
async def test_demo_model(amount: float, international: bool, score: float) -> None:
    transaction = app.Transaction(amount=amount, international=international)
    assert await demo_model(transaction) == approx(score, abs=1e-4)
