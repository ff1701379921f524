"""Tests of the service, and of what the files around it must agree on. They need no Docker.

Read it from top to bottom: the service in this process, its settings, the service as a process,
the customers, the files around it, the queries, the demo model.
"""

import asyncio
import importlib.util
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import AsyncMock, patch

import httpx
import pytest
import yaml  # uvicorn[standard] brings it along.
from fastapi import FastAPI, HTTPException
from httpx import AsyncClient
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families
from pytest import LogCaptureFixture, MonkeyPatch, approx

import app

pytestmark = pytest.mark.anyio  # AnyIO, which FastAPI brings along, runs the async tests.

FOLDER = Path(__file__).parent
LABELS = {"model_name": app.settings.MODEL_NAME, "version": app.settings.MODEL_VERSION}
LEGIT = {"amount": 42.5}
JSON = {"Content-Type": "application/json"}
FOUR_KIB = json.dumps(LEGIT).encode().ljust(4 * 1024)


def read(name: str) -> str:
    """A file of the project."""
    return (FOLDER / name).read_text(encoding="utf-8")


# ------------------------------------------------- The service in this process


@pytest.fixture
def anyio_backend() -> str:
    """The event loop of the service."""
    return "asyncio"


@pytest.fixture(autouse=True)
def ideal_model(monkeypatch: MonkeyPatch) -> None:
    """The model neither waits nor fails, unless a test says so."""
    monkeypatch.setattr(app.settings, "FAILURE_RATE", 0)
    monkeypatch.setattr(app.settings, "MODEL_LATENCY_SECONDS", 0)


@pytest.fixture
async def client() -> AsyncIterator[AsyncClient]:
    """A client of the service in this process, where the tests can change it."""
    transport = httpx.ASGITransport(app=app.app)
    async with AsyncClient(transport=transport, base_url="http://api") as client:
        yield client


def sample(name: str, **labels: str) -> float:
    """What a series of the service says."""
    value = REGISTRY.get_sample_value(name, LABELS | labels)
    assert value is not None, f"no series {name} {labels}"
    return value


def counts() -> dict[str, float]:
    """What the service has counted so far."""
    return {
        "predictions": sample("ml_predictions_total"),
        "invalid_input": sample("ml_prediction_errors_total", reason="invalid_input"),
        "model_failure": sample("ml_prediction_errors_total", reason="model_failure"),
        "in_progress": sample("ml_predictions_in_progress"),
        "model_calls": sample("ml_prediction_duration_seconds_count"),
        "scores": sample("ml_prediction_score_count"),
        "legit_scores": sample("ml_prediction_score_bucket", le=str(app.THRESHOLD)),
    }


@contextmanager
def counts_exactly(**expected: int) -> Iterator[None]:
    """Check that a block counts this and nothing else."""
    before = counts()
    yield
    changes = {name: value - before[name] for name, value in counts().items()}
    assert {name: change for name, change in changes.items() if change} == expected


def use_model(monkeypatch: MonkeyPatch, answer: object) -> None:
    """Let the model answer this, or raise it."""
    monkeypatch.setattr(app, "infer", AsyncMock(side_effect=[answer]))


@pytest.mark.parametrize(
    ("score", "answered", "prediction", "legit_scores"),
    [
        pytest.param(0.5, 0.5, "legit", {"legit_scores": 1}, id="a half"),
        pytest.param(0.500001, 0.500001, "fraud", {}, id="over a half"),
        pytest.param(
            Decimal("0.50000000000000000001"), 0.5, "legit", {"legit_scores": 1}, id="Decimal"
        ),
    ],
)
async def test_over_the_threshold_is_fraud_in_the_answer_and_in_the_metrics(
    client: AsyncClient,
    monkeypatch: MonkeyPatch,
    score: object,
    answered: float,
    prediction: str,
    legit_scores: dict[str, int],
) -> None:
    use_model(monkeypatch, score)
    monkeypatch.setattr(app.settings, "MODEL_NAME", "m")
    monkeypatch.setattr(app.settings, "MODEL_VERSION", "v9")
    with counts_exactly(predictions=1, model_calls=1, scores=1, **legit_scores):
        answer = await client.post("/predict", json=LEGIT)
    assert answer.status_code == 200
    assert answer.json() == {
        "score": answered,
        "prediction": prediction,
        "model_name": "m",
        "version": "v9",
    }


