"""Tests of the service over HTTP, and of the files around it. They need no network and no Docker."""

import asyncio
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import AsyncMock

import httpx
import pytest
import yaml
from fastapi import HTTPException
from httpx import AsyncClient
from prometheus_client import REGISTRY
from pytest import LogCaptureFixture, MonkeyPatch, approx

import app

FOLDER = Path(__file__).parent
LABELS = {"model_name": app.settings.MODEL_NAME, "version": app.settings.MODEL_VERSION}
LEGIT = {"amount": 42.5}
LARGEST = json.dumps(LEGIT).encode().ljust(4 * 1024)
FRAUD = b'{"amount": 9000, "international": true}'.ljust(4 * 1024)
JSON = {"Content-Type": "application/json"}

pytestmark = pytest.mark.anyio  # AnyIO, which FastAPI brings along, runs the async tests.


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
    transport, hooks = httpx.ASGITransport(app.app), {"response": [is_documented]}
    async with AsyncClient(transport=transport, base_url="http://api", event_hooks=hooks) as client:
        yield client


async def is_documented(response: httpx.Response) -> None:
    """Check of each answer in each test: OpenAPI names its status and its content type."""
    path = app.app.openapi()["paths"].get(response.request.url.path, {})
    if operation := path.get(response.request.method.lower()):
        documented = operation["responses"][str(response.status_code)].get("content", {"": None})
        assert response.headers.get("content-type", "").partition(";")[0] in documented


async def chunks(body: bytes) -> AsyncIterator[bytes]:
    """A body that is sent without its length."""
    for start in range(0, len(body), 1024):
        yield body[start : start + 1024]


def counts() -> Counter[str]:
    """What the service has counted so far."""
    series = {
        "predictions": ("ml_predictions_total", {}),
        "invalid_input": ("ml_prediction_errors_total", {"reason": "invalid_input"}),
        "model_failure": ("ml_prediction_errors_total", {"reason": "model_failure"}),
        "in_progress": ("ml_predictions_in_progress", {}),
        "model_calls": ("ml_prediction_duration_seconds_count", {}),
        "scores": ("ml_prediction_score_count", {}),
        "legit_scores": ("ml_prediction_score_bucket", {"le": "0.5"}),
    }
    value = REGISTRY.get_sample_value
    return Counter(
        {name: int(value(metric, LABELS | own)) for name, (metric, own) in series.items()}
    )


@contextmanager
def counted(**expected: int) -> Iterator[None]:
    """Check that a block counts exactly this."""
    before = counts()
    yield
    assert {name: n - before[name] for name, n in counts().items() if n != before[name]} == expected


async def test_predict(client: AsyncClient, monkeypatch: MonkeyPatch) -> None:
    with counted(predictions=2, model_calls=2, scores=2, legit_scores=1):
        legit = await client.post("/predict", content=LARGEST, headers=JSON)
        fraud = await client.post("/predict", content=chunks(FRAUD), headers=JSON)
    assert (legit.status_code, fraud.status_code) == (200, 200)
    assert legit.json() == {"prediction": "legit", "score": approx(0.0614, abs=1e-4), **LABELS}
    assert fraud.json() == {"prediction": "fraud", "score": approx(0.9760, abs=1e-4), **LABELS}

    monkeypatch.setattr(app, "infer", AsyncMock(side_effect=[0.5, 0.500001]))
    with counted(predictions=2, model_calls=2, scores=2, legit_scores=1):
        answers = [await client.post("/predict", json=LEGIT) for _ in range(2)]
    assert [answer.json()["prediction"] for answer in answers] == ["legit", "fraud"]


