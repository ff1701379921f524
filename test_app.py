"""Tests of the service over HTTP, and of the files around it. They need no network and no Docker."""

import asyncio
import json
import logging
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import yaml
from fastapi import HTTPException
from httpx import AsyncClient
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families
from pytest import LogCaptureFixture, MonkeyPatch

import app

LABELS = {"model_name": app.settings.MODEL_NAME, "version": app.settings.MODEL_VERSION}
LEGIT = {"amount": 42.5}
FRAUD = {"amount": 9_000, "international": True}
JSON = {"Content-Type": "application/json"}
FOLDER = Path(__file__).parent

pytestmark = pytest.mark.anyio  # AnyIO, which FastAPI brings along, runs the async tests.


def read(name: str) -> str:
    """A file of the project."""
    return (FOLDER / name).read_text(encoding="utf-8")


@pytest.fixture
def anyio_backend() -> str:
    """The event loop that uvicorn has, too."""
    return "asyncio"


@pytest.fixture(autouse=True)
def ideal_model(monkeypatch: MonkeyPatch) -> None:
    """The model neither waits nor fails, unless a test says so."""
    monkeypatch.setattr(app.settings, "FAILURE_RATE", 0)
    monkeypatch.setattr(app.settings, "MODEL_LATENCY_SECONDS", 0)


@pytest.fixture
async def client() -> AsyncIterator[AsyncClient]:
    """A client of the service in this process, where the tests can change it."""
    async with AsyncClient(
        transport=httpx.ASGITransport(app.app),
        base_url="http://api",
        event_hooks={"response": [is_documented]},
    ) as client:
        yield client


async def is_documented(response: httpx.Response) -> None:
    """Check of each answer in each test: OpenAPI names its status and its content type."""
    path = app.app.openapi()["paths"].get(response.request.url.path, {})
    if operation := path.get(response.request.method.lower()):
        documented = operation["responses"][str(response.status_code)].get("content", {"": None})
        assert response.headers.get("content-type", "").partition(";")[0] in documented


@pytest.fixture
def answer_with(monkeypatch: MonkeyPatch) -> Callable[[object], None]:
    """Has the model answer with this, or raise it."""

    def answer_with(answer: object) -> None:
        async def infer(_: app.Transaction) -> object:
            if isinstance(answer, BaseException):
                raise answer
            return answer

        monkeypatch.setattr(app, "infer", infer)

    return answer_with


def value(name: str, **labels: str) -> float:
    """A series of the service."""
    found = REGISTRY.get_sample_value(name, {**LABELS, **labels})
    assert found is not None
    return found


def counts() -> Counter[str]:
    """What the service has counted so far."""
    return Counter(
        predictions=int(value("ml_predictions_total")),
        invalid_input=int(value("ml_prediction_errors_total", reason="invalid_input")),
        model_failure=int(value("ml_prediction_errors_total", reason="model_failure")),
        in_progress=int(value("ml_predictions_in_progress")),
        model_calls=int(value("ml_prediction_duration_seconds_count")),
        scores=int(value("ml_prediction_score_count")),
    )


@contextmanager
def counted(**expected: int) -> Iterator[None]:
    """Check that a block counts exactly this."""
    before = counts()
    yield
    assert {name: n - before[name] for name, n in counts().items() if n != before[name]} == expected


# ------------------------------------------------------------------- Predict


async def test_predict_answers_with_a_score(client: AsyncClient) -> None:
    assert [LEGIT["amount"]] == app.Transaction.model_fields["amount"].examples
    for transaction, prediction, score in ((LEGIT, "legit", 0.0614), (FRAUD, "fraud", 0.9760)):
        with counted(predictions=1, model_calls=1, scores=1):
            answer = await client.post("/predict", json=transaction)
        assert answer.status_code == 200
        score = pytest.approx(score, abs=1e-4)
        assert answer.json() == {"prediction": prediction, "score": score, **LABELS}


@pytest.mark.parametrize(("score", "prediction"), [(0.5, "legit"), (0.500001, "fraud")])
async def test_the_bucket_le_0_5_holds_what_is_legit(
    client: AsyncClient, answer_with: Callable[[object], None], score: float, prediction: str
) -> None:
    answer_with(score)
    before = value("ml_prediction_score_bucket", le="0.5")
    assert (await client.post("/predict", json=LEGIT)).json()["prediction"] == prediction
    assert value("ml_prediction_score_bucket", le="0.5") - before == (prediction == "legit")