async def test_the_simulated_latency_has_the_right_median_and_p99(monkeypatch: MonkeyPatch) -> None:
    sleep = AsyncMock()
    monkeypatch.setattr(app, "asyncio", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(app.settings, "MODEL_LATENCY_SECONDS", 0.05)
    random.seed(1)
    for _ in range(500):
        await app.simulate_latency_and_failures()
    waits = sorted(call.args[0] for call in sleep.await_args_list)
    assert waits[250] == approx(0.05, rel=0.1), "the median"
    assert waits[495] == approx(0.15, rel=0.1), "p99"


async def test_the_model_fails_at_its_rate(client: AsyncClient, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(app.settings, "FAILURE_RATE", 0.3)
    random.seed(1)
    statuses = [(await client.post("/predict", json=LEGIT)).status_code for _ in range(500)]
    assert statuses.count(500) == approx(150, abs=30)
    assert statuses.count(200) == 500 - statuses.count(500)


async def test_800_requests_at_once_are_counted_exactly(
    client: AsyncClient, monkeypatch: MonkeyPatch
) -> None:
    """200 requests have a negative amount. The other 600 meet in the model, and then 200 of them fail."""
    all_are_in_the_model = asyncio.Barrier(600)
    in_progress = []

    async def infer(transaction: app.Transaction) -> float:
        await all_are_in_the_model.wait()
        in_progress.append(counts()["in_progress"])
        if transaction.amount == 1:
            raise ValueError("boom")
        return 0.1

    monkeypatch.setattr(app, "infer", infer)
    bodies = [{"amount": number % 4 - 1} for number in range(800)]
    with counts_exactly(
        predictions=800,
        invalid_input=200,
        model_failure=200,
        model_calls=600,
        scores=400,
        legit_scores=400,
    ):
        async with asyncio.timeout(60):
            answers = await asyncio.gather(*(client.post("/predict", json=body) for body in bodies))
    statuses = [answer.status_code for answer in answers]
    assert [statuses.count(status) for status in (200, 422, 500)] == [400, 200, 200]
    assert max(in_progress) == 600


async def test_the_model_and_its_simulated_latency_are_timed(
    client: AsyncClient, monkeypatch: MonkeyPatch
) -> None:
    async def infer(_: app.Transaction) -> float:
        await asyncio.sleep(0.1)
        return 0.1

    monkeypatch.setattr(app, "infer", infer)
    monkeypatch.setattr(app.settings, "MODEL_LATENCY_SECONDS", 0.1)
    monkeypatch.setattr(random, "lognormvariate", lambda mu, sigma: 1)
    start, before = time.monotonic(), sample("ml_prediction_duration_seconds_sum")
    await client.post("/predict", json=LEGIT)
    measured = sample("ml_prediction_duration_seconds_sum") - before
    assert 0.19 < measured < time.monotonic() - start


def use_hanging_model(monkeypatch: MonkeyPatch) -> tuple[asyncio.Event, asyncio.Event]:
    """Let the model set one event when it starts, and wait for the other."""
    started, go_on = asyncio.Event(), asyncio.Event()

    async def infer(_: app.Transaction) -> float:
        started.set()
        await go_on.wait()
        return 0.1

    monkeypatch.setattr(app, "infer", infer)
    return started, go_on


async def test_a_request_is_counted_when_it_ends(
    client: AsyncClient, monkeypatch: MonkeyPatch
) -> None:
    """While the model computes, the request is in progress and in no other metric."""
    started, go_on = use_hanging_model(monkeypatch)
    with counts_exactly(in_progress=1):
        request = asyncio.create_task(client.post("/predict", json=LEGIT))
        await asyncio.wait_for(started.wait(), timeout=60)
    with counts_exactly(in_progress=-1, predictions=1, model_calls=1, scores=1, legit_scores=1):
        go_on.set()
        await request


async def test_a_cancelled_request_is_a_model_failure(
    client: AsyncClient, monkeypatch: MonkeyPatch
) -> None:
    """uvicorn cancels those that are still in flight 8 s after SIGTERM."""
    started, _ = use_hanging_model(monkeypatch)
    with counts_exactly(predictions=1, model_failure=1, model_calls=1):
        request = asyncio.create_task(client.post("/predict", json=LEGIT))
        await asyncio.wait_for(started.wait(), timeout=60)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request


NOT_A_SCORE = [None, {"score": 0.1}, "high", 1.5, -0.1, math.nan]
RAISED = [
    ZeroDivisionError("boom"),
    HTTPException(404),
    TimeoutError(),
    ExceptionGroup("two", [ValueError(), KeyError()]),
]


@pytest.mark.parametrize("answer", [*NOT_A_SCORE, *RAISED], ids=repr)
async def test_whatever_goes_wrong_in_the_model_is_a_model_failure(
    client: AsyncClient, monkeypatch: MonkeyPatch, answer: object
) -> None:
    use_model(monkeypatch, answer)
    with counts_exactly(predictions=1, model_failure=1, model_calls=1):
        response = await client.post("/predict", json=LEGIT)
    assert response.status_code == 500
    assert response.json() == {"detail": "The model failed. The log says why."}


class Panic(BaseException):
    """What a model written in Rust may raise."""


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), Panic()], ids=repr)
async def test_what_is_no_exception_is_counted_and_passes_through(
    client: AsyncClient, monkeypatch: MonkeyPatch, error: BaseException
) -> None:
    use_model(monkeypatch, error)
    counted = counts_exactly(predictions=1, model_failure=1, model_calls=1)
    with counted, pytest.raises(type(error)):
        await client.post("/predict", json=LEGIT)


def logged(caplog: LogCaptureFixture) -> str:
    """The only entry that the service has logged, as text."""
    (record,) = (record for record in caplog.records if record.name == "uvicorn.error")
    return caplog.handler.format(record)


async def test_a_failure_is_logged_with_its_traceback(
    client: AsyncClient, monkeypatch: MonkeyPatch, caplog: LogCaptureFixture
) -> None:
    use_model(monkeypatch, ZeroDivisionError("boom"))
    await client.post("/predict", json=LEGIT)
    assert "The model failed: ZeroDivisionError\nTraceback" in logged(caplog)
    assert "boom" in logged(caplog)


async def test_a_simulated_failure_is_logged_without_a_traceback(
    client: AsyncClient, monkeypatch: MonkeyPatch, caplog: LogCaptureFixture
) -> None:
    monkeypatch.setattr(app.settings, "FAILURE_RATE", 1)
    with counts_exactly(predictions=1, model_failure=1, model_calls=1):
        await client.post("/predict", json=LEGIT)
    assert logged(caplog).endswith("The model failed: SimulatedError")


