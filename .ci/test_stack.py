"""Tests of the files around the service: that they agree, that the customers behave, and that each
query answers its question, as judged by promtool.

Run by .ci/run, which installs promtool. They need no Docker.
"""

import asyncio
import importlib.util
import json
import math
import os
import random
import re
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, patch

import httpx
import pytest
import yaml  # uvicorn[standard] brings it along.
from httpx import AsyncClient
from prometheus_client import REGISTRY
from pytest import MonkeyPatch, approx

import app

pytestmark = pytest.mark.anyio

FOLDER = Path(__file__).parent.parent


def read(name: str) -> str:
    """A file of the project."""
    return (FOLDER / name).read_text(encoding="utf-8")


README = read("README.md")
AT_WORK = read(".work/README.md")
PROMETHEUS = yaml.safe_load(read("prometheus.yml"))
RULES = [
    rule
    for group in yaml.safe_load(read(".prometheus/rules.yml"))["groups"]
    for rule in group["rules"]
]
DASHBOARD = json.loads(read(".grafana/dashboards/fraud-model.json"))
MARKS = DASHBOARD["annotations"]["list"]
PANELS = {panel.get("title", ""): panel for panel in DASHBOARD["panels"]}
SERVICES = yaml.safe_load(read("docker-compose.yml"))["services"]


@pytest.fixture
def anyio_backend() -> str:
    """The event loop of the service."""
    return "asyncio"


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


@pytest.fixture
async def client(monkeypatch: MonkeyPatch) -> AsyncIterator[AsyncClient]:
    """What the customers send with. It reaches the service in this process, which never fails."""
    monkeypatch.setattr(app.settings, "FAILURE_RATE", 0)
    monkeypatch.setattr(app.settings, "MODEL_LATENCY_SECONDS", 0)
    async with AsyncClient(transport=httpx.ASGITransport(app=app.app)) as client:
        yield client


@pytest.fixture(autouse=True)
def replicas(monkeypatch: MonkeyPatch) -> None:
    """DNS knows two replicas."""
    addresses = ["10.0.0.1", "10.0.0.2"]
    monkeypatch.setattr(socket, "gethostbyname_ex", lambda name: (name, [], addresses))


async def test_customers_are_answered_by_each_replica(client: AsyncClient) -> None:
    answers = []

    async def on_response(response: httpx.Response) -> None:
        answers.append((str(response.url), response.status_code))

    client.event_hooks = {"response": [on_response]}
    traffic = load_traffic()
    for _ in range(40):
        await traffic.send(client)
    assert {url for url, _ in answers} == {
        "http://10.0.0.1:8000/predict",
        "http://10.0.0.2:8000/predict",
    }
    assert {status for _, status in answers} <= {200, 422}


@pytest.mark.parametrize("error", [OSError(), httpx.ReadTimeout("")], ids=repr)
async def test_customers_outlive_a_service_that_is_away(
    client: AsyncClient, error: Exception
) -> None:
    on_request = AsyncMock(side_effect=error)
    client.event_hooks = {"request": [on_request]}
    await load_traffic().send(client)
    on_request.assert_awaited_once()


async def test_customers_give_up_a_request_that_hangs(client: AsyncClient) -> None:
    async def hang(_: httpx.Request) -> None:
        await asyncio.sleep(3600)

    client.event_hooks = {"request": [hang]}
    traffic = load_traffic()
    traffic.TIMEOUT_SECONDS = 0.01
    await asyncio.wait_for(traffic.send(client), timeout=60)


async def test_customers_keep_their_rate_and_do_not_wait(monkeypatch: MonkeyPatch) -> None:
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
    assert {*rates} == {9}
    assert not any(client.trust_env for client in sent), "they may ask a proxy"


