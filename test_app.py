"""Tests of the service and of the files around it. They need no network and no Docker.

Read it from top to bottom: the service in this process, its settings, the service as a process,
the traffic, the stack, the rules, the dashboard, the README, and the queries in all of them.
"""

import asyncio
import json
import math
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import AsyncMock

import httpx
import pytest
import yaml
from fastapi import HTTPException
from httpx import AsyncClient
from prometheus_client import REGISTRY
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
    async with AsyncClient(
        transport=httpx.ASGITransport(app.app),
        base_url="http://api",
        event_hooks={"response": [check_documented]},
    ) as client:
        yield client


async def check_documented(response: httpx.Response) -> None:
    """Check each answer in each test: OpenAPI names its status and its content type."""
    path = app.app.openapi()["paths"].get(response.request.url.path, {})
    if operation := path.get(response.request.method.lower()):
        documented = operation["responses"][str(response.status_code)]["content"]
        assert response.headers["content-type"].partition(";")[0] in documented


async def chunks(body: bytes) -> AsyncIterator[bytes]:
    """A body that is sent without its length."""
    for start in range(0, len(body), 1024):
        yield body[start : start + 1024]


def sample(name: str, **labels: str) -> float:
    """What a series of the service says."""
    value = REGISTRY.get_sample_value(name, LABELS | labels)
    assert value is not None, f"no series {name} {labels}"
    return value


def counts() -> Counter[str]:
    """What the service has counted so far."""
    samples = {
        "predictions": sample("ml_predictions_total"),
        "invalid_input": sample("ml_prediction_errors_total", reason="invalid_input"),
        "model_failure": sample("ml_prediction_errors_total", reason="model_failure"),
        "in_progress": sample("ml_predictions_in_progress"),
        "model_calls": sample("ml_prediction_duration_seconds_count"),
        "scores": sample("ml_prediction_score_count"),
        "legit_scores": sample("ml_prediction_score_bucket", le="0.5"),
    }
    return Counter({name: int(value) for name, value in samples.items()})


@contextmanager
def counted(**expected: int) -> Iterator[None]:
    """Check that a block counts exactly this."""
    before = counts()
    yield
    assert {name: n - before[name] for name, n in counts().items() if n != before[name]} == expected


def use_model(monkeypatch: MonkeyPatch, answer: object) -> None:
    """Let the model answer this, or raise it."""
    monkeypatch.setattr(app, "infer", AsyncMock(side_effect=[answer]))


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
async def test_the_model_scores_a_transaction(
    client: AsyncClient, transaction: dict[str, object], prediction: str, score: float
) -> None:
    answer = await client.post("/predict", json=transaction)
    assert answer.status_code == 200
    assert answer.json() == {"prediction": prediction, "score": approx(score, abs=1e-4), **LABELS}


@pytest.mark.parametrize(
    ("score", "prediction", "legit_scores"),
    [
        pytest.param(0.5, {"prediction": "legit"}, {"legit_scores": 1}, id="a half"),
        pytest.param(0.500001, {"prediction": "fraud"}, {}, id="over a half"),
    ],
)
async def test_over_a_half_is_fraud_in_the_answer_and_in_the_metrics(
    client: AsyncClient,
    monkeypatch: MonkeyPatch,
    score: float,
    prediction: dict[str, str],
    legit_scores: dict[str, int],
) -> None:
    use_model(monkeypatch, score)
    with counted(predictions=1, model_calls=1, scores=1, **legit_scores):
        answer = await client.post("/predict", json=LEGIT)
    assert answer.json() == {**prediction, "score": score, **LABELS}


@pytest.mark.parametrize("send", [bytes, chunks], ids=["with its length", "in chunks"])
async def test_a_body_of_4_kib_is_read(client: AsyncClient, send: Callable[[bytes], Any]) -> None:
    answer = await client.post("/predict", content=send(FOUR_KIB), headers=JSON)
    assert answer.status_code == 200


async def test_the_simulated_latency_has_the_right_median_and_p99(monkeypatch: MonkeyPatch) -> None:
    sleep = AsyncMock()
    monkeypatch.setattr(asyncio, "sleep", sleep)
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
    with counted(
        predictions=800,
        invalid_input=200,
        model_failure=200,
        model_calls=600,
        scores=400,
        legit_scores=400,
    ):
        async with asyncio.timeout(60):
            answers = await asyncio.gather(*(client.post("/predict", json=body) for body in bodies))
    assert Counter(answer.status_code for answer in answers) == {200: 400, 422: 200, 500: 200}
    assert max(in_progress) == 600


async def time_a_call(client: AsyncClient) -> tuple[float, float]:
    """The duration of a call by the metric, and by the clock of the client, in seconds."""
    start, before = time.monotonic(), sample("ml_prediction_duration_seconds_sum")
    await client.post("/predict", json=LEGIT)
    return sample("ml_prediction_duration_seconds_sum") - before, time.monotonic() - start


async def test_the_model_is_timed(client: AsyncClient, monkeypatch: MonkeyPatch) -> None:
    async def infer(_: app.Transaction) -> float:
        await asyncio.sleep(0.1)
        return 0.1

    monkeypatch.setattr(app, "infer", infer)
    measured, took = await time_a_call(client)
    assert 0.09 < measured < took


