"""Tests of the service over HTTP, and of the files around it. They need no network and no Docker."""

import asyncio
import json
import os
import random
import re
import runpy
import signal
import socket
import statistics
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
import yaml
from fastapi import HTTPException
from prometheus_client.parser import text_string_to_metric_families

import app

LABELS = {"model_name": app.settings.MODEL_NAME, "version": app.settings.MODEL_VERSION}
LEGIT = {"amount": 42.5}
FRAUD = {"amount": 9_000, "international": True}
JSON = {"Content-Type": "application/json"}
FOLDER = Path(__file__).parent


def read(name: str) -> str:
    """A file of the project."""
    return (FOLDER / name).read_text(encoding="utf-8")


COMPOSE = yaml.safe_load(read("docker-compose.yml"))
PROMETHEUS = yaml.safe_load(read("prometheus.yml"))


@pytest.fixture(autouse=True)
def ideal_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model neither waits nor fails, unless a test says so."""
    monkeypatch.setattr(app.settings, "FAILURE_RATE", 0)
    monkeypatch.setattr(app.settings, "MODEL_LATENCY_SECONDS", 0)


@pytest.fixture(scope="session")
def client() -> Iterator[httpx.Client]:
    """A client of the service, which runs in a thread of the tests so that they can change it."""
    server = uvicorn.Server(
        uvicorn.Config(app.app, port=0, log_config=None, timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    port = server.servers[0].sockets[0].getsockname()[1]
    with httpx.Client(
        base_url=f"http://127.0.0.1:{port}",
        event_hooks={"response": [is_documented]},
        trust_env=False,
    ) as client:
        yield client
    server.should_exit = True
    thread.join()


def is_documented(response: httpx.Response) -> None:
    """Check of each answer in each test: OpenAPI names its status and its content type."""
    path = app.app.openapi()["paths"].get(response.request.url.path, {})
    if operation := path.get(response.request.method.lower()):
        documented = operation["responses"][str(response.status_code)].get("content", {"": None})
        assert response.headers.get("content-type", "").partition(";")[0] in documented


def scrape(client: httpx.Client) -> Counter[str]:
    """The service's own series in /metrics, named without the labels that all of them have."""
    series = Counter[str]()
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            if sample.name.startswith("ml_"):
                assert sample.labels.items() >= LABELS.items()
                own = [f"{k}={v}" for k, v in sample.labels.items() if k not in LABELS]
                series[" ".join([sample.name, *own])] = int(sample.value)
    return series


def counts(client: httpx.Client) -> Counter[str]:
    """What the service has counted so far."""
    series = scrape(client)
    return Counter(
        predictions=series["ml_predictions_total"],
        invalid_input=series["ml_prediction_errors_total reason=invalid_input"],
        model_failures=series["ml_prediction_errors_total reason=model_failure"],
        model_calls=series["ml_prediction_duration_seconds_count"],
        scores=series["ml_prediction_score_count"],
    )


# ------------------------------------------------------------------- Predict


def test_predict_answers_with_a_score(client: httpx.Client) -> None:
    before = counts(client)
    legit, fraud = (client.post("/predict", json=transaction) for transaction in (LEGIT, FRAUD))
    assert (legit.status_code, fraud.status_code) == (200, 200)
    assert legit.json() == {
        "prediction": "legit",
        "score": pytest.approx(0.0614, abs=1e-4),
        **LABELS,
    }
    assert fraud.json() == {
        "prediction": "fraud",
        "score": pytest.approx(0.9760, abs=1e-4),
        **LABELS,
    }
    assert client.post("/predict", json=LEGIT).json() == legit.json()
    assert counts(client) - before == {"predictions": 3, "model_calls": 3, "scores": 3}


def test_score_rises_with_the_amount_and_abroad(client: httpx.Client) -> None:
    amounts = [0, 0.01, 10, 100, 600, 700, 10_000, 1_000_000]
    home, abroad = (
        [
            client.post("/predict", json={"amount": amount, "international": international}).json()
            for amount in amounts
        ]
        for international in (False, True)
    )
    for answers in (home, abroad):
        scores = [answer["score"] for answer in answers]
        assert scores == sorted(set(scores))
        assert 0 <= scores[0] and scores[-1] <= 1
    assert all(there["score"] > here["score"] for here, there in zip(home, abroad))
    assert all((a["prediction"] == "fraud") == (a["score"] >= 0.5) for a in home + abroad)