@pytest.mark.parametrize(("amount", "least", "most"), [("50", 0.01, 0.05), ("500", 0.3, 0.5)])
async def test_customers_of_the_demo_model_pay_as_the_readme_says(
    client: AsyncClient, amount: str, least: float, most: float
) -> None:
    traffic = load_traffic(TRAFFIC_AMOUNT=amount)
    random.seed(1)
    transactions = [traffic.make_transaction() for _ in range(2_000)]
    answers = [
        await client.post("http://api/predict", json=transaction) for transaction in transactions
    ]
    invalid = [answer for answer in answers if answer.status_code == 422]
    fraud = [answer for answer in answers if '"fraud"' in answer.text]
    abroad = [transaction for transaction in transactions if transaction.get("international")]
    assert len(invalid) / 2_000 == approx(0.02, abs=0.015)
    assert len(abroad) / 2_000 == approx(0.1, abs=0.02)
    assert least < len(fraud) / (2_000 - len(invalid)) < most


@pytest.mark.parametrize(
    ("name", "given"), [("TRAFFIC_RATE", "0"), ("TRAFFIC_RATE", "201"), ("TRAFFIC_AMOUNT", "x")]
)
def test_a_bad_setting_stops_the_customers(name: str, given: str) -> None:
    with pytest.raises(SystemExit, match=rf"^{name}='{given}': \w[^\n]+$"):
        load_traffic(**{name: given})


# --------------------------------------------------------- What files agree on


def environment(service: str) -> dict[str, str | None]:
    """The variables of a service of the stack."""
    variables = SERVICES[service].get("environment", [])
    if isinstance(variables, dict):
        return variables
    return {name: value or None for name, _, value in (line.partition("=") for line in variables)}


def test_compose_passes_each_setting_on() -> None:
    for service, settings in {
        "model-api": app.Settings,
        "traffic": load_traffic().Settings,
    }.items():
        for name in settings.model_fields:
            value = environment(service).get(name, "missing")
            assert value is None or "${" + name in value, f"{name} of {service} is {value}"


def test_each_port_is_open_to_this_machine_only() -> None:
    for service in SERVICES.values():
        for port in service.get("ports", []):
            address = port if isinstance(port, str) else port.get("host_ip", "all")
            assert address.startswith(("127.0.0.1", "[::1]", "::1")), port


def seconds(duration: str) -> int:
    """A duration as Prometheus writes it."""
    return int(duration[:-1]) * {"s": 1, "m": 60}[duration[-1]]


def test_a_missed_scrape_leaves_no_gap() -> None:
    """Otherwise lines break, and alerts start again."""
    command = " ".join(SERVICES["prometheus"]["command"])
    (look_back,) = re.findall(r"--query.lookback-delta=(\w+)", command)
    assert seconds(look_back) >= 3 * seconds(PROMETHEUS["global"]["scrape_interval"])


def boundaries(metric: str) -> list[float]:
    """Where the buckets of a histogram end, without infinity."""
    (found,) = (one for one in REGISTRY.collect() if one.name == metric)
    ends = [float(sample.labels["le"]) for sample in found.samples if "le" in sample.labels]
    return [end for end in ends if end < math.inf]


def test_buckets_are_there_for_all_that_the_readme_has_people_look_at() -> None:
    """A p95 on both sides of the limit, calls of 1.7 s, and scores of almost 0 and almost 1."""
    durations = boundaries("ml_prediction_duration_seconds")
    assert red("Latency, p95") in durations
    assert max(durations) >= 2.5
    assert len([end for end in durations if end < red("Latency, p95")]) >= 3
    scores = boundaries("ml_prediction_score")
    assert app.THRESHOLD in scores
    assert min(scores) <= 0.1
    assert max(scores) > 0.9


# What a tile, the chart below it and an alert have in common.
ALERTS = {
    "Failed calls": "HighErrorRatio",
    "Latency, p95": "HighLatency",
    "Share of fraud": "PredictionDrift",
}


def steps(title: str) -> list[dict[str, Any]]:
    """The colours of a panel, each from a value on."""
    thresholds = PANELS[title]["fieldConfig"]["defaults"]["thresholds"]
    assert thresholds["mode"] == "absolute"
    return list(thresholds["steps"])