async def test_latency_is_log_normal(monkeypatch: MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(app.settings, "MODEL_LATENCY_SECONDS", 0.05)
    monkeypatch.setattr(app, "asyncio", SimpleNamespace(sleep=sleep))
    random.seed(1)
    for _ in range(10_000):
        await app.simulate_latency_and_failures()
        assert waits, "the model waits without blocking the event loop"
    percentiles = statistics.quantiles(waits, n=100)
    assert percentiles[49] == pytest.approx(0.05, rel=0.1)
    assert percentiles[98] == pytest.approx(0.15, rel=0.1)


async def test_calls_of_the_model_overlap(client: AsyncClient, monkeypatch: MonkeyPatch) -> None:
    all_in_progress = asyncio.Event()

    async def infer(_: app.Transaction) -> float:
        if value("ml_predictions_in_progress") == 8:
            all_in_progress.set()
        await asyncio.wait_for(all_in_progress.wait(), timeout=5)
        return 0

    monkeypatch.setattr(app, "infer", infer)
    with counted(predictions=8, model_calls=8, scores=8):
        answers = await asyncio.gather(*(client.post("/predict", json=LEGIT) for _ in range(8)))
    assert [answer.status_code for answer in answers] == [200] * 8


async def test_counts_are_exact_under_concurrency(
    client: AsyncClient, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(app.settings, "FAILURE_RATE", 0.3)
    monkeypatch.setattr(app.settings, "MODEL_LATENCY_SECONDS", 0.005)
    before = counts()
    bodies = [{"amount": -1 if number % 4 == 0 else number} for number in range(800)]
    answers = await asyncio.gather(*(client.post("/predict", json=body) for body in bodies))
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses.keys() == {200, 422, 500} and statuses[422] == 200
    assert statuses[500] / 600 == pytest.approx(0.3, abs=0.1)
    assert counts() - before == {
        "predictions": 800,
        "invalid_input": statuses[422],
        "model_failure": statuses[500],
        "model_calls": statuses[200] + statuses[500],
        "scores": statuses[200],
    }


# -------------------------------------------------------------------- Faults

WRONG_ANSWERS = [None, {"score": 0.1}, "0.1", 1.5, -0.1, float("nan")]
ERRORS = [ZeroDivisionError("boom"), HTTPException(404), TimeoutError(), asyncio.CancelledError()]


@pytest.mark.parametrize("answer", [*WRONG_ANSWERS, *ERRORS], ids=repr)
async def test_a_model_that_goes_wrong(
    client: AsyncClient,
    answer_with: Callable[[object], None],
    caplog: LogCaptureFixture,
    answer: object,
) -> None:
    answer_with(answer)
    with counted(predictions=1, model_failure=1, model_calls=1):
        response = await client.post("/predict", json=LEGIT)
    assert response.status_code == 500
    assert response.json() == {"detail": "The model failed. The log says why."}
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert record.exc_info and repr(record.exc_info[1]) in record.getMessage()


async def test_a_simulated_failure_is_one_line_in_the_log(
    client: AsyncClient, monkeypatch: MonkeyPatch, caplog: LogCaptureFixture
) -> None:
    monkeypatch.setattr(app.settings, "FAILURE_RATE", 1)
    with counted(predictions=1, model_failure=1, model_calls=1):
        assert (await client.post("/predict", json=LEGIT)).status_code == 500
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert "FAILURE_RATE is 1" in record.getMessage() and not record.exc_info


LIMIT = 64 * 1024
BAD_INPUT = [
    # body, status, what the answer says
    (b"{}", 422, "Field required"),
    (b'{"amount": 1, "currency": "EUR"}', 422, "Extra inputs are not permitted"),
    (b'{"amount": "12"}', 422, "valid number"),
    (b'{"amount": true}', 422, "valid number"),
    (b'{"amount": null}', 422, "valid number"),
    (b'{"amount": 1, "international": "yes"}', 422, "valid boolean"),
    (b'{"amount": 1, "international": 1}', 422, "valid boolean"),
    (b'{"amount": -0.01}', 422, "greater than or equal to 0"),
    (b'{"amount": 1000000.01}', 422, "less than or equal to 1000000"),
    (b'{"amount": 1e999}', 422, "less than or equal to 1000000"),
    (b'{"amount": Infinity}', 422, "less than or equal to 1000000"),
    (b'{"amount": NaN}', 422, "less than or equal to 1000000"),
    (b'{"amount": 1' + b"0" * 4_000 + b"}", 422, "valid number"),
    (b'{"amount": 1' + b"0" * 5_000 + b"}", 400, "error parsing the body"),
    (b'{"amount": 1, "\\ud800": 1}', 422, "unable to parse"),
    (b'{"amount": 1, "\xff": 1}', 400, "error parsing the body"),
    (b'{"amount": 4', 422, "JSON decode error"),
    (b"[" * 30_000 + b"]" * 30_000, 400, "error parsing the body"),
    (b"[]", 422, "valid dictionary"),
    (b"42", 422, "valid dictionary"),
    (b"null", 422, "valid dictionary"),
    (b"", 422, "Field required"),
    (b" " * (LIMIT + 1), 413, "Content Too Large"),
]


@pytest.mark.parametrize(("body", "status", "says"), BAD_INPUT)
async def test_bad_input(client: AsyncClient, body: bytes, status: int, says: str) -> None:
    with counted(predictions=1, invalid_input=1):
        answer = await client.post("/predict", content=body, headers=JSON)
    assert answer.status_code == status and says in answer.text
    assert status != 422 or {*answer.json()["detail"][0]} == {"type", "loc", "msg"}


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "text/plain"}], ids=repr)
async def test_input_not_sent_as_json(client: AsyncClient, headers: dict[str, str]) -> None:
    with counted(predictions=1, invalid_input=1):
        answer = await client.post("/predict", content=b'{"amount": 1}', headers=headers)
    assert answer.status_code == 415
    assert answer.json() == {"detail": "Send the header Content-Type: application/json."}


