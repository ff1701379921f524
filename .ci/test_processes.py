"""Tests of services that run as processes, asked over the network: the service as the image starts
it, and .work/monitoring.py in a service as people have them at work.

Run by .ci/run. They need no Docker.
"""

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
from prometheus_client.parser import text_string_to_metric_families

FOLDER = Path(__file__).parent.parent


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Give a process 20 s for something."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"not within 20 s: {what}"
        time.sleep(0.05)


class Service(NamedTuple):
    """A service that runs as a process of its own, at a port of this machine."""

    process: subprocess.Popen[str]
    port: int
    log: Path

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def listens(self) -> bool:
        """Whether it takes connections."""
        assert self.process.poll() is None, "the service ended"
        with socket.socket() as connection:
            return connection.connect_ex(("127.0.0.1", self.port)) == 0

    def connect(self, request: bytes) -> socket.socket:
        """Send the beginning of a request."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(request)
        return connection

    def sample(self, name: str, reason: str | None = None) -> float:
        """What /metrics says of a series."""
        text = httpx.get(f"{self.url}/metrics", trust_env=False, timeout=60).text
        (value,) = (
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and sample.labels.get("reason") == reason
        )
        return value


@contextmanager
def start(command: list[str], **environment: str) -> Iterator[Service]:
    """Start a command of uvicorn on a free port, and end it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (
        tempfile.NamedTemporaryFile() as log,
        subprocess.Popen(
            [sys.executable, "-m", *command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=FOLDER,
            env=os.environ | environment,
            stdout=log,
            stderr=log,
            text=True,
        ) as process,
    ):
        service = Service(process, port, Path(log.name))
        try:
            wait_until(service.listens, "the service listens")
            yield service
        finally:
            process.terminate()


# ------------------------------------------- The service as the image starts it


@contextmanager
def start_as_image(failure_rate: str = "0") -> Iterator[Service]:
    """Run CMD of Dockerfile, with calls of about a second."""
    _, _, command = (FOLDER / "Dockerfile").read_text(encoding="utf-8").rpartition("\nCMD ")
    with start(
        json.loads(command.replace("\\\n", "")),
        FAILURE_RATE=failure_rate,
        MODEL_LATENCY_SECONDS="1",
        WEB_CONCURRENCY="3",  # As some platforms set it.
    ) as service:
        yield service


# Without its body, {"amount": 1}.
REQUEST = (
    b"POST /predict HTTP/1.1\r\n"
    b"Host: a\r\n"
    b"Content-Type: application/json\r\n"
    b"Content-Length: 13\r\n"
    b"\r\n"
)


def test_each_scrape_sees_all_requests() -> None:
    with start_as_image() as service:
        for _ in range(12):
            httpx.post(f"{service.url}/predict", json={}, trust_env=False)
        assert {service.sample("ml_predictions_total") for _ in range(12)} == {12}


def test_a_client_that_leaves_while_it_sends_is_counted() -> None:
    with start_as_image() as service:
        service.connect(REQUEST + b'{"amount"').close()
        wait_until(
            lambda: service.sample("ml_prediction_errors_total", "invalid_input") == 1,
            "the client that left is bad input",
        )
        assert service.sample("ml_predictions_total") == 1


def stop_while_in_flight(service: Service) -> bytes:
    """Stop the service while a request is in the model, and return the answer to it."""
    with service.connect(REQUEST + b'{"amount": 1}') as connection:
        wait_until(
            lambda: service.sample("ml_predictions_in_progress") == 1, "a call is in progress"
        )
        service.process.send_signal(signal.SIGTERM)
        return connection.recv(1024)


def test_a_request_in_flight_is_answered_before_a_stop() -> None:
    with start_as_image() as service:
        assert stop_while_in_flight(service).startswith(b"HTTP/1.1 200")


def test_a_stop_takes_no_longer_than_docker_waits() -> None:
    """Docker kills after 10 s. This request never ends."""
    with start_as_image() as service, service.connect(REQUEST + b'{"am'):
        service.process.send_signal(signal.SIGTERM)
        service.process.wait(timeout=9.5)


# Some proxies ask for a WebSocket with each request. uvicorn then drops the body.
UPGRADE = REQUEST.removesuffix(b"\r\n") + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


def test_a_request_for_a_websocket_is_answered_and_counted() -> None:
    with start_as_image() as service:
        with service.connect(UPGRADE + b'{"amount": 1}') as connection:
            assert connection.recv(1024).startswith(b"HTTP/1.1 422")
        assert service.sample("ml_predictions_total") == 1


def test_a_request_for_a_websocket_takes_no_other_with_it_at_a_stop() -> None:
    with start_as_image() as service, service.connect(UPGRADE + b'{"am'):
        assert stop_while_in_flight(service).startswith(b"HTTP/1.1 200")


def test_failures_are_logged_and_requests_are_not() -> None:
    with start_as_image(failure_rate="1") as service:
        answer = httpx.post(f"{service.url}/predict", json={"amount": 1}, trust_env=False)
        log = service.log.read_text(encoding="utf-8")
    assert answer.status_code == 500
    assert "SimulatedError" in log
    assert "POST" not in log


def test_python_starts_it_on_this_machine_only() -> None:
    """uvicorn.run is replaced by print. As it gets no host, it would take 127.0.0.1."""
    code = (
        "import runpy, uvicorn;"
        "uvicorn.run = lambda app, **options: print(type(app).__name__, options);"
        "runpy.run_path('app.py', run_name='__main__')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True, check=False
    )
    assert run.stdout == "FastAPI {'workers': 1, 'ws': 'none'}\n", run.stdout + run.stderr


# --------------------------------------------------------- A service at work


@contextmanager
def start_at_work() -> Iterator[Service]:
    """Run work_service.py, which imports .work/monitoring.py, behind a proxy with a prefix."""
    command = ["uvicorn", "work_service:create_app", "--factory", "--app-dir", ".ci"]
    command += ["--root-path", "/prefix"]
    with start(command, PYTHONPATH=".work") as service:
        yield service


class Request(NamedTuple):
    """A request, what its client sees, and how it is counted."""

    path: str
    do: str
    status: int | None
    reason: str | None
    headers: dict[str, str] | None = None


REQUESTS = [
    Request("/api/sync", "answer", 200, None),
    Request("/api/sync", "x" * 1000, 413, "invalid_input"),
    Request("/api/sync", "route 415", 415, "invalid_input"),
    Request("/api/sync", "", 422, "invalid_input"),
    Request("/api/batch", "answer", 200, None),
    Request("/api/batch", "raise", 500, "model_failure"),
    Request("/api/sync", "answer", 401, "refused", {"key": "wrong"}),
    Request("/api/sync", "raise", 500, "model_failure"),
    Request("/api/sync", "raise 404", 404, "model_failure"),
    Request("/api/sync", "exit", 500, "model_failure"),
    Request("/api/sync", "route 500", 500, "other_failure"),
    Request("/api/sync", "answer", 503, "other_failure", {"model": "away"}),
    Request("/api/sync", "answer", 500, "other_failure", {"model": "broken"}),
    Request("/api/async/m", "answer", 200, None),
    Request("/api/async/m", "raise", 200, "model_failure"),
    Request("/api/async/m", "cancel", 500, "model_failure"),
    Request("/api/async/m", "background", 200, "other_failure"),
    Request("/api/stream", "answer", 200, None),
    Request("/api/stream", "raise", None, "model_failure"),
    Request("/api/stream", "route 500", None, "other_failure"),
]
NOT_COUNTED = [
    Request("/api/sync/", "answer", 307, None),
    Request("/api/other", "answer", 200, None),
    Request("/api/other", "answer", 401, None, {"key": "wrong"}),
]


async def send(client: httpx.AsyncClient, request: Request) -> None:
    """Send a request, and check what its client sees."""
    headers = {"key": "secret"} | (request.headers or {})
    order = {"do": request.do}
    body = [order] if request.path == "/api/batch" else order
    try:
        answer = await client.post(request.path, json=body, headers=headers)
    except httpx.RemoteProtocolError:
        assert request.status is None, request  # The stream broke off.
    else:
        assert answer.status_code == request.status, request


async def send_all(url: str, requests: list[Request]) -> None:
    """Send requests, 20 at a time."""
    limits = httpx.Limits(max_connections=20, max_keepalive_connections=0)
    async with httpx.AsyncClient(
        base_url=url, limits=limits, trust_env=False, timeout=60
    ) as client:
        await asyncio.gather(*(send(client, request) for request in requests))


def test_at_work_each_request_is_counted_once_by_how_it_ended() -> None:
    requests = 20 * REQUESTS
    random.shuffle(requests)
    expected = Counter(request.reason for request in requests if request.reason)
    with start_at_work() as service:
        asyncio.run(send_all(service.url, requests + 20 * NOT_COUNTED))
        wait_until(
            lambda: service.sample("ml_predictions_total") == len(requests), "all are counted"
        )
        counted = {
            reason: service.sample("ml_prediction_errors_total", reason) for reason in expected
        }
        assert counted == expected
        assert service.sample("ml_predictions_in_progress") == 0


def test_at_work_a_client_that_leaves_a_stream_is_counted() -> None:
    headers = {"key": "secret"}
    with start_at_work() as service:
        url = f"{service.url}/api/stream"
        body = {"do": "endless"}
        with httpx.stream("POST", url, json=body, headers=headers, trust_env=False) as answer:
            lines = answer.iter_lines()
            for _ in range(5):  # It leaves after the model's three.
                assert next(lines) == "a line"
        wait_until(
            lambda: service.sample("ml_prediction_errors_total", "other_failure") == 1,
            "the client that left is counted",
        )


def test_at_work_the_preflight_of_a_browser_is_not_counted() -> None:
    with start_at_work() as service:
        assert httpx.options(f"{service.url}/api/sync", trust_env=False).status_code == 405
        assert service.sample("ml_predictions_total") == 0


def lines_of_metrics(service: Service) -> set[str]:
    """What /metrics says of the metrics of monitoring.py, without buckets and names of models."""
    source = (FOLDER / ".work/monitoring.py").read_text(encoding="utf-8")
    names = "|".join(re.findall(r'"(ml_\w+)"', source))
    text = httpx.get(f"{service.url}/metrics", trust_env=False).text
    lines = [line for line in text.splitlines() if re.search(rf"\b({names})", line)]
    return {
        re.sub(r'(model_name|version)="[^"]*"', r"\1", line) for line in lines if "le=" not in line
    }


def test_at_work_the_metrics_are_those_of_the_demo_with_two_more_reasons() -> None:
    with start_as_image() as service, start_at_work() as at_work:
        demo, work = lines_of_metrics(service), lines_of_metrics(at_work)
    assert demo <= work
    assert work - demo == {
        f'ml_prediction_errors_total{{model_name,reason="{reason}",version}} 0.0'
        for reason in ("refused", "other_failure")
    }