async def test_the_same_error_raised_again_is_logged_at_the_same_length(
    client: AsyncClient, monkeypatch: MonkeyPatch, caplog: LogCaptureFixture
) -> None:
    """As by a model that could not be loaded, and raises the reason on each call."""
    monkeypatch.setattr(app, "infer", AsyncMock(side_effect=RuntimeError("no model")))
    lengths = set()
    for _ in range(10):
        caplog.clear()
        await client.post("/predict", json=LEGIT)
        lengths.add(len(logged(caplog)))
    assert len(lengths) == 1


class BadInput(NamedTuple):
    """A body that is refused, and what the answer says."""

    body: bytes
    status: int
    says: str
    headers: dict[str, str] = JSON


BAD_INPUT = {
    "no amount": BadInput(b"{}", 422, "missing"),
    "unknown field": BadInput(b'{"amount": 1, "no_such_field": 1}', 422, "extra_forbidden"),
    "amount as text": BadInput(b'{"amount": "12"}', 422, "float_type"),
    "number as bool": BadInput(b'{"amount": 1, "international": 1}', 422, "bool_type"),
    "negative": BadInput(b'{"amount": -0.01}', 422, "greater_than_equal"),
    "too large": BadInput(b'{"amount": 1000000.01}', 422, "less_than_equal"),
    "4,000 digits": BadInput(b'{"amount": 1' + b"0" * 4_000 + b"}", 422, "float_type"),
    "surrogate": BadInput(b'{"amount": 1, "\\ud800": 1}', 422, "string_unicode"),
    "broken JSON": BadInput(b'{"amount": 4', 422, "json_invalid"),
    "not UTF-8": BadInput(b'{"amount": 1, "\xff": 1}', 400, "error parsing the body"),
    "over 4 KiB": BadInput(FOUR_KIB + b" ", 413, "Content Too Large"),
    "not sent as JSON": BadInput(
        b'{"amount": 1}', 415, "Send the header Content-Type: application/json.", headers={}
    ),
}


@pytest.mark.parametrize("bad", BAD_INPUT.values(), ids=BAD_INPUT)
async def test_bad_input_is_refused_and_counted(client: AsyncClient, bad: BadInput) -> None:
    with counts_exactly(predictions=1, invalid_input=1):
        answer = await client.post("/predict", content=bad.body, headers=bad.headers)
    assert answer.status_code == bad.status
    assert bad.says in answer.text


@pytest.fixture
async def client_behind_a_proxy() -> AsyncIterator[AsyncClient]:
    """A client of the service behind a proxy, which puts a prefix before each path."""
    transport = httpx.ASGITransport(app=app.app, root_path="/fraud")
    async with AsyncClient(transport=transport, base_url="http://api/fraud") as client:
        yield client


async def test_bad_input_is_counted_behind_a_prefix(client_behind_a_proxy: AsyncClient) -> None:
    with counts_exactly(predictions=1, invalid_input=1):
        answer = await client_behind_a_proxy.post("/predict", json={})
    assert answer.status_code == 422


async def test_the_root_leads_to_the_documentation_behind_a_prefix(
    client_behind_a_proxy: AsyncClient,
) -> None:
    answer = await client_behind_a_proxy.get("/")
    assert answer.headers["location"] == "/fraud/docs"


async def test_bad_input_is_counted_in_an_app_that_mounts_this_one() -> None:
    outer = FastAPI()
    outer.mount("/fraud", app.app)
    transport = httpx.ASGITransport(app=outer)
    async with AsyncClient(transport=transport, base_url="http://api") as client:
        with counts_exactly(predictions=1, invalid_input=1):
            answer = await client.post("/fraud/predict", json={})
    assert answer.status_code == 422


async def in_chunks(body: bytes) -> AsyncIterator[bytes]:
    """A body that is sent without its length."""
    for start in range(0, len(body), 1024):
        yield body[start : start + 1024]


async def test_a_body_of_4_kib_is_the_largest_that_is_read(client: AsyncClient) -> None:
    with counts_exactly(predictions=1, model_calls=1, scores=1, legit_scores=1):
        answer = await client.post("/predict", content=in_chunks(FOUR_KIB), headers=JSON)
    assert answer.status_code == 200
    with counts_exactly(predictions=1, invalid_input=1):
        answer = await client.post("/predict", content=in_chunks(FOUR_KIB + b" "), headers=JSON)
    assert answer.status_code == 413


async def test_a_deeply_nested_body_is_refused_and_counted(client: AsyncClient) -> None:
    """How deep a body is too deep depends on Python."""
    with counts_exactly(predictions=1, invalid_input=1):
        answer = await client.post("/predict", content=b"[" * 4_000, headers=JSON)
    assert answer.status_code in (400, 422)


async def test_a_422_names_each_wrong_field_and_repeats_no_input(client: AsyncClient) -> None:
    body = b'{"amount": NaN, "international": "yes"}'
    answer = await client.post("/predict", content=body, headers=JSON)
    wrong = answer.json()["detail"]
    assert [one["loc"] for one in wrong] == [["body", "amount"], ["body", "international"]]
    assert all(one.keys() == {"type", "loc", "msg"} for one in wrong)


async def test_the_documentation_names_each_status(client: AsyncClient) -> None:
    schema = (await client.get("/openapi.json")).json()
    documented = {int(status) for status in schema["paths"]["/predict"]["post"]["responses"]}
    assert documented == {200, 500} | {bad.status for bad in BAD_INPUT.values()}


@pytest.fixture
def added_routes() -> Iterator[None]:
    """Two routes that a class might add."""
    routes = list(app.app.router.routes)

    @app.app.get("/added-get")
    async def added_get(n: int) -> int:
        return n

    @app.app.post("/added-post", max_body_size=4 * 1024)
    async def added_post(transaction: app.Transaction) -> None:
        pass

    yield
    app.app.router.routes[:] = routes


