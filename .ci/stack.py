"""Questions to the running stack, for smoke and walk."""

import json
import subprocess
import time
from collections.abc import Callable
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, build_opener, install_opener, urlopen

install_opener(build_opener(ProxyHandler({})))  # Ask this machine without a proxy.


def docker(*arguments: str) -> str:
    """Return what Docker prints."""
    run = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"docker {' '.join(arguments)}\n{run.stdout}{run.stderr}"
    return run.stdout.strip()


SERVICES = json.loads(docker("compose", "config", "--format", "json"))["services"]
# The one that is built here and starts without a profile.
(MODEL_API,) = (
    name for name, service in SERVICES.items() if "build" in service and "profiles" not in service
)


def url_of(service: str) -> str:
    """Return where this machine reaches a service."""
    port = SERVICES[service]["ports"][0]["target"]
    return "http://" + docker("compose", "port", service, str(port))


def setting(service: str, name: str, default: float) -> float:
    """Return a setting of a container, as `echo ${FAILURE_RATE:-0.1}` prints it there."""
    script = f"echo ${{{name}:-{default}}}"
    return float(docker("compose", "exec", "-T", service, "sh", "-c", script))


def ask(url: str) -> Any:
    """Return the JSON behind a URL."""
    try:
        with urlopen(url, timeout=10) as answer:
            return json.load(answer)
    except HTTPError as error:
        raise AssertionError(f"{url}\n{error}: {error.read().decode()}") from error


def query(expression: str, api: str = "") -> list[Any]:
    """Return the series that Prometheus finds, without those that are NaN."""
    api = api or url_of("prometheus")
    answer = ask(f"{api}/api/v1/query?" + urlencode({"query": expression}))
    return [series for series in answer["data"]["result"] if series["value"][1] != "NaN"]


def value_of(expression: str) -> float:
    """Return the sum of what a query finds, which is 0 if it finds nothing."""
    return sum(float(series["value"][1]) for series in query(expression))


def targets() -> list[Any]:
    """Return what Prometheus reads."""
    return list(ask(url_of("prometheus") + "/api/v1/targets")["data"]["activeTargets"])


# What a check raises if something is not as expected.
WRONG = (AssertionError, LookupError, OSError, ValueError)


def try_until(check: Callable[[], object], deadline: float) -> None:
    """Try a check again until it is right, or raise what is wrong at the deadline."""
    while True:
        try:
            check()
        except WRONG:
            if time.monotonic() > deadline:
                raise
            time.sleep(2)
        else:
            return


def run(checks: dict[Callable[[], None], str], seconds: float) -> int:
    """Run checks, for at most so long together, and print each result. Return how many failed."""
    deadline = time.monotonic() + seconds
    wrong = 0
    for check, where in checks.items():
        try:
            try_until(check, deadline)
        except WRONG as error:
            print(f"WRONG  {check.__doc__}\n       {error}\n       See {where}", flush=True)
            wrong += 1
        else:
            print(f"ok     {check.__doc__}", flush=True)
    return wrong