def test_latency_is_log_normal(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    async def infer_often() -> None:
        for _ in range(10_000):
            await app.infer(app.Transaction(amount=1))
            assert waits, "the model waits without blocking the event loop"

    monkeypatch.setattr(app.settings, "MODEL_LATENCY_SECONDS", 0.05)
    monkeypatch.setattr(app, "asyncio", SimpleNamespace(sleep=sleep))
    random.seed(1)
    asyncio.run(infer_often())
    percentiles = statistics.quantiles(waits, n=100)
    assert percentiles[49] == pytest.approx(0.05, rel=0.1)
    assert percentiles[98] == pytest.approx(0.15, rel=0.1)


def test_model_calls_overlap(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    infer, waiting, all_here = app.infer, [], asyncio.Event()

    async def infer_together(transaction: app.Transaction) -> app.Prediction:
        waiting.append(transaction)
        if len(waiting) == 8:
            all_here.set()
        await all_here.wait()
        return await infer(transaction)

    monkeypatch.setattr(app, "infer", infer_together)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.post("/predict", json=LEGIT), range(8)))
    assert [answer.status_code for answer in answers] == [200] * 8


# -------------------------------------------------------------------- Faults


def test_answer_that_is_no_prediction(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def infer(transaction: app.Transaction) -> None: ...

    monkeypatch.setattr(app, "infer", infer)
    before = counts(client)
    assert client.post("/predict", json=LEGIT).status_code == 500
    assert counts(client) - before == {"predictions": 1, "model_failures": 1, "model_calls": 1}


def test_simulated_failure(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.settings, "FAILURE_RATE", 1)
    before = counts(client)
    answer = client.post("/predict", json=LEGIT)
    assert answer.status_code == 500
    assert answer.json() == {"detail": "The model failed (simulated, see FAILURE_RATE)."}
    assert counts(client) - before == {"predictions": 1, "model_failures": 1, "model_calls": 1}


@pytest.mark.parametrize("error", [ZeroDivisionError("boom"), HTTPException(404, "boom")])
def test_unexpected_failure(
    client: httpx.Client,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    async def infer(transaction: app.Transaction) -> app.Prediction:
        raise error

    monkeypatch.setattr(app, "infer", infer)
    before = counts(client)
    answer = client.post("/predict", json=LEGIT)
    assert answer.status_code == 500
    assert answer.json() == {"detail": "The model failed unexpectedly."}
    assert counts(client) - before == {"predictions": 1, "model_failures": 1, "model_calls": 1}
    assert "Traceback" in caplog.text and "boom" in caplog.text


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
    (b"[" * 100_000 + b"]" * 100_000, 413, "over 65536 bytes"),
    (b'{"amount": 1}' + b" " * 65_536, 413, "over 65536 bytes"),
    (b"[]", 422, "valid dictionary"),
    (b"42", 422, "valid dictionary"),
    (b"null", 422, "valid dictionary"),
    (b"", 422, "Field required"),
]


@pytest.mark.parametrize(("body", "status", "says"), BAD_INPUT)
def test_bad_input(client: httpx.Client, body: bytes, status: int, says: str) -> None:
    before = counts(client)
    answer = client.post("/predict", content=body, headers=JSON)
    assert answer.status_code == status
    assert says in json.dumps(answer.json()["detail"])
    assert counts(client) - before == {"predictions": 1, "invalid_input": 1}


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_another_content_type(client: httpx.Client, content_type: str | None) -> None:
    before = counts(client)
    headers = {"Content-Type": content_type} if content_type else {}
    answer = client.post("/predict", content=b'{"amount": 1}', headers=headers)
    assert answer.status_code == 415
    assert answer.json() == {"detail": "Send the header Content-Type: application/json."}
    assert counts(client) - before == {"predictions": 1, "invalid_input": 1}


def test_body_limit(client: httpx.Client) -> None:
    body = b'{"amount": 1}'.ljust(64 * 1024)
    chunks = (body[i : i + 1024] for i in range(0, len(body), 1024))
    for content in (body, chunks):
        assert client.post("/predict", content=content, headers=JSON).status_code == 200
    endless = (b" " * 1024 for _ in range(1024))
    assert client.post("/predict", content=endless, headers=JSON).status_code == 413


def test_client_that_goes_away_is_not_counted(
    client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    before = counts(client)
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        connection.sendall(
            b"POST /predict HTTP/1.1\r\nHost: api\r\nContent-Type: application/json\r\n"
            b'Content-Length: 14\r\n\r\n{"amount"'
        )
    assert client.post("/predict", json=LEGIT).status_code == 200
    assert counts(client) - before == {"predictions": 1, "model_calls": 1, "scores": 1}
    assert "Traceback" not in caplog.text


def test_counts_are_exact_under_concurrency(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.settings, "FAILURE_RATE", 0.3)
    monkeypatch.setattr(app.settings, "MODEL_LATENCY_SECONDS", 0.005)
    before, series = counts(client), scrape(client).keys()

    def send(number: int) -> int:
        transaction = {"amount": -1 if number % 4 == 0 else number}
        return client.post("/predict", json=transaction).status_code

    with ThreadPoolExecutor(32) as pool:
        statuses = Counter(pool.map(send, range(1, 801)))
    assert statuses.keys() == {200, 422, 500} and statuses[422] == 200
    assert statuses[500] / 600 == pytest.approx(0.3, abs=0.1)
    assert counts(client) - before == {
        "predictions": 800,
        "invalid_input": statuses[422],
        "model_failures": statuses[500],
        "model_calls": statuses[200] + statuses[500],
        "scores": statuses[200],
    }
    assert scrape(client).keys() == series, "/metrics does not grow with traffic"


# --------------------------------------------------- Metrics and other paths


def test_metrics(client: httpx.Client) -> None:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=1.0.0; charset=utf-8"
    assert "_created" not in answer.text
    families = {f.name: f for f in text_string_to_metric_families(answer.text)}
    own = {name: family.type for name, family in families.items() if name.startswith("ml_")}
    assert own == {
        "ml_predictions": "counter",
        "ml_prediction_errors": "counter",
        "ml_prediction_duration_seconds": "histogram",
        "ml_prediction_score": "histogram",
    }
    assert all(families[name].documentation.endswith(".") for name in own)


def test_histogram_boundaries(client: httpx.Client) -> None:
    series = scrape(client)
    assert "ml_prediction_duration_seconds_bucket le=0.25" in series
    for tenth in range(1, 11):
        assert f"ml_prediction_score_bucket le={tenth / 10}" in series


def test_fraud_share_is_exact_at_the_0_5_boundary(client: httpx.Client) -> None:
    before = scrape(client)
    for amount in [*range(0, 1000, 50), 1_000_000]:
        client.post("/predict", json={"amount": amount})
    new = scrape(client) - before
    assert new["ml_prediction_score_bucket le=0.5"] == 14
    assert new["ml_prediction_score_count"] == 21


def test_health(client: httpx.Client) -> None:
    answer = client.get("/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def test_root_leads_to_the_docs(client: httpx.Client) -> None:
    answer = client.get("/", follow_redirects=True)
    assert (answer.status_code, answer.url.path) == (200, "/docs")


def test_example_in_the_docs_can_be_sent(client: httpx.Client) -> None:
    schema = client.get("/openapi.json").json()["components"]["schemas"]["Transaction"]
    for example in schema["examples"]:
        assert client.post("/predict", json=example).status_code == 200


# ------------------------------------------------- The process and its start

DOCKERFILE = read("Dockerfile")
COMMAND = json.loads(re.findall(r"^CMD (.+)", DOCKERFILE, re.MULTILINE)[-1])


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the service as the Dockerfile does, but on a free port of this machine only."""
    processes = []

    def start(**environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", *COMMAND, "--host", "127.0.0.1", "--port", "0"],
            cwd=FOLDER,
            env={**os.environ, **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_start_metrics_and_sigterm(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(FAILURE_RATE="0", MODEL_LATENCY_SECONDS="1", MODEL_NAME="m", MODEL_VERSION="v9")
    assert process.stderr
    log = iter(process.stderr.readline, "")
    address = next(m for line in log if (m := re.search(r"http://(127.0.0.1):(\d+)", line)))
    with httpx.Client(base_url=address[0], trust_env=False) as client:
        series = [line for line in client.get("/metrics").text.splitlines() if "ml_" in line]
        values = [line.split()[-1] for line in series if not line.startswith("#")]
        assert len(values) == 1 + 2 + (11 + 2) + (11 + 2) and set(values) == {"0.0"}
        assert 'ml_predictions_total{model_name="m",version="v9"} 0.0' in series

        with socket.create_connection((address[1], int(address[2]))) as in_flight:
            in_flight.sendall(
                b"POST /predict HTTP/1.1\r\nHost: api\r\nContent-Type: application/json\r\n"
                b'Content-Length: 13\r\n\r\n{"amount": 1}'
            )
            assert client.get("/health").status_code == 200  # The service has both by now.
            process.send_signal(signal.SIGTERM)
            assert in_flight.recv(1024).startswith(b"HTTP/1.1 200")
    assert process.wait(timeout=10) in (0, -signal.SIGTERM)


@pytest.mark.parametrize(
    ("name", "given", "allowed"),
    [
        *[("FAILURE_RATE", g, "from 0 to 1") for g in ("", "a", "-0.1", "1.1", "nan")],
        *[("MODEL_LATENCY_SECONDS", g, "from 0 to 60") for g in ("", "61", "inf")],
        ("MODEL_NAME", "", "at least 1 character"),
        ("MODEL_VERSION", " ", "at least 1 character"),
    ],
)
def test_bad_setting_stops_the_start(
    start: Callable[..., subprocess.Popen[str]], name: str, given: str, allowed: str
) -> None:
    process = start(**{name: given})
    _, log = process.communicate(timeout=20)
    assert process.returncode == 1
    assert log == f"{name} must be {allowed}, not {given!r}\n"


# ----------------------------------------------------------------- The stack


def test_prometheus_scrapes_what_compose_runs() -> None:
    (job,) = (j for j in PROMETHEUS["scrape_configs"] if j["job_name"] == "model-api")
    (discovery,) = job["dns_sd_configs"]
    (service,) = discovery["names"]
    (port,) = COMPOSE["services"][service]["ports"]
    assert COMPOSE["services"][service]["build"] == "."
    assert discovery["type"] == "A"
    assert int(port.split(":")[-1]) == discovery["port"] == uvicorn.Config(app.app).port
    assert "--port" not in COMMAND and f":{discovery['port']}/health" in DOCKERFILE
    assert job.get("metrics_path", "/metrics") in app.app.openapi()["paths"]
    assert PROMETHEUS["global"]["scrape_interval"] == discovery["refresh_interval"] == "5s"


def test_every_setting_passes_through_compose() -> None:
    assert COMPOSE["services"]["model-api"]["environment"] == list(app.Settings.model_fields)


def test_ports_are_local_and_changeable() -> None:
    ports = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert sorted(ports) == [
        "127.0.0.1:${API_PORT:-8000}:8000",
        "127.0.0.1:${GRAFANA_PORT:-3000}:3000",
        "127.0.0.1:${PROMETHEUS_PORT:-9090}:9090",
    ]


def test_images_and_packages_are_pinned() -> None:
    images = [s["image"] for s in COMPOSE["services"].values() if "image" in s]
    assert images and all(re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", image) for image in images)
    packages = read("requirements.txt").split()
    assert all(re.fullmatch(r"[a-z\[\]-]+==[\d.]+", package) for package in packages)


def config(name: str) -> str:
    """An inline file of docker-compose.yml, as the containers see it."""
    content: str = COMPOSE["configs"][name]["content"]
    assert not re.search(r"(?<!\$)(\$\$)*\$(?!\$)", content), "Compose would replace a single $"
    return content.replace("$$", "$")


DASHBOARD = json.loads(config("dashboard"))
RULES = [rule for group in yaml.safe_load(config("rules"))["groups"] for rule in group["rules"]]
README = read("README.md")
TARGETS = [target for panel in DASHBOARD["panels"] for target in panel["targets"]]
QUERIES = [
    *re.findall(r"^```promql\n# .+\n(.+)\n```$", README, re.MULTILINE),
    *[target["expr"] for target in TARGETS],
    *[rule["expr"] for rule in RULES],
]


@pytest.fixture
def exposed(client: httpx.Client) -> dict[str, list[dict[str, str]]]:
    """The labels of each series that Prometheus has of a replica, by metric."""
    target = {"job": "model-api", "instance": "10.0.0.1:8000"}
    series = {"up": [target]}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            series.setdefault(sample.name, []).append({**sample.labels, **target})
    return series


@pytest.mark.parametrize("query", QUERIES)
def test_queries_name_what_metrics_exposes(
    exposed: dict[str, list[dict[str, str]]], query: str
) -> None:
    names = set(re.findall(r"\b(?:ml|process)_\w+|\bup\b", query))
    if "process_" in query and sys.platform != "linux":
        pytest.skip("process_* metrics exist on Linux only")
    assert names and names <= exposed.keys()
    for name, label, value in re.findall(r"(\w+)\{(\w+)=\"([^\"]+)\"\}", query):
        assert any(labels.get(label) == value for labels in exposed[name])
    for label in grouped_by(query):
        assert all(label in exposed[name][0] for name in names)


def grouped_by(query: str) -> set[str]:
    return {label for by in re.findall(r"by \(([^)]+)\)", query) for label in by.split(", ")}


def test_legends_name_labels_of_their_query() -> None:
    for target in TARGETS:
        named = set(re.findall(r"{{(\w+)}}", target.get("legendFormat", "")))
        assert named <= (grouped_by(target["expr"]) or {"instance"})


def test_alert_summaries_ask_for_exposed_metrics(exposed: dict[str, list[dict[str, str]]]) -> None:
    assert set(re.findall(r"\bml_\w+", config("rules"))) <= exposed.keys()


def test_panels_ask_the_provisioned_data_source() -> None:
    (source,) = yaml.safe_load(config("datasource"))["datasources"]
    reference = {"type": source["type"], "uid": source["uid"]}
    askers = [*DASHBOARD["panels"], *DASHBOARD["annotations"]["list"]]
    assert all(asker["datasource"] == reference for asker in askers)
    assert source["url"] == "http://prometheus:9090" and "prometheus" in COMPOSE["services"]
    assert source["jsonData"]["timeInterval"] == PROMETHEUS["global"]["scrape_interval"]


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    cells = Counter[tuple[int, int]]()
    for position in (panel["gridPos"] for panel in DASHBOARD["panels"]):
        columns = range(position["x"], position["x"] + position["w"])
        rows = range(position["y"], position["y"] + position["h"])
        cells.update((column, row) for column in columns for row in rows)
    assert max(cells.values()) == 1 and max(column for column, _ in cells) == 23
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_every_inline_file_is_mounted_where_its_reader_looks() -> None:
    services = COMPOSE["services"]
    mounted = {
        config["source"]: config["target"]
        for service in services.values()
        for config in service.get("configs", [])
    }
    assert mounted.keys() == COMPOSE["configs"].keys()
    assert mounted["rules"] == f"/etc/prometheus/{PROMETHEUS['rule_files'][0]}"
    assert mounted["datasource"].startswith("/etc/grafana/provisioning/datasources/")
    assert mounted["dashboards"].startswith("/etc/grafana/provisioning/dashboards/")
    (provider,) = yaml.safe_load(config("dashboards"))["providers"]
    assert Path(mounted["dashboard"]).parent == Path(provider["options"]["path"])
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert mounted["dashboard"] == home


def test_alerts_wait_and_say_what_to_do() -> None:
    names = [rule["alert"] for rule in RULES]
    assert names == ["ModelApiDown", "HighErrorRatio", "HighLatency", "PredictionDrift"]
    for rule in RULES:
        assert rule["for"] and rule["labels"]["severity"] in ("critical", "warning")
        assert ".Labels.version" in rule["annotations"]["summary"]


def play_customer(
    monkeypatch: pytest.MonkeyPatch, folder: Path, amount: str, requests: int
) -> list[tuple[str, object]]:
    """The URLs and bodies that a customer of the traffic service sends, without the waiting."""
    sent: list[tuple[str, object]] = []

    class Enough(Exception):
        """The customer has sent as many requests as the test wants."""

    class Client:
        async def post(self, url: str, json: object) -> None:
            sent.append((url, json))
            if len(sent) == requests:
                raise Enough
            if len(sent) % 10 == 0:
                raise httpx.ConnectError("The service is away.")

    async def no_wait(*_: object) -> None: ...

    async def resolve(*_: object) -> tuple[str, list[str], list[str]]:
        return "model-api", [], ["10.0.0.1", "10.0.0.2"]

    monkeypatch.setenv("TRAFFIC_RATE", "30")
    monkeypatch.setenv("TRAFFIC_AMOUNT", amount)
    (folder / "traffic.py").write_text(config("traffic"), encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(asyncio, "run", lambda main: main.close())
        script = runpy.run_path(str(folder / "traffic.py"))
    random.seed(1)
    customer = script["customer"]
    customer.__globals__["asyncio"] = SimpleNamespace(sleep=no_wait, to_thread=resolve)
    with pytest.raises(Enough):
        asyncio.run(customer(Client()))
    return sent


def fraud_share(bodies: Sequence[object]) -> float:
    async def predict_all() -> list[app.Prediction]:
        return [await app.infer(app.Transaction.model_validate(body)) for body in bodies]

    predictions = [answer.prediction for answer in asyncio.run(predict_all())]
    return predictions.count("fraud") / len(predictions)


def test_traffic_is_plausible(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent = play_customer(monkeypatch, tmp_path, amount="50", requests=3_000)
    urls = Counter(url for url, _ in sent)
    assert urls.keys() == {f"http://10.0.0.{n}:8000/predict" for n in (1, 2)}
    assert min(urls.values()) > 1_300, "the replicas share the requests"
    transactions = [body for _, body in sent if isinstance(body, dict)]
    assert 0.97 < len(transactions) / len(sent) < 0.99
    assert 0.02 < fraud_share(transactions) < 0.05


def test_traffic_amount_stages_a_drift(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent = play_customer(monkeypatch, tmp_path, amount="500", requests=300)
    assert fraud_share([body for _, body in sent if isinstance(body, dict)]) > 0.3


@pytest.mark.parametrize(
    ("name", "given"),
    [("TRAFFIC_RATE", "many"), ("TRAFFIC_RATE", "0"), ("TRAFFIC_AMOUNT", "-1")],
)
def test_bad_traffic_setting_stops_the_start(name: str, given: str) -> None:
    environment = {"TRAFFIC_RATE": "30", "TRAFFIC_AMOUNT": "50", name: given}
    run = subprocess.run(
        [sys.executable, "-c", config("traffic")],
        check=False,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert run.returncode == 1
    assert run.stderr.startswith("TRAFFIC_RATE must be") and run.stderr.count("\n") == 1


def test_live_editing_replaces_app_py() -> None:
    (rule,) = COMPOSE["services"]["model-api"]["develop"]["watch"]
    workdir = re.findall(r"^WORKDIR (.+)", DOCKERFILE, re.MULTILINE)[-1]
    assert (FOLDER / rule["path"]).is_file() and rule["target"] == f"{workdir}/{rule['path']}"


def test_stored_data_outlives_the_containers() -> None:
    for service in ("prometheus", "grafana"):
        volumes = [volume.split(":")[0] for volume in COMPOSE["services"][service]["volumes"]]
        assert set(volumes) & COMPOSE["volumes"].keys()


# ---------------------------------------------------------------- The README


def table(first_column: str) -> dict[str, list[str]]:
    """The rows of a table of the README, by their first cell."""
    _, _, rest = README.partition(f"\n| {first_column} |")
    lines = rest.partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def test_readme_lists_the_settings() -> None:
    listed = table("Variable")
    settings = app.Settings.model_fields.items()
    compose = re.findall(r"\$\{(\w+):-([^}]+)\}", read("docker-compose.yml"))
    assert {name: default for name, (default, *_) in listed.items()} == {
        **{name: str(field.default) for name, field in settings},
        **dict(compose),
    }
    assert all(listed[name][1] == field.description for name, field in settings)


def test_readme_lists_the_metrics(client: httpx.Client) -> None:
    families = text_string_to_metric_families(client.get("/metrics").text)
    exposed = {
        family.name + "_total" * (family.type == "counter"): [
            family.type,
            *sorted({*family.samples[0].labels} - LABELS.keys()),
        ]
        for family in families
        if family.name.startswith("ml_")
    }
    listed = table("Metric").items()
    assert {name: [cell for cell in row[:2] if cell] for name, row in listed} == exposed


def test_readme_lists_the_alerts() -> None:
    assert list(table("Alert")) == [rule["alert"] for rule in RULES]
    for rule, (text,) in zip(RULES, table("Alert").values()):
        assert text.endswith(f"for {rule['for'].removesuffix('s')} s")


def test_readme_answers_are_real(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = re.findall(r"^\$ curl .*--json '(.+?)'.*/predict.*\n({.+})$", README, re.MULTILINE)
    assert len(shown) == 4
    for name in ("MODEL_NAME", "MODEL_VERSION"):
        monkeypatch.setattr(app.settings, name, app.Settings.model_fields[name].default)
    for body, answer in shown:
        real = client.post("/predict", content=body, headers=JSON).json()
        expected = json.loads(answer)
        # The last digit of the score depends on the machine.
        assert real.pop("score", None) == pytest.approx(expected.pop("score", None))
        assert real == expected
    monkeypatch.setattr(app.settings, "FAILURE_RATE", 1)
    assert f"\n{client.post('/predict', json=LEGIT).text}\n" in README


def test_readme_and_ci_run_the_same_tests() -> None:
    command = read(".ci/run").splitlines()[-1]
    assert f"```sh\n{command}\n```" in README