@pytest.mark.usefixtures("added_routes")
@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        pytest.param("GET", "/added-get?n=x", b"", 422, id="query"),
        pytest.param("POST", "/added-post", b"{}", 422, id="body"),
        pytest.param("POST", "/added-post", b"\xff", 400, id="not UTF-8"),
        pytest.param("POST", "/added-post", FOUR_KIB + b" ", 413, id="over 4 KiB"),
        pytest.param("GET", "/no", b"", 404, id="no such path"),
        pytest.param("GET", "/predict", b"", 405, id="no such method"),
    ],
)
async def test_what_is_no_request_for_a_prediction_is_not_counted(
    client: AsyncClient, method: str, path: str, body: bytes, status: int
) -> None:
    with counts_exactly():
        answer = await client.request(method, path, content=body, headers=JSON)
    assert answer.status_code == status


async def test_health_answers_and_is_not_counted(client: AsyncClient) -> None:
    with counts_exactly():
        answer = await client.get("/health")
    assert answer.json() == {"status": "ok"}


async def test_the_root_leads_to_the_documentation(client: AsyncClient) -> None:
    answer = await client.get("/", follow_redirects=True)
    assert answer.status_code == 200
    assert "swagger" in answer.text


async def test_metrics_have_the_content_type_that_prometheus_expects(client: AsyncClient) -> None:
    answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")


async def test_metrics_have_no_created_series(client: AsyncClient) -> None:
    assert "_created" not in (await client.get("/metrics")).text


# ------------------------------------------------------------------- Settings


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("FAILURE_RATE", ""),
        ("FAILURE_RATE", "a"),
        ("FAILURE_RATE", "-0.1"),
        ("FAILURE_RATE", "1.1"),
        ("FAILURE_RATE", "nan"),
        ("MODEL_LATENCY_SECONDS", "-1"),
        ("MODEL_LATENCY_SECONDS", "5.1"),
        ("MODEL_NAME", " "),
        ("MODEL_VERSION", ""),
    ],
)
def test_a_bad_setting_stops_the_start(monkeypatch: MonkeyPatch, name: str, given: str) -> None:
    monkeypatch.setenv(name, given)
    with pytest.raises(SystemExit, match=rf"^{name}='{given}': \w[^\n]+$"):
        runpy.run_path(str(FOLDER / "app.py"))


@pytest.mark.parametrize(
    ("name", "given", "meant"),
    [
        ("FAILURE_RATE", "0", 0),
        ("FAILURE_RATE", "1", 1),
        ("MODEL_LATENCY_SECONDS", "5", 5),
        ("MODEL_VERSION", " v2 ", "v2"),
    ],
)
def test_a_good_setting_is_taken(name: str, given: str, meant: object) -> None:
    assert getattr(app.Settings.model_validate({name: given}), name) == meant


# ---------------------------------------------------- The service as a process


def command() -> list[str]:
    """What the image starts, to be run here."""
    match = re.search(r"^CMD (\[.+?\])$", read("Dockerfile"), re.MULTILINE | re.DOTALL)
    assert match, "the Dockerfile has no CMD [...]"
    words = json.loads(match[1].replace("\\\n", ""))
    return [sys.executable, *words[1:]] if words[0] == "python" else [sys.executable, "-m", *words]