def red(title: str) -> float:
    """Where a panel turns red."""
    (value,) = (step["value"] for step in steps(title) if step["color"] == "red")
    return float(value)


def colour(title: str, value: float) -> str:
    """The colour of a value, as Grafana finds it: the last step that it reaches, in order."""
    found = steps(title)[0]
    for step in steps(title)[1:]:
        if not value >= step["value"]:  # Not <, as NaN is neither.
            break
        found = step
    return str(found["color"])


@pytest.mark.parametrize("title", ALERTS)
def test_a_tile_is_green_below_its_limit_red_over_it_and_grey_if_unknown(title: str) -> None:
    below, over = red(title) * 0.99, red(title) * 1.01
    colours = [colour(title, value) for value in (0, below, over, 1000)]
    assert colours == ["green", "green", "red", "red"]
    assert colour(title, math.nan) == "#808080"
    assert all(query["instant"] for query in queries(PANELS[title])), "it would show old values"
    shown = PANELS[title]["fieldConfig"]["defaults"]
    assert "mappings" not in shown
    assert not re.search(r"\d", shown["noValue"])


def test_the_tile_of_requests_is_red_without_data() -> None:
    assert steps("Requests per second")[0]["color"] == "red"
    assert colour("Requests per second", 0) != "red"


@pytest.mark.parametrize("title", ALERTS)
def test_the_red_line_of_a_chart_is_the_limit_of_its_tile_and_in_view(title: str) -> None:
    (chart,) = (name for name in PANELS if name.startswith(title) and name.endswith("by version"))
    shown = PANELS[chart]["fieldConfig"]["defaults"]
    assert red(chart) == red(title)
    assert shown["custom"]["thresholdsStyle"] == {"mode": "line"}
    assert shown["custom"]["axisSoftMax"] > red(chart)
    (mark,) = (one for one in MARKS if one["name"] == ALERTS[title])
    assert PANELS[chart]["id"] in mark["filter"]["ids"]


def test_a_unit_is_that_of_the_query() -> None:
    units = {
        "ratio_rate": "percentunit",
        "duration_seconds:p": "s",
        "duration_seconds_sum": "s",
        "memory_bytes": "bytes",
    }
    for title, panel in PANELS.items():
        shown = panel.get("fieldConfig", {}).get("defaults", {}).get("unit")
        for query in queries(panel):
            expected = {unit for name, unit in units.items() if name in query["expr"]}
            assert expected <= {shown}, title


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


@pytest.mark.parametrize(("title", "alert"), ALERTS.items())
def test_the_readme_has_the_limit_of_each_alert(title: str, alert: str) -> None:
    (row,) = (" ".join(row) for row in table("Column").values() if alert in row)
    assert re.search(rf"over ({red(title)} s|{red(title):.0%})", row)


@pytest.mark.parametrize("page", [README, AT_WORK], ids=["README.md", ".work/README.md"])
def test_each_block_of_a_page_is_closed(page: str) -> None:
    fences = re.findall(r"^ *```(.*)", page, re.MULTILINE)
    assert not any(fences[1::2]), fences


async def test_the_readme_has_the_answers_of_the_demo_model(client: AsyncClient) -> None:
    examples = re.findall(r"-d '(.+?)' .+/predict\n```\n\n```json\n(.+)\n```", README)
    assert len(examples) >= 3
    for body, expected in examples:
        headers = {"Content-Type": "application/json"}
        answer = await client.post("http://api/predict", content=body, headers=headers)
        found, said = answer.json(), json.loads(expected)
        assert found.pop("score", 0) == approx(said.pop("score", 0))
        assert found == said


# ---------------------------------------------------------------- The queries


def promtool(*arguments: str | Path) -> None:
    """Run Prometheus's own tool, which must find nothing wrong."""
    run = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_prometheus_takes_its_configuration() -> None:
    promtool("check", "config", "--syntax-only", FOLDER / "prometheus.yml")