async def test_latency_is_log_normal(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(app.settings, "FAILURE_RATE", 1)
    monkeypatch.setattr(app.settings, "MODEL_LATENCY_SECONDS", 0.05)
    monkeypatch.setattr(asyncio, "sleep", AsyncMock())
    random.seed(1)
    for _ in range(500):
        with pytest.raises(app.SimulatedError):
            await app.simulate_latency_and_failures()
    waits = sorted(call.args[0] for call in asyncio.sleep.await_args_list)
    assert (waits[250], waits[495]) == approx((0.05, 0.15), rel=0.1)


async def test_800_requests_at_once(client: AsyncClient, monkeypatch: MonkeyPatch) -> None:
    quick = ("ml_prediction_duration_seconds_bucket", {**LABELS, "le": "1.0"})
    before, quick_before, in_progress = counts(), REGISTRY.get_sample_value(*quick), []

    async def infer(_: app.Transaction) -> float:
        in_progress.append(counts()["in_progress"])
        await asyncio.sleep(1.1)
        return 0.1

    monkeypatch.setattr(app, "infer", infer)
    monkeypatch.setattr(app.settings, "FAILURE_RATE", 0.3)
    monkeypatch.setattr(app.settings, "MODEL_LATENCY_SECONDS", 0.05)
    bodies = [{"amount": -1 if number % 4 == 0 else 1} for number in range(800)]
    answers = await asyncio.gather(*(client.post("/predict", json=body) for body in bodies))
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses == {200: approx(420, abs=60), 422: 200, 500: approx(180, abs=60)}
    assert 8 < max(in_progress) <= 600, "calls overlap"
    ok, failed = statuses[200], statuses[500]
    assert REGISTRY.get_sample_value(*quick) == quick_before, "infer is timed"
    expected = {"predictions": 800, "invalid_input": 200, "model_failure": failed}
    expected |= {"model_calls": ok + failed, "scores": ok, "legit_scores": ok}
    assert counts() - before == expected


WRONG_ANSWERS = [None, {"score": 0.1}, "0.1", 1.5, -0.1, math.nan]
ERRORS = [ZeroDivisionError("boom"), HTTPException(404), TimeoutError(), asyncio.CancelledError()]


class Panic(BaseException):
    """What a model written in Rust may raise."""


FATAL = [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), Panic()]
FATAL += [BaseExceptionGroup("two", [Panic(), ValueError()])]


@pytest.mark.parametrize(
    "answer", [*WRONG_ANSWERS, *ERRORS, *FATAL, app.SimulatedError("boom")], ids=repr
)
async def test_model_failure(
    client: AsyncClient, monkeypatch: MonkeyPatch, caplog: LogCaptureFixture, answer: object
) -> None:
    monkeypatch.setattr(app, "infer", AsyncMock(side_effect=[answer]))
    with counted(predictions=1, model_failure=1, model_calls=1):
        response = await client.post("/predict", json=LEGIT)
    assert response.status_code == 500
    assert response.json() == {"detail": "The model failed. The log says why."}
    (record,) = (record for record in caplog.records if record.name == "uvicorn.error")
    assert type(answer).__name__ in record.getMessage() or answer in WRONG_ANSWERS
    assert bool(record.exc_info) == (not isinstance(answer, app.SimulatedError))


async def test_sys_exit_in_a_thread(client: AsyncClient, monkeypatch: MonkeyPatch) -> None:
    async def infer(_: app.Transaction) -> float:
        return await asyncio.to_thread(sys.exit, 3)

    monkeypatch.setattr(app, "infer", infer)
    with counted(predictions=1, model_failure=1, model_calls=1):
        assert (await client.post("/predict", json=LEGIT)).status_code == 500


async def test_a_request_is_counted_when_it_ends(
    client: AsyncClient, monkeypatch: MonkeyPatch
) -> None:
    end = asyncio.Event()

    async def infer(_: app.Transaction) -> float:
        await end.wait()
        return 0.1

    monkeypatch.setattr(app, "infer", infer)
    monkeypatch.setattr(app.settings, "FAILURE_RATE", 1)
    with counted(in_progress=1):
        request = asyncio.create_task(client.post("/predict", json=LEGIT))
        while counts()["in_progress"] == 0:
            await asyncio.sleep(0)
    with counted(in_progress=-1, predictions=1, model_failure=1, model_calls=1):
        end.set()
        await request


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

    app.app.openapi_schema = None
    yield
    app.app.router.routes[:] = routes
    app.app.openapi_schema = None