class Service(NamedTuple):
    """A service that runs as a process of its own, at a port of this machine."""

    process: subprocess.Popen[str]
    port: int

    def connect(self, request: bytes) -> socket.socket:
        """Send the beginning of a request."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(request)
        return connection

    def samples(self) -> dict[tuple[str, str | None], float]:
        """What /metrics says of this version, by name and reason."""
        text = httpx.get(f"http://127.0.0.1:{self.port}/metrics", trust_env=False, timeout=60).text
        return {
            (sample.name, sample.labels.get("reason")): sample.value
            for metric in text_string_to_metric_families(text)
            for sample in metric.samples
            if sample.labels.get("model_name") == "m" and sample.labels.get("version") == "v9"
        }


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Give a process some time for something."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture
def service(request: pytest.FixtureRequest, monkeypatch: MonkeyPatch) -> Iterator[Service]:
    """The service as the image starts it, but on a free port of this machine only."""
    monkeypatch.setenv("FAILURE_RATE", getattr(request, "param", "0"))
    monkeypatch.setenv("MODEL_LATENCY_SECONDS", "1")
    monkeypatch.setenv("MODEL_NAME", "m")
    monkeypatch.setenv("MODEL_VERSION", "v9")
    monkeypatch.setenv("WEB_CONCURRENCY", "3")  # As some platforms do.
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def is_up() -> bool:
        assert process.poll() is None, "the service ended"
        with socket.socket() as connection:
            return connection.connect_ex(("127.0.0.1", port)) == 0

    with subprocess.Popen(
        [*command(), "--host", "127.0.0.1", "--port", str(port)],
        cwd=FOLDER,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            wait_until(is_up, "the service does not listen")
            yield Service(process, port)
        finally:
            process.terminate()


# Without its body, {"amount": 1}.
REQUEST = (
    b"POST /predict HTTP/1.1\r\n"
    b"Host: a\r\n"
    b"Content-Type: application/json\r\n"
    b"Content-Length: 13\r\n"
    b"\r\n"
)


def test_bad_settings_end_the_process_with_a_line_each(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv("FAILURE_RATE", "2")
    monkeypatch.setenv("MODEL_NAME", "")
    run = subprocess.run(command(), cwd=FOLDER, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stdout + run.stderr == (
        "FAILURE_RATE='2': Input should be less than or equal to 1\n"
        "MODEL_NAME='': String should have at least 1 character\n"
    )


def test_every_series_starts_at_0(service: Service) -> None:
    samples = service.samples()
    for series in (
        ("ml_predictions_total", None),
        ("ml_prediction_errors_total", "invalid_input"),
        ("ml_prediction_errors_total", "model_failure"),
        ("ml_predictions_in_progress", None),
        ("ml_prediction_duration_seconds_count", None),
        ("ml_prediction_score_count", None),
    ):
        assert samples[series] == 0


def test_a_client_that_leaves_while_it_sends_is_counted(service: Service) -> None:
    bad_input = ("ml_prediction_errors_total", "invalid_input")
    service.connect(REQUEST + b'{"amount"').close()
    wait_until(lambda: service.samples()[bad_input] == 1, "it is not counted")
    assert service.samples()["ml_predictions_total", None] == 1


def test_a_request_that_asks_for_a_websocket_is_answered_and_counted(service: Service) -> None:
    """Some proxies set these headers on all requests."""
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    request = REQUEST.removesuffix(b"\r\n") + upgrade + b'{"amount": 1}'
    with service.connect(request) as connection:
        assert connection.recv(1024).startswith(b"HTTP/1.1 422"), "uvicorn drops its body"
    assert service.samples()["ml_predictions_total", None] == 1


def test_one_process_has_all_counts(service: Service) -> None:
    """Each scrape sees one process, whatever WEB_CONCURRENCY says."""
    for _ in range(12):
        httpx.post(f"http://127.0.0.1:{service.port}/predict", json={}, trust_env=False)
    seen = {service.samples()["ml_predictions_total", None] for _ in range(12)}
    assert seen == {12}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_a_request_in_flight_outlives_sigterm(service: Service) -> None:
    in_progress = ("ml_predictions_in_progress", None)
    with service.connect(REQUEST + b'{"amount": 1}') as connection:
        wait_until(lambda: service.samples()[in_progress] == 1, "it is not in progress")
        service.process.send_signal(signal.SIGTERM)
        assert connection.recv(1024).startswith(b"HTTP/1.1 200")
    assert service.process.wait(timeout=60) in (0, -signal.SIGTERM)


@pytest.mark.parametrize("service", ["1"], indirect=True, ids=["each call fails"])
def test_failures_are_logged_and_requests_are_not(service: Service) -> None:
    with service.connect(REQUEST + b'{"amount": 1}') as connection:
        assert connection.recv(1024).startswith(b"HTTP/1.1 500")
    service.process.terminate()
    assert service.process.stdout
    log = service.process.stdout.read()
    assert "The model failed: SimulatedError" in log
    assert "POST" not in log


def test_python_starts_it_on_this_machine_only() -> None:
    """Of uvicorn, this prints what it is asked to do."""
    script = (
        "import runpy, uvicorn; uvicorn.run = lambda app, **options: print(options);"
        "runpy.run_path('app.py', None, '__main__')"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=FOLDER, capture_output=True, text=True, check=False
    )
    assert run.stdout == "{'workers': 1, 'ws': 'none'}\n", run.stdout + run.stderr


# -------------------------------------------------------------- The customers


def load_traffic(**settings: str) -> Any:
    """The script of the customers as a module, with these settings. It is not started."""
    spec = importlib.util.spec_from_file_location("traffic", FOLDER / ".traffic.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    with patch.dict(os.environ, settings):
        spec.loader.exec_module(module)
    return module


def test_the_largest_amount_of_the_customers_is_valid() -> None:
    traffic = load_traffic(TRAFFIC_AMOUNT="1000000")
    random.seed(1)
    amounts = [traffic.make_transaction()["amount"] for _ in range(100)]
    assert max(amounts) == 1_000_000


@pytest.fixture
def two_replicas(monkeypatch: MonkeyPatch) -> None:
    """DNS knows two replicas."""
    dns: dict[str, object] = {"model-api": ("model-api", [], ["10.0.0.1", "10.0.0.2"])}
    monkeypatch.setattr(socket, "gethostbyname_ex", dns.__getitem__)


@pytest.mark.usefixtures("two_replicas")
async def test_the_customers_are_answered_by_all_replicas(client: AsyncClient) -> None:
    addresses = []

    async def on_response(response: httpx.Response) -> None:
        addresses.append(f"{response.url.host}:{response.url.port}")
        assert response.status_code in (200, 422)

    client.event_hooks = {"response": [on_response]}
    send = load_traffic().send
    random.seed(1)
    for _ in range(200):
        await send(client)
    assert len(addresses) == 200
    assert addresses.count("10.0.0.1:8000") == approx(100, abs=30)
    assert addresses.count("10.0.0.2:8000") == approx(100, abs=30)


@pytest.mark.usefixtures("two_replicas")
@pytest.mark.parametrize(
    "error", [OSError(), httpx.ConnectError(""), httpx.ReadTimeout("")], ids=repr
)
async def test_the_customers_outlive_a_service_that_is_away(
    client: AsyncClient, error: Exception
) -> None:
    on_request = AsyncMock(side_effect=error)
    client.event_hooks = {"request": [on_request]}
    await load_traffic().send(client)
    on_request.assert_awaited_once()


@pytest.mark.usefixtures("two_replicas")
async def test_the_customers_give_up_a_request_that_hangs(
    client: AsyncClient, monkeypatch: MonkeyPatch
) -> None:
    """Otherwise the requests would pile up."""
    traffic = load_traffic()
    monkeypatch.setattr(traffic, "TIMEOUT_SECONDS", 0.01)
    use_hanging_model(monkeypatch)
    await asyncio.wait_for(traffic.send(client), timeout=60)


async def test_the_customers_keep_their_rate_and_do_not_wait_for_answers(
    monkeypatch: MonkeyPatch,
) -> None:
    traffic = load_traffic(TRAFFIC_RATE="9")
    sent, rates = [], []

    def no_gap(rate: float) -> float:
        rates.append(rate)
        return 0

    async def send(client: AsyncClient) -> None:
        sent.append(client)
        if len(sent) == 100:
            raise InterruptedError
        await asyncio.sleep(3600)

    monkeypatch.setattr(traffic, "send", send)
    monkeypatch.setattr(random, "expovariate", no_gap)
    with pytest.raises(ExceptionGroup):
        await asyncio.wait_for(traffic.main(), timeout=60)
    assert set(rates) == {9}


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("TRAFFIC_RATE", "0"),
        ("TRAFFIC_RATE", "201"),
        ("TRAFFIC_RATE", ""),
        ("TRAFFIC_AMOUNT", "0"),
        ("TRAFFIC_AMOUNT", "1000001"),
    ],
)
def test_a_bad_setting_stops_the_customers(name: str, given: str) -> None:
    with pytest.raises(SystemExit, match=rf"^{name}='{given}': \w[^\n]+$"):
        load_traffic(**{name: given})


# ------------------------------------------------------- The files around them

README = read("README.md")
PROMETHEUS = yaml.safe_load(read("prometheus.yml"))
RULE_GROUPS = yaml.safe_load(read(".prometheus/rules.yml"))["groups"]
RULES = [rule for group in RULE_GROUPS for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
DATA_SOURCES = yaml.safe_load(read(".grafana/datasources/prometheus.yml"))["datasources"]
DASHBOARD = json.loads(read(".grafana/dashboards/fraud-model.json"))
PANELS = {panel.get("title", ""): panel for panel in DASHBOARD["panels"]}
MARKS = {mark["name"]: mark for mark in DASHBOARD["annotations"]["list"]}
SERVICES = yaml.safe_load(read("docker-compose.yml"))["services"]


def passed_on(service: str) -> set[str]:
    """The variables that Compose passes on to a service, whatever their value."""
    variables = SERVICES[service]["environment"]
    if isinstance(variables, list):
        variables = dict(variable.partition("=")[::2] for variable in variables)
    return {name for name, value in variables.items() if not value or "${" + name in value}


def test_compose_passes_each_setting_on() -> None:
    assert {*app.Settings.model_fields} <= passed_on("model-api")
    assert {*load_traffic().Settings.model_fields} <= passed_on("traffic")


PORTS = [
    port if isinstance(port, str) else f"{port.get('host_ip')}:{port.get('published')}"
    for service in SERVICES.values()
    for port in service.get("ports", [])
]


@pytest.mark.parametrize("port", PORTS)
def test_a_port_is_open_to_this_machine_only(port: str) -> None:
    assert port.startswith(("127.0.0.1:", "[::1]:", "::1:"))


def service_discovery() -> dict[str, Any]:
    """How Prometheus finds the service."""
    (job,) = (job for job in PROMETHEUS["scrape_configs"] if job["job_name"] == "model-api")
    (discovery,) = job["dns_sd_configs"]
    return dict(discovery)


def test_the_service_is_asked_where_it_listens() -> None:
    assert "--port" not in command() or "8000" in command(), "uvicorn's own is 8000"
    assert service_discovery()["port"] == 8000
    assert "http://127.0.0.1:8000/health" in read("Dockerfile")


def test_requests_in_flight_end_before_docker_kills() -> None:
    """Docker waits for 10 s."""
    assert 0 < int(command()[command().index("--timeout-graceful-shutdown") + 1]) < 10


def data_source() -> dict[str, Any]:
    """The data source that a panel asks if it names none."""
    (default,) = (source for source in DATA_SOURCES if source.get("isDefault"))
    return dict(default)


def seconds(duration: str) -> int:
    """A duration of Prometheus."""
    return int(duration[:-1]) * {"s": 1, "m": 60}[duration[-1]]


def test_a_missed_scrape_leaves_no_gap() -> None:
    """Prometheus shows a value for as long as three scrapes take, or longer."""
    (look_back,) = re.findall(
        r"--query.lookback-delta=(\w+)", " ".join(SERVICES["prometheus"]["command"])
    )
    assert seconds(look_back) >= 3 * seconds(PROMETHEUS["global"]["scrape_interval"])


@pytest.mark.parametrize(
    ("service", "folder"), [("prometheus", "/prometheus"), ("grafana", "/var/lib/grafana")]
)
def test_the_data_of_a_service_outlive_its_container(service: str, folder: str) -> None:
    """The history, and the panels that a class has saved."""
    mounts = [str(volume) for volume in SERVICES[service]["volumes"]]
    assert any(re.search(rf"{service}-data\b.*{folder}(?![\w/-])", mount) for mount in mounts)


def test_grafana_starts_with_the_dashboard() -> None:
    home = SERVICES["grafana"]["environment"]["GF_USERS_HOME_PAGE"]
    assert home == f"/d/{DASHBOARD['uid']}"


def limit(alert: str) -> float:
    """The number that an alert compares with first."""
    match = re.search(r">\s*([\d.]+)", ALERTS[alert]["expr"])
    assert match, f"{alert} compares with no number"
    return float(match[1])


def boundaries(metric: str) -> list[float]:
    """Where the buckets of a histogram end, without infinity."""
    (found,) = (one for one in REGISTRY.collect() if one.name == metric)
    ends = [float(sample.labels["le"]) for sample in found.samples if "le" in sample.labels]
    return [end for end in ends if end < math.inf]


def test_the_buckets_of_the_duration_suit_its_alert() -> None:
    """One ends at the limit, so the share of calls within it is exact. A p95 can be on both sides."""
    ends = boundaries("ml_prediction_duration_seconds")
    assert limit("HighLatency") in ends
    assert max(ends) > limit("HighLatency")
    assert len([end for end in ends if end < limit("HighLatency")]) >= 3


def test_the_buckets_of_the_score_show_how_it_is_spread() -> None:
    ends = boundaries("ml_prediction_score")
    assert app.THRESHOLD in ends
    assert len(ends) >= 5


def red(title: str) -> float:
    """Where a panel turns red."""
    steps = PANELS[title]["fieldConfig"]["defaults"]["thresholds"]["steps"]
    (value,) = (step["value"] for step in steps if step["color"] == "red")
    return float(value)


ALERT_OF = {
    "Failed calls": "HighErrorRatio",
    "Latency, p95": "HighLatency",
    "Share of fraud": "PredictionDrift",
}


@pytest.mark.parametrize(("title", "alert"), ALERT_OF.items())
def test_a_tile_is_red_where_its_alert_fires(title: str, alert: str) -> None:
    (query,) = PANELS[title]["targets"]
    assert query["expr"] in ALERTS[alert]["expr"]
    assert red(title) == limit(alert)


@pytest.mark.parametrize(("title", "alert"), ALERT_OF.items())
def test_the_red_line_of_a_chart_is_the_limit_and_always_in_view(title: str, alert: str) -> None:
    (chart,) = (name for name in PANELS if name.startswith(title) and name.endswith("by version"))
    shown = PANELS[chart]["fieldConfig"]["defaults"]
    assert red(chart) == limit(alert)
    assert shown["unit"] == PANELS[title]["fieldConfig"]["defaults"]["unit"]
    assert shown["custom"]["thresholdsStyle"] == {"mode": "line"}
    assert shown["custom"]["axisSoftMax"] > limit(alert)


@pytest.mark.parametrize("alert", [*ALERT_OF.values(), "ModelApiDown"])
def test_a_firing_alert_is_marked_in_panels_that_are_there(alert: str) -> None:
    panels = {*MARKS[alert]["filter"]["ids"]}
    assert panels
    assert panels <= {panel["id"] for panel in PANELS.values()}
    assert MARKS[alert]["enable"]
    assert MARKS[alert]["datasource"]["uid"] == data_source()["uid"]


def test_a_quantile_is_the_one_of_its_legend() -> None:
    for query in PANELS["Latency of all versions"]["targets"]:
        for quantile in re.findall(r"histogram_quantile\(([\d.]+)", query["expr"]):
            assert query["legendFormat"] == f"p{float(quantile) * 100:.0f}"


def table(first_column: str) -> dict[str, list[str]]:
    """The rows of a table of the README, by their first cell."""
    lines = README.partition(f"\n| {first_column} |")[2].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    assert rows, f"the README has no table of each {first_column}"
    return {row[0]: row[1:] for row in rows}


def test_the_readme_has_the_default_of_each_setting() -> None:
    settings = app.Settings.model_fields | load_traffic().Settings.model_fields
    ports = re.findall(r"\$\{(\w+):-([^}]+)\}", read("docker-compose.yml"))
    defaults = {name: str(field.default) for name, field in settings.items()} | dict(ports)
    assert {name: row[0] for name, row in table("Variable").items()} == defaults


@pytest.mark.parametrize("alert", ALERT_OF.values())
def test_the_readme_has_the_limit_of_an_alert(alert: str) -> None:
    (row,) = (" ".join(row) for row in table("Column").values() if alert in row)
    assert re.search(rf"over ({limit(alert)} s|{limit(alert):.0%})", row)


# ---------------------------------------------------------------- The queries

needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"),
    reason="promtool is not here. With the stack running: docker compose exec prometheus"
    " promtool test rules /etc/prometheus/.prometheus/rules_test.yml",
)


def promtool(*arguments: str | Path) -> None:
    """Run Prometheus's own tool, which must find nothing wrong."""
    run = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@needs_promtool