async def test_the_simulated_latency_is_timed(
    client: AsyncClient, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(app.settings, "MODEL_LATENCY_SECONDS", 0.1)
    monkeypatch.setattr(random, "lognormvariate", lambda mu, sigma: 1)
    measured, took = await time_a_call(client)
    assert 0.09 < measured < took


async def test_a_request_is_counted_when_it_ends(
    client: AsyncClient, monkeypatch: MonkeyPatch
) -> None:
    """While the model hangs, it is in progress and in no other metric."""
    started, end = asyncio.Event(), asyncio.Event()

    async def infer(_: app.Transaction) -> float:
        started.set()
        await end.wait()
        return 0.1

    monkeypatch.setattr(app, "infer", infer)
    monkeypatch.setattr(app.settings, "FAILURE_RATE", 1)
    with counted(in_progress=1):
        request = asyncio.create_task(client.post("/predict", json=LEGIT))
        await asyncio.wait_for(started.wait(), timeout=60)
    with counted(in_progress=-1, predictions=1, model_failure=1, model_calls=1):
        end.set()
        await request


class Panic(BaseException):
    """What a model written in Rust may raise."""


NOT_A_SCORE = [None, {"score": 0.1}, "0.1", 1.5, -0.1, math.nan]
RAISED = [
    ZeroDivisionError("boom"),
    HTTPException(404),
    TimeoutError(),
    asyncio.CancelledError(),
    SystemExit(3),
    KeyboardInterrupt(),
    GeneratorExit(),
    Panic(),
    BaseExceptionGroup("two", [Panic(), ValueError()]),
]


@pytest.mark.parametrize("answer", [*NOT_A_SCORE, *RAISED], ids=repr)
async def test_whatever_goes_wrong_in_the_model_is_a_model_failure(
    client: AsyncClient, monkeypatch: MonkeyPatch, answer: object
) -> None:
    use_model(monkeypatch, answer)
    with counted(predictions=1, model_failure=1, model_calls=1):
        response = await client.post("/predict", json=LEGIT)
    assert response.status_code == 500
    assert response.json() == {"detail": "The model failed. The log says why."}


async def test_sys_exit_in_a_thread_is_a_model_failure(
    client: AsyncClient, monkeypatch: MonkeyPatch
) -> None:
    """It arrives by way of a future, not as a call that raises."""

    async def infer(_: app.Transaction) -> float:
        return await asyncio.to_thread(sys.exit, 3)

    monkeypatch.setattr(app, "infer", infer)
    with counted(predictions=1, model_failure=1, model_calls=1):
        response = await client.post("/predict", json=LEGIT)
    assert response.status_code == 500


async def test_a_failure_is_logged_with_its_traceback(
    client: AsyncClient, monkeypatch: MonkeyPatch, caplog: LogCaptureFixture
) -> None:
    use_model(monkeypatch, ZeroDivisionError("boom"))
    await client.post("/predict", json=LEGIT)
    (record,) = (record for record in caplog.records if record.name == "uvicorn.error")
    assert "ZeroDivisionError('boom')" in record.getMessage()
    assert record.exc_info


async def test_a_simulated_failure_is_logged_without_a_traceback(
    client: AsyncClient, monkeypatch: MonkeyPatch, caplog: LogCaptureFixture
) -> None:
    monkeypatch.setattr(app.settings, "FAILURE_RATE", 1)
    with counted(predictions=1, model_failure=1, model_calls=1):
        await client.post("/predict", json=LEGIT)
    (record,) = (record for record in caplog.records if record.name == "uvicorn.error")
    assert "FAILURE_RATE is 1" in record.getMessage()
    assert not record.exc_info


class BadInput(NamedTuple):
    """A body that is refused, and what the answer says."""

    body: bytes
    status: int
    says: str
    headers: dict[str, str] = JSON


BAD_INPUT = {
    "no amount": BadInput(b"{}", 422, "missing"),
    "unknown field": BadInput(b'{"amount": 1, "currency": "EUR"}', 422, "extra_forbidden"),
    "amount as text": BadInput(b'{"amount": "12"}', 422, "float_type"),
    "number as bool": BadInput(b'{"amount": 1, "international": 1}', 422, "bool_type"),
    "negative": BadInput(b'{"amount": -0.01}', 422, "greater_than_equal"),
    "too large": BadInput(b'{"amount": 1000000.01}', 422, "less_than_equal"),
    "NaN": BadInput(b'{"amount": NaN}', 422, "less_than_equal"),
    "4,000 digits": BadInput(b'{"amount": 1' + b"0" * 4_000 + b"}", 422, "float_type"),
    "surrogate": BadInput(b'{"amount": 1, "\\ud800": 1}', 422, "string_unicode"),
    "broken JSON": BadInput(b'{"amount": 4', 422, "json_invalid"),
    "not UTF-8": BadInput(b'{"amount": 1, "\xff": 1}', 400, "error parsing the body"),
    "over 4 KiB": BadInput(FOUR_KIB + b" ", 413, "Content Too Large"),
    "not sent as JSON": BadInput(
        b'{"amount": 1}', 415, "Send the header Content-Type: application/json.", headers={}
    ),
}


@pytest.mark.parametrize("send", [bytes, chunks], ids=["with its length", "in chunks"])
@pytest.mark.parametrize("bad", BAD_INPUT.values(), ids=BAD_INPUT)
async def test_bad_input_is_refused_and_counted(
    client: AsyncClient, bad: BadInput, send: Callable[[bytes], Any]
) -> None:
    with counted(predictions=1, invalid_input=1):
        answer = await client.post("/predict", content=send(bad.body), headers=bad.headers)
    assert answer.status_code == bad.status
    assert bad.says in answer.text


async def test_a_deeply_nested_body_is_refused_and_counted(client: AsyncClient) -> None:
    """How deep a body is too deep depends on Python."""
    with counted(predictions=1, invalid_input=1):
        answer = await client.post("/predict", content=b"[" * 4_000, headers=JSON)
    assert answer.status_code in (400, 422)


async def test_a_422_does_not_repeat_the_input(client: AsyncClient) -> None:
    answer = await client.post("/predict", content=b'{"amount": NaN}', headers=JSON)
    (error,) = answer.json()["detail"]
    assert error.keys() == {"type", "loc", "msg"}
    assert error["loc"] == ["body", "amount"]


@pytest.fixture
def added_routes() -> Iterator[None]:
    """Two routes that a class might add."""
    routes = list(app.app.router.routes)

    @app.app.get("/top")
    async def top(n: int) -> int:
        return n

    @app.app.post("/feedback", max_body_size=4 * 1024)
    async def feedback(transaction: app.Transaction) -> None:
        pass

    yield
    app.app.router.routes[:] = routes


@pytest.mark.usefixtures("added_routes")
@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        pytest.param("GET", "/top?n=x", b"", 422, id="query"),
        pytest.param("POST", "/feedback", b"{}", 422, id="body"),
        pytest.param("POST", "/feedback", b"\xff", 400, id="not UTF-8"),
        pytest.param("POST", "/feedback", FOUR_KIB + b" ", 413, id="over 4 KiB"),
    ],
)
async def test_bad_input_to_another_route_is_not_counted(
    client: AsyncClient, method: str, path: str, body: bytes, status: int
) -> None:
    client.event_hooks = {}  # The documentation does not know these routes.
    with counted():
        answer = await client.request(method, path, content=body, headers=JSON)
    assert answer.status_code == status