@pytest.mark.usefixtures("added_routes")
async def test_bad_input_to_other_routes_is_not_counted(client: AsyncClient) -> None:
    client.event_hooks = {}
    with counted():
        statuses = [
            (await client.get("/top?n=x")).status_code,
            (await client.post("/feedback", content=b"{}", headers=JSON)).status_code,
            (await client.post("/feedback", content=b"\xff", headers=JSON)).status_code,
            (await client.post("/feedback", content=LARGEST + b" ", headers=JSON)).status_code,
        ]
    assert statuses == [422, 422, 400, 413]


BAD_INPUT = [
    (b"{}", 422, "Field required"),
    (b'{"amount": 1, "currency": "EUR"}', 422, "Extra inputs are not permitted"),
    (b'{"amount": "12"}', 422, "valid number"),
    (b'{"amount": 1, "international": 1}', 422, "valid boolean"),
    (b'{"amount": -0.01}', 422, "greater than or equal to 0"),
    (b'{"amount": 1000000.01}', 422, "less than or equal to 1000000"),
    (b'{"amount": NaN}', 422, "less than or equal to 1000000"),
    (b'{"amount": 1' + b"0" * 4_000 + b"}", 422, "valid number"),
    (b'{"amount": 1, "\\ud800": 1}', 422, "unable to parse"),
    (b'{"amount": 1, "\xff": 1}', 400, "error parsing the body"),
    (b'{"amount": 4', 422, "JSON decode error"),
    (b"[" * 2_000, 400, "error parsing the body"),
    (LARGEST + b" ", 413, "Content Too Large"),
    (b'{"amount": 1}', 415, "Send the header Content-Type: application/json."),  # It is not sent.
]


@pytest.mark.parametrize(("body", "status", "says"), BAD_INPUT)
async def test_bad_input(client: AsyncClient, body: bytes, status: int, says: str) -> None:
    for content in (body, chunks(body)):
        with counted(predictions=1, invalid_input=1):
            headers = {} if status == 415 else JSON
            answer = await client.post("/predict", content=content, headers=headers)
        assert answer.status_code == status and says in answer.text
        assert status != 422 or {*answer.json()["detail"][0]} == {"type", "loc", "msg"}


async def test_other_paths(client: AsyncClient) -> None:
    with counted():
        assert [(await client.get(path)).status_code for path in ("/no", "/predict")] == [404, 405]
        assert (await client.get("/health")).json() == {"status": "ok"}
        assert (await client.get("/", follow_redirects=True)).url.path == "/docs"
        metrics = await client.get("/metrics")
    assert metrics.headers["content-type"] == "text/plain; version=1.0.0; charset=utf-8"
    assert 'le="0.25"' in metrics.text and "_created" not in metrics.text
    assert app.Transaction.model_fields["amount"].examples == [LEGIT["amount"]], "what /docs sends"


def read(name: str) -> str:
    """A file of the project."""
    return (FOLDER / name).read_text(encoding="utf-8")


DOCKERFILE = read("Dockerfile").replace("\\\n", "")
COMMAND = json.loads(re.findall(r"^CMD (.+)", DOCKERFILE, re.MULTILINE)[-1])
HEAD = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 13"