def test_the_rules_pass_their_own_tests() -> None:
    promtool("test", "rules", FOLDER / ".prometheus/rules_test.yml")


def test_alerts_and_their_tests_can_be_pasted(tmp_path: Path) -> None:
    """Into the two files, as .work/README.md says."""
    rules = yaml.safe_load(read(".prometheus/rules.yml"))
    tests = yaml.safe_load(read(".prometheus/rules_test.yml"))
    pasted = [
        yaml.safe_load(block) for block in re.findall(r"```yaml\n(.+?)```", AT_WORK, re.DOTALL)
    ]
    alerts = [block[0] for block in pasted if isinstance(block, list) and "alert" in block[0]]
    stories = [block[0] for block in pasted if isinstance(block, list) and "name" in block[0]]
    assert len(alerts) == len(stories) == 2
    rules["groups"][-1]["rules"] += alerts
    tests["tests"] += stories
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules), encoding="utf-8")
    (tmp_path / "rules_test.yml").write_text(yaml.safe_dump(tests), encoding="utf-8")
    promtool("test", "rules", tmp_path / "rules_test.yml")


def test_the_commands_for_longer_windows_leave_the_rules_right(tmp_path: Path) -> None:
    for folder in (".prometheus", ".grafana"):
        shutil.copytree(FOLDER / folder, tmp_path / folder)
    five_minutes, *few_requests = re.findall(r"\n(sed -i .+)", AT_WORK)
    subprocess.run(five_minutes, shell=True, cwd=tmp_path, check=True)
    promtool("test", "rules", tmp_path / ".prometheus/rules_test.yml")
    for command in few_requests:
        subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    for file in (".prometheus/rules.yml", ".grafana/dashboards/fraud-model.json"):
        assert "30s" not in (tmp_path / file).read_text(encoding="utf-8")
    promtool("test", "rules", tmp_path / ".prometheus/rules_test.yml")


def judge(folder: Path, series: dict[str, str], expectations: list[dict[str, Any]]) -> None:
    """Let promtool compare what the rules and queries make of series with what is expected."""
    test = {
        "interval": "5s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [{"eval_time": "20m", **expected} for expected in expectations],
    }
    rules = str(FOLDER / ".prometheus/rules.yml")
    tests = {"rule_files": [rules], "evaluation_interval": "5s", "tests": [test]}
    (folder / "judge.yml").write_text(yaml.safe_dump(tests), encoding="utf-8")
    promtool("test", "rules", folder / "judge.yml")


def growing(per_second: float) -> str:
    """The values of a counter, one every 5 s for 20 minutes."""
    return f"0+{per_second * 5}x240"


def test_a_summary_names_labels_that_there_are() -> None:
    samples = [sample for metric in REGISTRY.collect() for sample in metric.samples]
    labels = {"job", "instance", *(label for sample in samples for label in sample.labels)}
    for rule in RULES:
        for text in rule.get("annotations", {}).values():
            assert {*re.findall(r"\.Labels\.(\w+)", text)} <= labels, text


@pytest.mark.parametrize("title", ALERTS)
def test_an_alert_fires_where_its_tile_turns_red(title: str, tmp_path: Path) -> None:
    limit = red(title)
    for share_of_limit, expected in ((0.99, []), (1.01, [{"labels": "{}", "value": 1}])):
        failed = limit * share_of_limit if title == "Failed calls" else 0
        # Of p95, 5% of the calls may be slower than the limit.
        slow = 0.05 * share_of_limit if title == "Latency, p95" else 0
        fraud = limit * share_of_limit if title == "Share of fraud" else 0
        version = 'model_name="m", version="v1"'
        calls = "ml_prediction_duration_seconds"
        series = {
            f"{calls}_count{{{version}}}": growing(30),
            f'{calls}_bucket{{{version}, le="{red("Latency, p95")}"}}': growing(30 * (1 - slow)),
            f'{calls}_bucket{{{version}, le="100"}}': growing(30),
            f'{calls}_bucket{{{version}, le="+Inf"}}': growing(30),
            f'ml_prediction_errors_total{{{version}, reason="model_failure"}}': growing(
                30 * failed
            ),
            f"ml_prediction_score_count{{{version}}}": growing(30),
            f'ml_prediction_score_bucket{{{version}, le="{app.THRESHOLD}"}}': growing(
                30 * (1 - fraud)
            ),
        }
        firing = f'count(ALERTS{{alertname="{ALERTS[title]}", alertstate="firing"}})'
        judge(tmp_path, series, [{"expr": firing, "exp_samples": expected}])