def test_prometheus_takes_its_configuration() -> None:
    promtool("check", "config", FOLDER / "prometheus.yml")


@needs_promtool
def test_the_rules_pass_their_own_tests() -> None:
    promtool("test", "rules", FOLDER / ".prometheus/rules_test.yml")


@needs_promtool
def test_the_alert_that_the_class_writes_passes_its_test(tmp_path: Path) -> None:
    (alert,) = re.findall(r"```yaml\n( +- alert: .+?)```", README, re.DOTALL)
    (test,) = re.findall(r"```yaml\n( +- name: .+?)```", README, re.DOTALL)
    rules = {"groups": [{"name": "class", "rules": yaml.safe_load(alert)}]}
    tests = yaml.safe_load(read(".prometheus/rules_test.yml")) | {"tests": yaml.safe_load(test)}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules), encoding="utf-8")
    (tmp_path / "rules_test.yml").write_text(yaml.safe_dump(tests), encoding="utf-8")
    promtool("test", "rules", tmp_path / "rules_test.yml")


# The README has a class add these.
ADDED_SERIES = [
    ("ml_transactions_total", {"international": "False"}),
    ("ml_transactions_total", {"international": "True"}),
    ("ml_prediction_outcomes_total", {"prediction": "fraud", "truth": "fraud"}),
]