@contextmanager
def service(**environment: str) -> Iterator[subprocess.Popen[str]]:
    """Starts the service as the Dockerfile does, but on a free port of this machine only."""
    command = [sys.executable, "-m", *COMMAND, "--host", "127.0.0.1", "--port", "0"]
    log = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = {**os.environ, **environment}
    with subprocess.Popen(command, cwd=FOLDER, env=env, **log) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_the_process_from_start_to_sigterm() -> None:
    settings = {"FAILURE_RATE": "0", "MODEL_LATENCY_SECONDS": "1"}
    with service(**settings, MODEL_NAME="m9", MODEL_VERSION="v9") as process:
        log, deadline = iter(process.stdout.readline, ""), time.monotonic() + 20
        address = next(m for line in log if (m := re.search(r"http://(127.0.0.1):(\d+)", line)))

        def connect(request: bytes) -> socket.socket:
            connection = socket.create_connection((address[1], int(address[2])), timeout=20)
            connection.sendall(request)
            return connection

        def scrape(name: str) -> list[str]:
            assert process.poll() is None and time.monotonic() < deadline
            metrics = httpx.get(f"{address[0]}/metrics", trust_env=False).text
            return re.findall(rf"^{name}{{.*\"m9\".*\"v9\".*}} (.+)", metrics, re.MULTILINE)

        assert scrape("ml_.+") == ["0.0"] * (1 + 2 + 1 + (13 + 2) + (11 + 2)), "all start from 0"
        connect(HEAD + b'\r\n\r\n{"amount"').close()
        while "1.0" not in scrape("ml_prediction_errors_total"):
            pass
        assert scrape("ml_predictions_total") == ["1.0"], "who leaves in the middle is counted"
        upgrade = connect(HEAD + b'\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n{"amount"')
        assert upgrade.recv(1024).startswith(b"HTTP/1.1 422"), "no upgrade, but an answer"
        in_flight = connect(HEAD + b'\r\n\r\n{"amount": 1}')
        while scrape("ml_predictions_in_progress") != ["1.0"]:
            pass
        process.send_signal(signal.SIGTERM)
        assert in_flight.recv(1024).startswith(b"HTTP/1.1 200")
        assert process.wait(timeout=20) in (0, -signal.SIGTERM)
        assert "HTTP/1.1" not in process.stdout.read(), "requests are counted, not logged"


@pytest.mark.parametrize(
    ("name", "given"),
    [
        *[("FAILURE_RATE", given) for given in ("", "a", "-0.1", "1.1", "nan")],
        *[("MODEL_LATENCY_SECONDS", given) for given in ("-1", "5.1")],
        *[("MODEL_NAME", " "), ("MODEL_VERSION", "")],
    ],
)
def test_bad_setting_stops_the_start(name: str, given: str) -> None:
    with service(**{name: given}) as process:
        log, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert log == f"{name} must be {table('Variable')[name][1]}, not {given!r}\n"


COMPOSE = yaml.safe_load(read("docker-compose.yml"))
PROMETHEUS = yaml.safe_load(read("prometheus.yml"))
README = read("README.md")


def config(name: str) -> str:
    """An inline file of docker-compose.yml, as the containers see it."""
    content: str = COMPOSE["configs"][name]["content"]
    assert not re.search(r"(?<!\$)(\$\$)*\$(?!\$)", content), "Compose would replace a single $"
    return content.replace("$$", "$")


RULES = yaml.safe_load(config("rules"))["groups"][0]["rules"]
RECORDS = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
DASHBOARD = json.loads(config("dashboard"))


class Number(float):
    """A number in PromQL: a comparison keeps it, or leaves nothing."""

    def __gt__(self, limit: float) -> "Number":
        return self if float(self) > limit else Number("nan")