# What three replicas report. a and b are v1, c is v2. Each series differs from the others, so that
# each panel has one right answer.
GAUGES: dict[str, tuple[float, float, float]] = {
    "up": (1, 1, 0),
    "ml_predictions_in_progress": (3, 4, 5),
    "process_resident_memory_bytes": (1e8, 2e8, 3e8),
}
PER_SECOND: dict[str, dict[str, tuple[float, float, float]]] = {
    "process_cpu_seconds_total": {"": (0.1, 0.3, 0.5)},
    "ml_predictions_total": {"": (11, 22, 9)},
    "ml_prediction_errors_total": {
        'reason="invalid_input"': (1, 2, 4),
        'reason="model_failure"': (1, 5, 2),
    },
    "ml_prediction_duration_seconds_count": {"": (10, 20, 5)},
    "ml_prediction_duration_seconds_sum": {"": (1, 2, 2)},
    "ml_prediction_duration_seconds_bucket": {
        'le="0.05"': (5, 10, 0),
        'le="0.1"': (9, 18, 0),
        'le="0.15"': (10, 20, 0),
        'le="0.25"': (10, 20, 4),
        'le="0.5"': (10, 20, 5),
        'le="+Inf"': (10, 20, 5),
    },
    "ml_prediction_score_count": {"": (9, 15, 3)},
    "ml_prediction_score_bucket": {
        f'le="{app.THRESHOLD}"': (8, 13, 1.5),
        'le="1.0"': (9, 15, 3),
        'le="+Inf"': (9, 15, 3),
    },
    # The README and .work/README.md have their readers add these.
    "ml_transactions_total": {
        'international="False"': (9, 18, 4.5),
        'international="True"': (1, 2, 0.5),
    },
    "ml_prediction_outcomes_total": {'prediction="fraud", truth="fraud"': (1, 1, 1)},
}

# 30s, unless people have taken longer windows.
WINDOW = RULES[0]["record"].rpartition("rate")[2]

# What a query of a panel finds then, by its refId.
EXPECTED: dict[str, dict[str, dict[str, float]]] = {
    "Requests per second": {"A": {"": 42}},
    "Failed calls": {"A": {"v1": 6 / 30, "v2": 2 / 5}},
    "Latency, p95": {"A": {"v1": 0.125, "v2": 0.4375}},
    "Share of fraud": {"A": {"v1": 3 / 24, "v2": 1.5 / 3}},
    "Requests by version": {"A": {"v1": 33, "v2": 9}, "B": {"invalid_input": 7}},
    "Failed calls by version": {"A": {"v1": 6 / 30, "v2": 2 / 5}},
    "Latency, p95, by version": {"A": {"v1": 0.125, "v2": 0.4375}},
    "Share of fraud by version": {"A": {"v1": 3 / 24, "v2": 1.5 / 3}},
    "In progress": {"A": {"v1": 7, "v2": 5}},
    "Versions": {"A": {"v1": 2, "v2": 1}, "B": {"v1": 33 * 1200, "v2": 9 * 1200}},
    "Memory by version": {"A": {"v1": 2e8, "v2": 3e8}},
    "CPU by version": {"A": {"v1": 0.3, "v2": 0.5}},
    "Latency of all versions": {
        "A": {"p99": 0.25 + 0.25 * 0.65},
        "B": {"p95": 0.15 + 0.1 * 3.25 / 4},
        "C": {"p50": 0.05 + 0.05 * 2.5 / 12},
        "D": {"average": 5 / 35},
    },
    "Predictions by score": {
        "A": {str(app.THRESHOLD): seconds(WINDOW) * 22.5, "1.0": seconds(WINDOW) * 27}
    },
}