def growing_series() -> dict[str, str]:
    """All that Prometheus gets of a v1 and a v2, at 20 a second, evenly spread over the buckets."""
    found = [
        (sample.name, sample.labels) for metric in REGISTRY.collect() for sample in metric.samples
    ]
    series = {}
    for version in ("v1", "v2"):
        target = {"job": "model-api", "instance": version}
        for name, labels in [*found, *((name, LABELS | more) for name, more in ADDED_SERIES)]:
            labels = labels | target | ({"version": version} if "version" in labels else {})
            text = ", ".join(f"{label}={json.dumps(value)}" for label, value in labels.items())
            step = 100 * min(1, float(labels.get("le", 1)))
            series[f"{name}{{{text}}}"] = f"0+{step}x60"
    series['up{job="model-api", instance="v1"}'] = "1x60"
    series['up{job="model-api", instance="v2"}'] = "0x60"
    return series


def finds_data(query: str, legend: str = "") -> dict[str, Any]:
    """An expectation: the query finds data, and that of both versions if its legend names them."""
    query = re.sub(r"\$__\w+", "30s", query)  # The variables that Grafana replaces.
    if legend != "{{version}}":
        samples = [{"labels": "{}", "value": 1}]
        return {"expr": f"group({query})", "eval_time": "5m", "exp_samples": samples}
    samples = [{"labels": f'{{version="{version}"}}', "value": 1} for version in ("v1", "v2")]
    return {"expr": f"group by (version) ({query})", "eval_time": "5m", "exp_samples": samples}