def prometheus(
    calls: int = 100, failures: int = 19, slow: int = 4, fraud: int = 7, bad_input: int = 2
) -> Callable[[str], Number]:
    """What Prometheus answers, in the part of PromQL used here, if each second is like this one."""
    shown = {
        "ml_predictions_total": calls + bad_input,
        "ml_prediction_errors_total": failures + bad_input,
        'ml_prediction_errors_total{reason="invalid_input"}': bad_input,
        'ml_prediction_errors_total{reason="model_failure"}': failures,
        "ml_predictions_in_progress": 3,
        "ml_prediction_duration_seconds_count": calls,
        "ml_prediction_duration_seconds_sum": calls * 0.2,
        'ml_prediction_duration_seconds_bucket{le="0.25"}': calls - slow,
        "ml_prediction_score_count": calls - failures,
        'ml_prediction_score_bucket{le="0.5"}': calls - failures - fraud,
    }

    def quantile(share: float) -> float:
        """A slow call takes 0.26 s, any other one 0.24 s."""
        return 0.26 if slow / calls > 1 - share else 0.24

    def ask(query: str) -> Number:
        for promql, python in (
            (r"rate\(([^[]+)\[[^]]+\]\)", r"\1"),
            (r"histogram_quantile\((.+?), sum by \(.*?le\) \(ml_\w+_bucket\)\)", r"quantile(\1)"),
            (r"sum(?: by \([\w, ]+\) )?\(([^()]+)\)", r"Number(shown['\1'])"),
            (r"version:[\w:]+", r"ask(RECORDS['\g<0>'])"),
            (r"(.+) and (.+)", r"\1 if (\2) >= 0 else 'nan'"),
        ):
            query = re.sub(promql, python, query)
        return Number(eval(query, globals() | {"ask": ask, "shown": shown, "quantile": quantile}))

    return ask


@pytest.mark.parametrize(
    ("second", "alerts"),
    [
        ({}, []),
        ({"failures": 21}, ["HighErrorRatio"]),
        ({"failures": 21, "bad_input": 900}, ["HighErrorRatio"]),
        ({"slow": 6}, ["HighLatency"]),
        ({"fraud": 10}, ["PredictionDrift"]),
        ({"calls": 8, "failures": 2, "slow": 1, "fraud": 1}, [*ALERTS][:3]),
        ({"calls": 5, "failures": 0, "slow": 1, "fraud": 1}, []),
        ({"calls": 5, "failures": 2, "slow": 1, "fraud": 1}, []),
    ],
)
def test_alerts(second: dict[str, int], alerts: list[str]) -> None:
    ask = prometheus(**second)
    judged = [name for name in ALERTS if name != "ModelApiDown"]
    assert [name for name in judged if not math.isnan(ask(ALERTS[name]["expr"]))] == alerts
    for expr in RECORDS.values():
        assert "sum" not in expr.replace("sum by (version", ""), "each version by itself"
        assert set(re.findall(r"\[.+?\]", expr)) <= {"[30s]"}, "six scrapes"


def test_panels() -> None:
    ask, p95, fraud = prometheus(), 0.24, approx(7 / 81)
    tiles, charts = [[102], [0.19], [p95], [fraud]], [[102, 2], [0.19], [p95], [fraud]]
    memory = 'process_resident_memory_bytes{job="model-api"}'
    cpu = 'rate(process_cpu_seconds_total{job="model-api"}['
    rest = [[3], " (ml_predictions_total)", memory, cpu, [0.26, p95, 0.24, 0.2], "score_bucket{"]
    limits = dict(rule["expr"].split(" > ") for rule in ALERTS.values() if " > " in rule["expr"])
    for panel, shown in zip(DASHBOARD["panels"], [*tiles, *charts, *rest], strict=True):
        queries = [target["expr"] for target in panel["targets"]]
        assert shown in queries[0] if isinstance(shown, str) else shown == [*map(ask, queries)]
        for target in (target for target in panel["targets"] if "legendFormat" in target):
            assert ("version" in target["expr"]) == (target["legendFormat"] == "{{version}}")
        unit = {"rat": "percentunit", "p95": "s"}.get(queries[0].rpartition(":")[2][:3], "")
        assert f'"unit": "{unit}' in json.dumps(panel) or not unit
        red = re.findall('"red", "value": (.+?)}', json.dumps(panel))
        assert red == [limits[query] for query in queries if query in limits]