def reported_series() -> dict[str, str]:
    """What the three replicas report, as input of promtool."""
    series = {}
    for number, (instance, version) in enumerate({"a": "v1", "b": "v1", "c": "v2"}.items()):
        target = f'job="model-api", instance="{instance}"'
        model = f'{target}, model_name="m", version="{version}"'
        for name, values in GAUGES.items():
            labels = model if name.startswith("ml_") else target
            series[f"{name}{{{labels}}}"] = f"{values[number]}x240"
        for name, rates in PER_SECOND.items():
            labels = model if name.startswith("ml_") else target
            for label, values in rates.items():
                series[f"{name}{{{labels}, {label}}}"] = growing(values[number])
    return series


def expect(query: str, legend: str, expected: dict[str, float]) -> list[dict[str, Any]]:
    """What a query finds: a line for each value of the label that its legend names, or one line."""
    query = re.sub(r"\$__\w+", WINDOW, query)  # The variables that Grafana replaces.
    label = "".join(re.findall(r"{{(\w+)}}", legend))
    samples = [
        {"labels": f'{{{label}="{value}"}}' if label else "{}", "value": round(number, 4)}
        for value, number in expected.items()
    ]
    return [
        {"expr": f"round(sum by ({label}) ({query}), 0.0001)", "exp_samples": samples},
        {"expr": f"count by ({label}) ({query}) > 1", "exp_samples": []},
    ]


def queries(panel: dict[str, Any]) -> list[dict[str, Any]]:
    """The queries of a panel that are asked and drawn."""
    return [
        target for target in panel.get("targets", []) if "expr" in target and not target.get("hide")
    ]


# Readers may rename panels, or delete them.
@pytest.mark.parametrize("title", [title for title in EXPECTED if title in PANELS])
def test_a_panel_shows_what_its_title_says(title: str, tmp_path: Path) -> None:
    found = {query["refId"]: query for query in queries(PANELS[title])}
    expectations = []
    for name, expected in EXPECTED[title].items():
        legend = found[name].get("legendFormat", "{{version}}" if len(expected) > 1 else "")
        assert "{{" in legend or {*expected} == {legend}, f"{title}: {legend}"
        expectations += expect(found[name]["expr"], legend, expected)
    judge(tmp_path, reported_series(), expectations)


def test_a_mark_is_that_of_its_alert_and_on_panels_that_are_there(tmp_path: Path) -> None:
    ids = {panel["id"] for panel in PANELS.values()}
    marks = {mark["name"]: mark for mark in MARKS if "target" in mark}
    for name, mark in marks.items():
        assert mark["enable"]
        assert {*mark["filter"]["ids"]} <= ids, name
        series = {
            'up{job="model-api"}': "1x240",
            f'ALERTS{{alertname="{name}", alertstate="firing", version="v1"}}': "1x240",
            f'ALERTS{{alertname="{name}", alertstate="pending"}}': "1x240",
        }
        judge(
            tmp_path,
            series,
            [
                {
                    "expr": f"count({other['target']['expr']})",
                    "exp_samples": [{"labels": "{}", "value": 1}] if other is mark else [],
                }
                for other in marks.values()
            ],
        )


@pytest.mark.parametrize("page", [README, AT_WORK], ids=["README.md", ".work/README.md"])
def test_each_query_of_a_page_finds_data(page: str, tmp_path: Path) -> None:
    blocks = re.findall(r"^ *```promql\n(.+?)```", page, re.MULTILINE | re.DOTALL)
    assert blocks
    judge(
        tmp_path,
        reported_series(),
        [
            {
                "expr": f"group({block.replace('rate30s', f'rate{WINDOW}')})",
                "exp_samples": [{"labels": "{}", "value": 1}],
            }
            for block in blocks
        ],
    )