@pytest.mark.parametrize(("path", "status"), [("/no", 404), ("/predict", 405)])
async def test_a_path_or_method_that_is_not_there_is_not_counted(
    client: AsyncClient, path: str, status: int
) -> None:
    with counted():
        assert (await client.get(path)).status_code == status


async def test_health_answers_and_is_not_counted(client: AsyncClient) -> None:
    with counted():
        answer = await client.get("/health")
    assert answer.json() == {"status": "ok"}


async def test_the_root_leads_to_the_documentation(client: AsyncClient) -> None:
    assert (await client.get("/", follow_redirects=True)).url.path == "/docs"


async def test_the_documentation_fills_in_an_example(client: AsyncClient) -> None:
    schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    assert schemas["Transaction"]["properties"]["amount"]["examples"] == [LEGIT["amount"]]


async def test_metrics_have_the_content_type_that_prometheus_expects(client: AsyncClient) -> None:
    answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")


async def test_metrics_have_no_created_series(client: AsyncClient) -> None:
    assert "_created" not in (await client.get("/metrics")).text


async def test_help_texts_are_sentences(client: AsyncClient) -> None:
    helps = re.findall(r"^# HELP ml_\w+ (.+)$", (await client.get("/metrics")).text, re.MULTILINE)
    assert len(helps) >= 5
    assert all(re.fullmatch(r"[A-Z].+\.", text) for text in helps)


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
    allowed = app.Settings.model_fields[name].description
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(FOLDER / "app.py"))
    assert stop.value.code == f"{name} must be {allowed}, not {given!r}"


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


def dockerfile() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile and what follows them."""
    lines = read("Dockerfile").replace("\\\n", "").splitlines()
    parts = [line.partition(" ") for line in lines if line and not line.startswith("#")]
    return [(instruction, rest.strip()) for instruction, _, rest in parts]


COMMAND: list[str] = json.loads(dict(dockerfile())["CMD"])


class Service(NamedTuple):
    """A service that runs as a process of its own, at a port of this machine."""

    process: subprocess.Popen[str]
    port: int

    def connect(self, request: bytes) -> socket.socket:
        """Send the beginning of a request."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(request)
        return connection

    def metric(self, line: str) -> float:
        """What /metrics says in the line that begins like this."""
        url = f"http://127.0.0.1:{self.port}/metrics"
        lines = httpx.get(url, trust_env=False, timeout=60).text.splitlines()
        (value,) = (one.rpartition(" ")[2] for one in lines if one.startswith(line))
        return float(value)

    def wait_for(self, line: str, value: float) -> None:
        """Wait until /metrics says so."""
        deadline = time.monotonic() + 60
        while self.metric(line) != value:
            assert time.monotonic() < deadline, f"{line} is not {value}"