def test_the_stack_fits_together() -> None:
    (discovery,) = PROMETHEUS["scrape_configs"][0]["dns_sd_configs"]
    (source,) = yaml.safe_load(config("datasource"))["datasources"]
    (provider,) = yaml.safe_load(config("dashboards"))["providers"]
    api, grafana = COMPOSE["services"]["model-api"], COMPOSE["services"]["grafana"]["environment"]
    services = COMPOSE["services"].values()
    files = {c["source"]: c["target"] for service in services for c in service.get("configs", [])}
    assert files.keys() == COMPOSE["configs"].keys() and "/app/traffic.py" in files.values()
    assert files["rules"] == f"/etc/prometheus/{PROMETHEUS['rule_files'][0]}"
    for kind in ("datasource", "dashboards"):
        assert f"/etc/grafana/provisioning/{kind.rstrip('s')}s/" in files[kind]
    assert files["dashboard"] == grafana["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert files["dashboard"].startswith(provider["options"]["path"] + "/")
    assert (source["uid"], source["url"]) == ("prometheus", "http://prometheus:9090")
    assert '"uid": "prometheus"' in (marks := json.dumps(DASHBOARD["annotations"]))
    assert "firing" in marks and api["environment"] == list(app.Settings.model_fields)
    assert PROMETHEUS["scrape_configs"][0]["job_name"] == "model-api" in discovery["names"]
    assert (discovery["type"], discovery["port"]) == ("A", int(api["ports"][0].split(":")[-1]))
    assert f":{discovery['port']}/health'" in DOCKERFILE and "--port" not in COMMAND
    assert "0.0.0.0" in COMMAND and int(COMMAND[-1]) < 10, "Docker kills after 10 s"
    assert api["pull_policy"] == "build" and provider["allowUiUpdates"] and source["isDefault"]
    paces = [*PROMETHEUS["global"].values(), source["jsonData"]["timeInterval"]]
    assert {*paces, discovery["refresh_interval"], DASHBOARD["refresh"]} == {"5s"}


def test_the_stack_is_safe_and_keeps_its_data() -> None:
    text = read("docker-compose.yml") + DOCKERFILE
    for port in (port for s in COMPOSE["services"].values() for port in s.get("ports", [])):
        assert re.fullmatch(r"127\.0\.0\.1:\$\{\w+:-(\d+)\}:\1", port)
    for image in re.findall(r"(?:FROM|image:) (.+)", text):
        assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+(\.\d+|-slim)", image)
    for package in read("requirements.txt").split():
        assert re.fullmatch(r"[a-z\[\]-]+==[\d.]+", package)
    assert "\nUSER app\n" in text
    assert [*COMPOSE["services"]["grafana"]["environment"].values()][:3] == [True, "Editor", True]
    assert COMPOSE["services"]["traffic"]["profiles"] == ["traffic"], "it starts when asked"
    for volume in (":/etc/prometheus/prometheus.yml", "data:/prometheus", "data:/var/lib/grafana"):
        assert re.search(rf"volumes: .*{volume}\b", text)


def load_traffic(monkeypatch: MonkeyPatch, rate: str, amount: str) -> dict[str, object]:
    """The names in the traffic's script, which is not started."""
    monkeypatch.setenv("TRAFFIC_RATE", rate)
    monkeypatch.setenv("TRAFFIC_AMOUNT", amount)
    names: dict[str, object] = {"__name__": "traffic"}
    exec(config("traffic"), names)  # noqa: S102
    return names


@pytest.mark.parametrize(("amount", "low", "high"), [("50", 0.01, 0.05), ("500", 0.3, 0.5)])
async def test_traffic(
    client: AsyncClient, monkeypatch: MonkeyPatch, amount: str, low: float, high: float
) -> None:
    send, before = load_traffic(monkeypatch, "30", amount)["send"], counts()
    replicas, dns = Counter[str](), {"model-api": ("model-api", [], ["10.0.0.1", "10.0.0.2"])}
    monkeypatch.setattr(socket, "gethostbyname_ex", dns.__getitem__)

    async def on_request(request: httpx.Request) -> None:
        replicas[f"{request.url.host}:{request.url.port}"] += 1
        if replicas.total() % 10 == 0:
            raise random.choice([OSError, httpx.ConnectError])("The service is away.")

    client.event_hooks = {"request": [on_request]}
    monkeypatch.setattr(asyncio, "sleep", AsyncMock())
    random.seed(1)
    for _ in range(2_000):
        await send(client)
    new = counts() - before
    assert new["predictions"] == 1_800 and 0.01 < new["invalid_input"] / 1_800 < 0.03
    assert low < 1 - new["legit_scores"] / new["scores"] < high
    assert {*replicas} == {"10.0.0.1:8000", "10.0.0.2:8000"} and min(replicas.values()) > 900
    assert asyncio.sleep.await_count == 2_000 + new["model_calls"], "each at a time of its own"


async def test_traffic_pace(monkeypatch: MonkeyPatch) -> None:
    script, send = load_traffic(monkeypatch, "9", "50"), AsyncMock()
    script["send"] = send
    monkeypatch.setattr(asyncio, "sleep", AsyncMock(side_effect=[None, None]))
    with pytest.raises(ExceptionGroup):  # The mock sleeps twice, and no more.
        await script["main"]()
    assert (send.call_count, send.await_count) == (3 * 9, 0), "nobody waits for an answer"
    asyncio.sleep.assert_awaited_with(1)


@pytest.mark.parametrize("given", [("0", "50"), ("201", "50"), ("", "50"), ("9" * 5_000, "50"), ("30", "0")])
def test_bad_traffic_setting(monkeypatch: MonkeyPatch, given: tuple[str, str]) -> None:
    with pytest.raises(SystemExit, match=f"from {table('Variable')['TRAFFIC_RATE'][1]}, "):
        load_traffic(monkeypatch, *given)


def table(first_column: str) -> dict[str, list[str]]:
    """The rows of a table of the README, by their first cell."""
    lines = README.partition(f"\n| {first_column} |")[2].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


async def test_readme_is_true(client: AsyncClient, monkeypatch: MonkeyPatch) -> None:
    settings = {name: str(field.default) for name, field in app.Settings.model_fields.items()}
    others = dict(re.findall(r"\$\{(\w+):-([^}]+)\}", read("docker-compose.yml")))
    assert {name: row[0] for name, row in table("Variable").items()} == settings | others
    families = [family for family in REGISTRY.collect() if family.name.startswith("ml_")]
    exposed = {f.name + "_total" * (f.type == "counter"): f.type for f in families}
    assert {name: row[0] for name, row in table("Metric").items()} == exposed
    alerts = {name: rule["for"] for name, rule in ALERTS.items()}
    assert {name: row[0] for name, row in table("Alert").items()} == alerts
    for name in [*ALERTS][:3]:
        limit = float(ALERTS[name]["expr"].split(" > ")[1])
        assert re.search(f"over ({limit} s|{limit:.0%})", table("Alert")[name][1])
    assert f"<code>{ALERTS['ModelApiDown']['expr']}</code>" in README
    queries = re.findall(r"(?:: [\d.]+\n|<code>)((?:1 - )?(?:sum|hist).+?)(?:\n|</code>)", README)
    shown = [102, 21 / 102, 2, 0.26, 0.2, approx(7 / 81), 0.94]
    assert [*map(prometheus(slow=6), queries)] == shown
    assert f"\n{read('.ci/run').splitlines()[-1]}\n" in README
    monkeypatch.setattr(app, "LABELS", {"model_name": "fraud_model", "version": "v1"})
    shown = re.findall(r"-d '(.+?)' .+/predict\n```\n`(.+)`\n", README)
    assert len(shown) == 3
    for body, expected in shown:
        answer = (await client.post("/predict", content=body, headers=JSON)).json()
        if "score" in answer:
            answer["score"] = approx(answer["score"])  # Its last digit depends on the machine.
        assert answer == json.loads(expected)