@pytest.mark.parametrize(("size", "status"), [(LIMIT, 200), (LIMIT + 1, 413)])
async def test_body_without_a_length(client: AsyncClient, size: int, status: int) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, size, 1024):
            yield b'{"amount": 1}'.ljust(size)[start : start + 1024]

    answer = await client.post("/predict", content=chunks(), headers=JSON)
    assert answer.status_code == status


async def test_other_paths(client: AsyncClient) -> None:
    with counted():
        metrics = await client.get("/metrics")
        health = await client.get("/health")
        docs = await client.get("/", follow_redirects=True)
    assert metrics.headers["content-type"] == "text/plain; version=1.0.0; charset=utf-8"
    assert "ml_predictions_total" in metrics.text and "_created" not in metrics.text
    assert (health.status_code, health.json()) == (200, {"status": "ok"})
    assert (docs.status_code, docs.url.path) == (200, "/docs")


# ------------------------------------------------- The process and its start

DOCKERFILE = read("Dockerfile").replace("\\\n", "")
COMMAND = json.loads(re.findall(r"^CMD (.+)", DOCKERFILE, re.MULTILINE)[-1])
HEAD = (
    b"POST /predict HTTP/1.1\r\nHost: api\r\nContent-Type: application/json\r\nContent-Length: 13"
)


@contextmanager
def service(**environment: str) -> Iterator[subprocess.Popen[str]]:
    """Starts the service as the Dockerfile does, but on a free port of this machine only."""
    with subprocess.Popen(
        [sys.executable, "-m", *COMMAND, "--host", "127.0.0.1", "--port", "0"],
        cwd=FOLDER,
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_the_process_from_start_to_sigterm() -> None:
    environment = {"FAILURE_RATE": "0", "MODEL_LATENCY_SECONDS": "1", "MODEL_VERSION": "v9"}
    with service(**environment) as process:
        assert process.stderr
        log = iter(process.stderr.readline, "")
        address = next(m for line in log if (m := re.search(r"http://(127.0.0.1):(\d+)", line)))

        def connect(request: bytes) -> socket.socket:
            connection = socket.create_connection((address[1], int(address[2])), timeout=20)
            connection.sendall(request)
            return connection

        def scraped(name: str) -> list[float]:
            families = text_string_to_metric_families(httpx.get(f"{address[0]}/metrics").text)
            samples = [s for f in families for s in f.samples if re.fullmatch(name, s.name)]
            assert {s.labels["version"] for s in samples} == {"v9"}
            return [s.value for s in samples]

        # Every series is there, at 0: counters, gauge, histograms.
        assert scraped("ml_.+") == [0] * (1 + 2 + 1 + (13 + 2) + (11 + 2))

        connect(HEAD + b'\r\n\r\n{"amount"').close()
        while not sum(scraped("ml_prediction_errors_total")):
            assert process.poll() is None
        assert scraped("ml_predictions_total") == [1], "who leaves in the middle is counted"

        upgrade = connect(HEAD + b'\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n{"amount"')
        assert upgrade.recv(1024).startswith(b"HTTP/1.1 422"), "no upgrade, but an answer"
        in_flight = connect(HEAD + b'\r\n\r\n{"amount": 1}')
        while scraped("ml_predictions_in_progress") != [1]:
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert in_flight.recv(1024).startswith(b"HTTP/1.1 200")
        assert process.wait(timeout=20) in (0, -signal.SIGTERM)
        assert "HTTP/1.1" not in process.stderr.read(), "requests are counted, not logged"


@pytest.mark.parametrize(
    ("name", "given", "allowed"),
    [
        *[("FAILURE_RATE", g, "from 0 to 1") for g in ("", "a", "-0.1", "1.1", "nan")],
        *[("MODEL_LATENCY_SECONDS", g, "from 0 to 5") for g in ("", "5.1", "inf")],
        ("MODEL_NAME", "", "at least 1 character"),
        ("MODEL_VERSION", " ", "at least 1 character"),
    ],
)
def test_bad_setting_stops_the_start(name: str, given: str, allowed: str) -> None:
    with service(**{name: given}) as process:
        _, log = process.communicate(timeout=20)
    assert process.returncode == 1
    assert log == f"{name} must be {allowed}, not {given!r}\n"