@needs_promtool
@pytest.mark.skipif(sys.platform != "linux", reason="Memory and CPU are measured on Linux only.")
def test_each_query_finds_data(tmp_path: Path) -> None:
    """Those of the panels, of the marks and of the README, when all alerts fire."""
    queries = [
        finds_data(query["expr"], query.get("legendFormat", ""))
        for panel in PANELS.values()
        for query in panel.get("targets", [])
    ]
    queries += [finds_data(mark["target"]["expr"]) for mark in MARKS.values() if "target" in mark]
    queries += [
        finds_data(query)
        for query in re.findall(r"^ *```promql\n(.+?)```", README, re.MULTILINE | re.DOTALL)
    ]
    test = {
        "interval": "5s",
        "input_series": [
            {"series": name, "values": values} for name, values in growing_series().items()
        ],
        "promql_expr_test": queries,
    }
    rules = str(FOLDER / ".prometheus/rules.yml")
    tests = {"rule_files": [rules], "evaluation_interval": "5s", "tests": [test]}
    (tmp_path / "queries_test.yml").write_text(yaml.safe_dump(tests), encoding="utf-8")
    promtool("test", "rules", tmp_path / "queries_test.yml")


# ------------------------------------------------------------- The demo model
#
# These know its scores. With a model of your own: pytest -k "not demo_model"


@pytest.mark.parametrize(
    ("transaction", "prediction", "score"),
    [
        pytest.param({"amount": 0}, "legit", 0.0015, id="nothing"),
        pytest.param({"amount": 42.5}, "legit", 0.0614, id="everyday"),
        pytest.param({"amount": 42.5, "international": True}, "legit", 0.1642, id="abroad"),
        pytest.param({"amount": 9000, "international": True}, "fraud", 0.9760, id="large, abroad"),
        pytest.param({"amount": 1_000_000}, "fraud", 0.9993, id="largest"),
    ],
)
async def test_the_demo_model_scores_a_transaction(
    client: AsyncClient, transaction: dict[str, object], prediction: str, score: float
) -> None:
    answer = await client.post("/predict", json=transaction)
    assert answer.status_code == 200
    assert answer.json() == {"score": approx(score, abs=1e-4), "prediction": prediction, **LABELS}


EXAMPLES = re.findall(r"-d '(.+?)' .+/predict\n```\n\n```json\n(.+)\n```", README)
assert len(EXAMPLES) >= 3, "the README has too few examples"


@pytest.mark.parametrize(("body", "answer"), EXAMPLES)
async def test_an_example_of_the_readme_is_true_of_the_demo_model(
    client: AsyncClient, monkeypatch: MonkeyPatch, body: str, answer: str
) -> None:
    monkeypatch.setattr(app.settings, "MODEL_NAME", "fraud_model")
    monkeypatch.setattr(app.settings, "MODEL_VERSION", "v1")
    expected = json.loads(answer)
    if "score" in expected:
        expected["score"] = approx(expected["score"])  # Its last digit depends on the machine.
    assert (await client.post("/predict", content=body, headers=JSON)).json() == expected


@pytest.mark.parametrize(
    ("amount", "least", "most"),
    [
        pytest.param("50", 0.01, 0.05, id="usual"),
        pytest.param("500", 0.3, 0.5, id="drift"),
    ],
)
async def test_the_demo_model_finds_more_fraud_if_the_amounts_grow(
    client: AsyncClient,
    amount: str,
    least: float,
    most: float,
) -> None:
    traffic = load_traffic(TRAFFIC_AMOUNT=amount)
    random.seed(1)
    answers = [await client.post("/predict", json=traffic.make_transaction()) for _ in range(2_000)]
    invalid = [answer for answer in answers if answer.status_code == 422]
    fraud = [answer for answer in answers if '"fraud"' in answer.text]
    assert 0.01 < len(invalid) / 2_000 < 0.03
    assert least < len(fraud) / (2_000 - len(invalid)) < most