@pytest.fixture
def service(monkeypatch: MonkeyPatch) -> Iterator[Service]:
    """The service as the Dockerfile starts it, but on a free port of this machine only."""
    monkeypatch.setenv("FAILURE_RATE", "0")
    monkeypatch.setenv("MODEL_LATENCY_SECONDS", "1")
    monkeypatch.setenv("MODEL_NAME", "m")
    monkeypatch.setenv("MODEL_VERSION", "v9")
    with subprocess.Popen(
        [sys.executable, "-m", *COMMAND, "--host", "127.0.0.1", "--port", "0"],
        cwd=FOLDER,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            assert process.stdout
            port = None
            while port is None:
                line = process.stdout.readline()
                assert line, "the service ended before it listened"
                port = re.search(r"http://127.0.0.1:(\d+)", line)
            yield Service(process, int(port[1]))
        finally:
            process.kill()


def test_a_bad_setting_ends_the_process_with_one_line(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv("FAILURE_RATE", "2")
    command = [sys.executable, "-m", *COMMAND]
    run = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stdout + run.stderr == "FAILURE_RATE must be from 0 to 1, not '2'\n"


# Without its last empty line, as a test may add headers.
REQUEST = (
    b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 13\r\n"
)


def test_every_series_starts_at_0(service: Service) -> None:
    """And it has the labels that the settings ask for."""
    labels = 'model_name="m",version="v9"'
    for series in (
        f"ml_predictions_total{{{labels}}}",
        'ml_prediction_errors_total{model_name="m",reason="invalid_input",version="v9"}',
        'ml_prediction_errors_total{model_name="m",reason="model_failure",version="v9"}',
        f"ml_predictions_in_progress{{{labels}}}",
        f"ml_prediction_duration_seconds_count{{{labels}}}",
        f"ml_prediction_score_count{{{labels}}}",
    ):
        assert service.metric(series) == 0


def test_a_client_that_leaves_while_it_sends_is_counted(service: Service) -> None:
    service.connect(REQUEST + b'\r\n{"amount"').close()
    service.wait_for('ml_prediction_errors_total{model_name="m",reason="invalid_input"', 1)
    assert service.metric("ml_predictions_total") == 1


def test_a_request_that_offers_an_upgrade_is_answered(service: Service) -> None:
    """uvicorn loses the body of such a request."""
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
    with service.connect(REQUEST + upgrade + b'\r\n{"amount"') as connection:
        assert connection.recv(1024).startswith(b"HTTP/1.1 422")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_a_request_in_flight_outlives_sigterm(service: Service) -> None:
    with service.connect(REQUEST + b'\r\n{"amount": 1}') as connection:
        service.wait_for("ml_predictions_in_progress", 1)
        service.process.send_signal(signal.SIGTERM)
        assert connection.recv(1024).startswith(b"HTTP/1.1 200")
    assert service.process.wait(timeout=60) in (0, -signal.SIGTERM)


def test_requests_are_not_logged(service: Service) -> None:
    with service.connect(REQUEST + b'\r\n{"amount": 1}') as connection:
        assert connection.recv(1024).startswith(b"HTTP/1.1 200")
    service.process.kill()
    assert service.process.stdout
    assert "POST" not in service.process.stdout.read()


# ---------------------------------------------------------------- The traffic


COMPOSE = yaml.safe_load(read("docker-compose.yml"))
SERVICES = COMPOSE["services"]


def config(name: str) -> str:
    """An inline file of docker-compose.yml, as the containers see it."""
    content: str = COMPOSE["configs"][name]["content"]
    return content.replace("$$", "$")


LoadTraffic = Callable[..., dict[str, Any]]


@pytest.fixture
def load_traffic(monkeypatch: MonkeyPatch) -> LoadTraffic:
    """Gives the names in the traffic's script, which is not started."""

    def load(rate: str = "30", amount: str = "50") -> dict[str, Any]:
        monkeypatch.setenv("TRAFFIC_RATE", rate)
        monkeypatch.setenv("TRAFFIC_AMOUNT", amount)
        script: dict[str, Any] = {"__name__": "traffic"}
        exec(config("traffic"), script)  # noqa: S102
        return script

    return load


@pytest.mark.parametrize(
    ("amount", "least", "most"),
    [
        pytest.param("50", 0.01, 0.05, id="usual"),
        pytest.param("500", 0.3, 0.5, id="drift"),
    ],
)
async def test_the_amount_of_the_traffic_decides_how_much_is_fraud(
    client: AsyncClient,
    load_traffic: LoadTraffic,
    amount: str,
    least: float,
    most: float,
) -> None:
    make_body = load_traffic(amount=amount)["make_body"]
    random.seed(1)
    before = counts()
    for _ in range(2_000):
        await client.post("/predict", json=make_body())
    new = counts() - before
    assert 0.01 < new["invalid_input"] / 2_000 < 0.03, "malformed"
    assert least < 1 - new["legit_scores"] / new["scores"] < most


def test_the_largest_amount_of_the_traffic_is_valid(
    load_traffic: LoadTraffic,
) -> None:
    make_body = load_traffic(amount="1000000")["make_body"]
    random.seed(1)
    bodies = [make_body() for _ in range(100)]
    transactions = [app.Transaction(**body) for body in bodies if body != "malformed"]
    assert max(transaction.amount for transaction in transactions) == 1_000_000


@pytest.fixture
def two_replicas(monkeypatch: MonkeyPatch) -> None:
    """DNS knows two replicas, and the traffic sends at once."""
    dns = {"model-api": ("model-api", [], ["10.0.0.1", "10.0.0.2"])}
    monkeypatch.setattr(socket, "gethostbyname_ex", dns.__getitem__)
    monkeypatch.setattr(asyncio, "sleep", AsyncMock())


@pytest.mark.usefixtures("two_replicas")
async def test_the_traffic_goes_to_all_replicas(
    client: AsyncClient, load_traffic: LoadTraffic
) -> None:
    addresses = Counter[str]()

    async def on_request(request: httpx.Request) -> None:
        addresses[f"{request.url.host}:{request.url.port}"] += 1

    client.event_hooks = {"request": [on_request]}
    send = load_traffic()["send"]
    for _ in range(200):
        await send(client)
    assert addresses.keys() == {"10.0.0.1:8000", "10.0.0.2:8000"}
    assert min(addresses.values()) > 50


@pytest.mark.usefixtures("two_replicas")
async def test_the_traffic_is_spread_over_each_second(
    client: AsyncClient, load_traffic: LoadTraffic, monkeypatch: MonkeyPatch
) -> None:
    sleep = AsyncMock()
    monkeypatch.setattr(asyncio, "sleep", sleep)
    send = load_traffic()["send"]
    for _ in range(10):
        await send(client)
    waits = {call.args[0] for call in sleep.await_args_list} - {0}  # The model waits for 0 s.
    assert len(waits) == 10
    assert 0 < min(waits) < max(waits) < 1


@pytest.mark.usefixtures("two_replicas")
@pytest.mark.parametrize("error", [OSError(), httpx.ConnectError(""), httpx.ReadTimeout("")])
async def test_the_traffic_outlives_a_service_that_is_away(
    client: AsyncClient, load_traffic: LoadTraffic, error: Exception
) -> None:
    client.event_hooks = {"request": [AsyncMock(side_effect=error)]}
    await load_traffic()["send"](client)
    client.event_hooks["request"][0].assert_awaited_once()


async def test_the_traffic_gives_up_a_request_that_hangs(
    load_traffic: LoadTraffic, monkeypatch: MonkeyPatch
) -> None:
    """Otherwise they would pile up, as they do where DNS hangs."""
    timeout = asyncio.timeout
    given = []

    def at_once(seconds: float) -> asyncio.Timeout:
        given.append(seconds)
        return timeout(0)

    async def hang(*_: object) -> None:
        await asyncio.get_running_loop().create_future()

    send = load_traffic()["send"]
    monkeypatch.setattr(asyncio, "sleep", AsyncMock())
    monkeypatch.setattr(asyncio, "timeout", at_once)
    monkeypatch.setattr(asyncio, "to_thread", hang)
    await asyncio.wait_for(send(None), timeout=60)
    assert given == [5]


async def test_the_traffic_does_not_wait_for_answers(
    load_traffic: LoadTraffic, monkeypatch: MonkeyPatch
) -> None:
    script = load_traffic(rate="9")
    script["send"] = send = AsyncMock()
    monkeypatch.setattr(asyncio, "sleep", AsyncMock(side_effect=[None, None]))
    with pytest.raises(ExceptionGroup):  # The mock sleeps twice, and no more.
        await script["main"]()
    assert send.call_count == 3 * 9
    assert send.await_count == 0
    asyncio.sleep.assert_awaited_with(1)


@pytest.mark.parametrize(
    ("rate", "amount"),
    [
        pytest.param("0", "50", id="no rate"),
        pytest.param("201", "50", id="rate too high"),
        pytest.param("", "50", id="empty rate"),
        pytest.param("9" * 5_000, "50", id="5,000 digits"),
        pytest.param("30", "0", id="no amount"),
        pytest.param("30", "1000001", id="amount too high"),
    ],
)
def test_a_bad_setting_stops_the_traffic(load_traffic: LoadTraffic, rate: str, amount: str) -> None:
    with pytest.raises(SystemExit, match="from 1 to 200, and TRAFFIC_AMOUNT one from 1 to 1000000"):
        load_traffic(rate, amount)


# ------------------------------------------------------------------ The stack


PROMETHEUS = yaml.safe_load(read("prometheus.yml"))
SCRAPE = {scrape["job_name"]: scrape for scrape in PROMETHEUS["scrape_configs"]}
(DATA_SOURCE,) = yaml.safe_load(config("datasource"))["datasources"]
(PROVIDER,) = yaml.safe_load(config("dashboard-provider"))["providers"]
DASHBOARD = json.loads(config("dashboard"))
GRAFANA: dict[str, object] = SERVICES["grafana"]["environment"]


def mounted(service: str) -> dict[str, str]:
    """Where a service finds its inline files."""
    return {mount["source"]: mount["target"] for mount in SERVICES[service]["configs"]}


@pytest.mark.parametrize("name", COMPOSE["configs"])
def test_compose_finds_nothing_to_replace_in_an_inline_file(name: str) -> None:
    content = COMPOSE["configs"][name]["content"]
    assert "$" not in content.replace("$$", ""), "Compose would replace a single $"


@pytest.mark.parametrize("name", COMPOSE["configs"])
def test_an_inline_file_is_mounted(name: str) -> None:
    assert any(name in mounted(service) for service in SERVICES if "configs" in SERVICES[service])


def test_the_service_gets_its_settings() -> None:
    assert {*app.Settings.model_fields} <= {*SERVICES["model-api"]["environment"]}


def test_the_service_runs_what_is_saved() -> None:
    assert SERVICES["model-api"]["pull_policy"] == "build"
    watched = SERVICES["model-api"]["develop"]["watch"]
    assert {"action": "rebuild", "path": "app.py"} in watched
    assert {"action": "rebuild", "path": "requirements.txt"} in watched


def test_the_log_of_the_service_is_rotated() -> None:
    assert SERVICES["model-api"]["logging"] == {"driver": "local"}


def test_the_service_listens_where_docker_and_prometheus_ask() -> None:
    assert COMMAND[:4] == ["uvicorn", "app:app", "--host", "0.0.0.0"]
    assert "--port" not in COMMAND, "uvicorn's own is 8000"
    assert SERVICES["model-api"]["ports"][0].endswith(":8000")
    assert "http://127.0.0.1:8000/health" in dict(dockerfile())["HEALTHCHECK"]


def test_a_start_is_seen_within_a_second() -> None:
    assert "--start-period=30s" in dict(dockerfile())["HEALTHCHECK"]
    assert "--start-interval=1s" in dict(dockerfile())["HEALTHCHECK"]


def test_requests_in_flight_end_before_docker_kills() -> None:
    assert 0 < int(COMMAND[COMMAND.index("--timeout-graceful-shutdown") + 1]) < 10


def test_the_service_is_no_root_and_cannot_write_its_code() -> None:
    instructions = dockerfile()
    assert ("USER", "app") in instructions[instructions.index(("COPY", ". .")) :]
    assert [rest for name, rest in instructions if name == "COPY"] == ["requirements.txt .", ". ."]


PORTS = [port for service in SERVICES.values() for port in service.get("ports", [])]


@pytest.mark.parametrize("port", PORTS)
def test_a_port_is_open_to_this_machine_only(port: str) -> None:
    assert re.fullmatch(r"127\.0\.0\.1:\$\{[A-Z]+_PORT:-(\d+)\}:\1", port)


IMAGES = [service["image"] for service in SERVICES.values() if "image" in service]


@pytest.mark.parametrize("image", [dict(dockerfile())["FROM"], *IMAGES])
def test_an_image_is_pinned(image: str) -> None:
    assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+(\.\d+|-slim)", image)


@pytest.mark.parametrize("package", read("requirements.txt").split())
def test_a_package_is_pinned(package: str) -> None:
    assert re.fullmatch(r"[a-z\[\]-]+==[\d.]+", package)


def test_prometheus_finds_each_replica() -> None:
    (discovery,) = SCRAPE["model-api"]["dns_sd_configs"]
    assert discovery["names"] == ["model-api"]
    assert discovery["type"] == "A"
    assert discovery["port"] == 8000


def test_prometheus_reads_its_files_and_keeps_its_data() -> None:
    assert "--config.file=/etc/prometheus/prometheus.yml" in SERVICES["prometheus"]["command"]
    assert "--storage.tsdb.path=/prometheus" in SERVICES["prometheus"]["command"]
    volumes = SERVICES["prometheus"]["volumes"]
    assert "./prometheus.yml:/etc/prometheus/prometheus.yml:ro" in volumes
    assert "prometheus-data:/prometheus" in volumes
    assert PROMETHEUS["rule_files"] == ["rules.yml"]
    assert mounted("prometheus")["rules"] == "/etc/prometheus/rules.yml"


def test_everything_keeps_the_pace_of_5_seconds() -> None:
    (discovery,) = SCRAPE["model-api"]["dns_sd_configs"]
    assert PROMETHEUS["global"] == {"scrape_interval": "5s", "evaluation_interval": "5s"}
    assert discovery["refresh_interval"] == "5s"
    assert DATA_SOURCE["jsonData"]["timeInterval"] == "5s"
    assert DASHBOARD["refresh"] == "5s"


def test_a_container_that_is_gone_is_forgotten_after_three_scrapes() -> None:
    assert "--query.lookback-delta=15s" in SERVICES["prometheus"]["command"]


def test_the_rules_are_tested_by_the_prometheus_that_runs_them() -> None:
    tests = SERVICES["rule-tests"]
    assert tests["image"] == SERVICES["prometheus"]["image"]
    assert (tests["entrypoint"], tests["command"]) == ("promtool", "test rules rules_test.yml")
    assert f"./.ci/rules_test.yml:{tests['working_dir']}/rules_test.yml:ro" in tests["volumes"]
    assert mounted("rule-tests")["rules"] == f"{tests['working_dir']}/rules.yml"
    assert tests["network_mode"] == "none"


@pytest.mark.parametrize(("service", "profile"), [("traffic", "traffic"), ("rule-tests", "test")])
def test_a_service_starts_only_when_asked(service: str, profile: str) -> None:
    assert SERVICES[service]["profiles"] == [profile]


def test_the_traffic_runs_its_script() -> None:
    assert SERVICES["traffic"]["command"] == ["python", "traffic.py"]
    assert mounted("traffic")["traffic"] == "/app/traffic.py"
    assert SERVICES["traffic"]["init"] is True, "Python as process 1 does not hear SIGTERM"


def test_the_traffic_is_healthy_when_it_reaches_the_service() -> None:
    assert "http://model-api:8000/health" in SERVICES["traffic"]["healthcheck"]["test"][-1]


def test_grafana_finds_its_files_and_keeps_its_data() -> None:
    files = mounted("grafana")
    assert files["datasource"].startswith("/etc/grafana/provisioning/datasources/")
    assert files["dashboard-provider"].startswith("/etc/grafana/provisioning/dashboards/")
    assert files["dashboard"].startswith(PROVIDER["options"]["path"] + "/")
    assert "grafana-data:/var/lib/grafana" in SERVICES["grafana"]["volumes"]


def test_grafana_asks_prometheus() -> None:
    assert (DATA_SOURCE["type"], DATA_SOURCE["url"]) == ("prometheus", "http://prometheus:9090")
    assert DATA_SOURCE["isDefault"] is True, "the panels name none"


def test_grafana_needs_no_login_and_lets_panels_be_saved() -> None:
    assert GRAFANA["GF_AUTH_ANONYMOUS_ENABLED"] is True
    assert GRAFANA["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Editor"
    assert GRAFANA["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] is True, "no admin with a password"
    assert PROVIDER["allowUiUpdates"] is True


def test_grafana_starts_with_the_dashboard_as_it_was_saved() -> None:
    assert GRAFANA["GF_USERS_HOME_PAGE"] == f"/d/{DASHBOARD['uid']}"


def test_grafana_does_not_go_to_the_internet() -> None:
    assert GRAFANA["GF_PLUGINS_PREINSTALL_DISABLED"] is True
    assert GRAFANA["GF_ANALYTICS_CHECK_FOR_UPDATES"] is False
    assert GRAFANA["GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES"] is False
    assert GRAFANA["GF_ANALYTICS_REPORTING_ENABLED"] is False


# ------------------------------------------------------------------ The rules


RULES = yaml.safe_load(config("rules"))["groups"][0]["rules"]
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}

needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"),
    reason="promtool is not here; in Docker: docker compose run --rm rule-tests",
)


def promtool(*command: str | Path) -> None:
    """Run Prometheus's own tool, which must find nothing wrong."""
    run = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture
def prometheus_folder(tmp_path: Path) -> Path:
    """The files that Prometheus and the tests of its rules read, side by side."""
    (tmp_path / "rules.yml").write_text(config("rules"), encoding="utf-8")
    shutil.copy(FOLDER / "prometheus.yml", tmp_path)
    shutil.copy(FOLDER / ".ci/rules_test.yml", tmp_path)
    return tmp_path


@needs_promtool
def test_the_rules_pass_their_own_tests(prometheus_folder: Path) -> None:
    promtool("test", "rules", prometheus_folder / "rules_test.yml")


@needs_promtool
def test_prometheus_takes_its_configuration(prometheus_folder: Path) -> None:
    promtool("check", "config", prometheus_folder / "prometheus.yml")


def limit(alert: str) -> float:
    """The number that an alert compares with."""
    return float(ALERTS[alert]["expr"].rpartition(">")[2].strip(" ()\n"))


def test_the_limit_of_the_latency_is_the_boundary_of_a_bucket() -> None:
    """So the share of calls that keep it is exact."""
    boundary = {**LABELS, "le": str(limit("HighLatency"))}
    assert REGISTRY.get_sample_value("ml_prediction_duration_seconds_bucket", boundary) is not None


# -------------------------------------------------------------- The dashboard


PANELS = {panel["title"]: panel for panel in DASHBOARD["panels"]}

FAILURES = "version:ml_prediction_failures_per_call:ratio_rate30s"
P95 = "version:ml_prediction_duration_seconds:p95_rate30s"
FRAUD = "version:ml_prediction_score:fraud_ratio_rate30s"
BUCKETS = "le:ml_prediction_duration_seconds_bucket:rate30s"
MEAN = "all:ml_prediction_duration_seconds:mean_rate30s"


@pytest.mark.parametrize(
    ("title", "unit", "shown"),
    [
        ("Requests per second", "reqps", {"ml_predictions_total"}),
        ("Failed calls", "percentunit", {FAILURES}),
        ("Latency, p95", "s", {P95}),
        ("Share of fraud", "percentunit", {FRAUD}),
        ("Requests by version", "reqps", {"ml_predictions_total", "ml_prediction_errors_total"}),
        ("Failed calls by version", "percentunit", {FAILURES}),
        ("Latency, p95, by version", "s", {P95}),
        ("Share of fraud by version", "percentunit", {FRAUD}),
        ("In progress", None, {"ml_predictions_in_progress"}),
        ("Versions", None, {"ml_predictions_total", "ml_prediction_score_count"}),
        ("Memory of each replica", "bytes", {"version_instance:process_resident_memory_bytes"}),
        ("CPU of each replica", "percentunit", {"version_instance:process_cpu_seconds:rate30s"}),
        ("Latency of all versions", "s", {BUCKETS, MEAN}),
        ("Predictions by score", None, {"ml_prediction_score_bucket"}),
    ],
)
def test_a_panel_shows_what_its_title_says(title: str, unit: str | None, shown: set[str]) -> None:
    panel = PANELS[title]
    assert set().union(*(metrics_in(query["expr"]) for query in panel["targets"])) == shown
    assert panel.get("fieldConfig", {}).get("defaults", {}).get("unit") == unit


@pytest.mark.parametrize("title", PANELS)
def test_a_legend_names_a_label_that_its_query_keeps(title: str) -> None:
    for query in PANELS[title].get("targets", []):
        for label in re.findall(r"\{\{(\w+)\}\}", query.get("legendFormat", "")):
            by = re.findall(r"\bby\s*\(([^)]*)\)", query["expr"])
            level = query["expr"].partition(":")[0].split("_")
            assert label in re.findall(r"\w+", " ".join(by)) + level


@pytest.mark.parametrize("query", PANELS["Latency of all versions"]["targets"][:3])
def test_a_quantile_is_the_one_of_its_legend(query: dict[str, str]) -> None:
    (quantile,) = re.findall(r"histogram_quantile\(([\d.]+)", query["expr"])
    assert query["legendFormat"] == f"p{float(quantile) * 100:.0f}"


def test_the_table_counts_replicas_and_scores() -> None:
    replicas, scored = PANELS["Versions"]["targets"]
    organize = PANELS["Versions"]["transformations"][1]["options"]
    assert replicas["expr"].startswith("count")
    assert organize["renameByName"][f"Value #{replicas['refId']}"] == "replicas"
    assert metrics_in(scored["expr"]) == {"ml_prediction_score_count"}
    assert organize["renameByName"][f"Value #{scored['refId']}"] == "scored"


def test_bad_input_has_a_line_of_its_own() -> None:
    _, bad_input = PANELS["Requests by version"]["targets"]
    assert bad_input["legendFormat"] == "bad input"
    assert 'reason="invalid_input"' in bad_input["expr"]


def steps(title: str) -> dict[str, float | None]:
    """The thresholds of a panel, by their colours."""
    thresholds = PANELS[title]["fieldConfig"]["defaults"]["thresholds"]["steps"]
    return {step["color"]: step["value"] for step in thresholds}


ALERT_OF = {
    "Failed calls": "HighErrorRatio",
    "Latency, p95": "HighLatency",
    "Share of fraud": "PredictionDrift",
}


@pytest.mark.parametrize(("title", "alert"), ALERT_OF.items())
def test_a_tile_is_red_where_its_alert_fires(title: str, alert: str) -> None:
    (query,) = PANELS[title]["targets"]
    assert metrics_in(ALERTS[alert]["expr"]) == {query["expr"]}
    assert steps(title)["red"] == limit(alert)
    assert alert in PANELS[title]["description"]


@pytest.mark.parametrize(("title", "alert"), ALERT_OF.items())
def test_the_red_line_of_a_chart_is_always_in_view(title: str, alert: str) -> None:
    (chart,) = (name for name in PANELS if name.startswith(title) and name.endswith("by version"))
    custom = PANELS[chart]["fieldConfig"]["defaults"]["custom"]
    assert steps(chart)["red"] == limit(alert)
    assert custom["thresholdsStyle"] == {"mode": "line"}
    assert custom["axisSoftMax"] > limit(alert)


@pytest.mark.parametrize("title", ALERT_OF)
def test_a_tile_says_unknown_and_names_the_version(title: str) -> None:
    assert PANELS[title]["fieldConfig"]["defaults"]["noValue"] == "unknown"
    assert PANELS[title]["options"]["textMode"] == "value_and_name"
    assert "unknown" in PANELS[title]["description"]


TILES = ["Requests per second", *ALERT_OF]


@pytest.mark.parametrize("title", TILES)
def test_a_tile_shows_the_present(title: str) -> None:
    assert PANELS[title]["targets"][0]["instant"] is True


@pytest.mark.parametrize("title", TILES)
def test_a_tile_without_data_is_grey(title: str) -> None:
    assert steps(title)["#808080"] is None


MARKED_IN = {
    "HighErrorRatio": ["Failed calls by version"],
    "HighLatency": ["Latency, p95, by version", "Latency of all versions"],
    "PredictionDrift": ["Share of fraud by version", "Predictions by score"],
    "ModelApiDown": ["Requests by version", "In progress"],
}


@pytest.mark.parametrize(("alert", "titles"), MARKED_IN.items())
def test_a_firing_alert_is_marked_in_the_panels_that_show_its_cause(
    alert: str, titles: list[str]
) -> None:
    (mark,) = (mark for mark in DASHBOARD["annotations"]["list"] if mark["name"] == alert)
    assert f'alertname="{alert}"' in mark["target"]["expr"]
    assert 'alertstate="firing"' in mark["target"]["expr"]
    assert mark["filter"]["ids"] == [PANELS[title]["id"] for title in titles]
    assert mark["datasource"]["uid"] == DATA_SOURCE["uid"]
    assert alert in ALERTS


def test_each_panel_has_an_id_of_its_own() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len({*ids})


def test_no_panel_covers_another() -> None:
    for one, other in combinations((panel["gridPos"] for panel in DASHBOARD["panels"]), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or apart


# ----------------------------------------------------------------- The README


README = read("README.md")


def table(first_column: str) -> dict[str, list[str]]:
    """The rows of a table of the README, by their first cell."""
    lines = README.partition(f"\n| {first_column} |")[2].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    assert rows, f"the README has no table of each {first_column}"
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize("name", app.Settings.model_fields)
def test_the_readme_describes_a_setting(name: str) -> None:
    field = app.Settings.model_fields[name]
    assert table("Variable")[name][:2] == [str(field.default), field.description]


@pytest.mark.parametrize(
    ("name", "default"), re.findall(r"\$\{(\w+):-([^}]+)\}", read("docker-compose.yml"))
)
def test_the_readme_describes_a_variable_of_compose(name: str, default: str) -> None:
    assert table("Variable")[name][0] == default


@pytest.mark.parametrize("name", table("Metric"))
def test_a_metric_of_the_readme_exists(name: str) -> None:
    types = {metric.name: metric.type for metric in REGISTRY.collect()}
    assert types[name.removesuffix("_total")] == table("Metric")[name][0]


@pytest.mark.parametrize("name", table("Alert"))
def test_an_alert_of_the_readme_exists(name: str) -> None:
    assert table("Alert")[name][0] == ALERTS[name]["for"]


@pytest.mark.parametrize("alert", ALERT_OF.values())
def test_the_readme_names_the_limit_of_an_alert(alert: str) -> None:
    assert re.search(f"over ({limit(alert)} s|{limit(alert):.0%})", table("Alert")[alert][1])


@needs_promtool
def test_the_alert_that_the_class_writes_passes_its_test(tmp_path: Path) -> None:
    (alert,) = re.findall(r"```yaml\n( +- alert: .+?)```", README, re.DOTALL)
    (test,) = re.findall(r"```yaml\n( +- name: .+?)```", README, re.DOTALL)
    rules = {"groups": [{"name": "class", "rules": yaml.safe_load(alert)}]}
    tests = yaml.safe_load(read(".ci/rules_test.yml")) | {"tests": yaml.safe_load(test)}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules), encoding="utf-8")
    (tmp_path / "rules_test.yml").write_text(yaml.safe_dump(tests), encoding="utf-8")
    promtool("test", "rules", tmp_path / "rules_test.yml")


def test_the_readme_has_the_test_command() -> None:
    assert f"\n{read('.ci/run').splitlines()[-1]}\n" in README


EXAMPLES = re.findall(r"-d '(.+?)' .+/predict\n```\n\n```json\n(.+)\n```", README)


def test_the_readme_has_examples() -> None:
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize(("body", "answer"), EXAMPLES)
async def test_an_example_of_the_readme_is_true(
    client: AsyncClient, monkeypatch: MonkeyPatch, body: str, answer: str
) -> None:
    monkeypatch.setattr(app, "LABELS", {"model_name": "fraud_model", "version": "v1"})
    expected = json.loads(answer)
    if "score" in expected:
        expected["score"] = approx(expected["score"])  # Its last digit depends on the machine.
    assert (await client.post("/predict", content=body, headers=JSON)).json() == expected


@pytest.mark.parametrize("command", re.findall(r"docker compose [^\n`]*?up -d[^\n`<]*", README))
def test_a_start_in_the_readme_waits_and_says_if_it_fails(command: str) -> None:
    assert "--wait" in command


# ---------------------------------------------------------------- The queries


PANEL_QUERIES = [query["expr"] for panel in PANELS.values() for query in panel.get("targets", [])]
MARKS = [annotation["target"]["expr"] for annotation in DASHBOARD["annotations"]["list"]]
RULE_QUERIES = [rule["expr"] for rule in RULES]
README_QUERIES = re.findall(r"^ *```promql\n(.+?)```", README, re.MULTILINE | re.DOTALL)


@needs_promtool
def test_queries_are_promql(tmp_path: Path) -> None:
    rules = [
        {"record": f"query:{number}", "expr": re.sub(r"\$__\w*interval", "30s", query)}
        for number, query in enumerate([*PANEL_QUERIES, *MARKS, *README_QUERIES])
    ]
    groups = {"groups": [{"name": "queries", "rules": rules}]}
    (tmp_path / "queries.yml").write_text(yaml.safe_dump(groups), encoding="utf-8")
    promtool("check", "rules", tmp_path / "queries.yml")


def metrics_in(query: str) -> set[str]:
    """The metrics that a query names: its words that are no label, function or operator."""
    query = re.sub(r'"[^"]*"|#.*', "", query)
    query = re.sub(r"\{[^}]*\}|\[[^]]*\]", "", query)
    query = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", query)
    words = re.findall(r"(?<![\w:])[a-zA-Z_:][\w:]*(?![\w:]|\s*\()", query)
    return {*words} - {"and", "or", "unless", "bool", "offset", "NaN"}


SUFFIXES = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
EXISTING = RECORDED | {
    metric.name + suffix
    for metric in REGISTRY.collect()
    for suffix in SUFFIXES.get(metric.type, [""])
}
EXISTING |= {"up", "ALERTS"}  # Prometheus adds these.
# prometheus-client has these on Linux only.
EXISTING |= {"process_resident_memory_bytes", "process_cpu_seconds_total"}


@pytest.mark.parametrize("query", [*RULE_QUERIES, *PANEL_QUERIES, *MARKS])
def test_a_query_asks_for_what_exists(query: str) -> None:
    assert metrics_in(query)
    assert metrics_in(query) <= EXISTING


@pytest.mark.parametrize("query", README_QUERIES)
def test_a_query_of_the_readme_asks_for_what_exists(query: str) -> None:
    assert metrics_in(query) <= EXISTING | {"ml_transactions_total"}, "the class adds that one"
