"""Play the customers of the service."""

import asyncio
import contextlib
import os
import random
import socket
import sys
import time

import httpx
from pydantic import BaseModel, Field, ValidationError


class Settings(BaseModel):
    """Read from environment variables of the same names."""

    TRAFFIC_RATE: float = Field(default=30, ge=1, le=200)  # Transactions per second.
    TRAFFIC_AMOUNT: float = Field(default=50, ge=1, le=1_000_000)  # Median, in US dollars.


try:
    settings = Settings.model_validate(dict(os.environ))
except ValidationError as error:
    mistakes = [f"{e['loc'][0]}={e['input']!r}: {e['msg']}" for e in error.errors()]
    sys.exit("\n".join(mistakes))  # Prints them, a line each, and ends with status 1.

TIMEOUT_SECONDS = 5


def make_transaction() -> dict[str, float | bool]:
    """Return a transaction. One in ten is international, two in a hundred are invalid."""
    if random.random() < 0.02:
        return {"amount": -1}
    amount = settings.TRAFFIC_AMOUNT * random.lognormvariate(mu=0, sigma=1.2)
    return {
        "amount": min(round(amount, 2), 1_000_000),
        "international": random.random() < 0.1,
    }


async def send(client: httpx.AsyncClient) -> None:
    """Send a transaction to a random replica, and ignore the answer."""
    # The service may be away, or hang. A TimeoutError is an OSError, too.
    with contextlib.suppress(OSError, httpx.HTTPError):
        async with asyncio.timeout(TIMEOUT_SECONDS):
            # Replicas come and go, so each request asks for their addresses. As that blocks, a
            # thread does it.
            _, _, replicas = await asyncio.to_thread(socket.gethostbyname_ex, "model-api")
            url = f"http://{random.choice(replicas)}:8000/predict"
            await client.post(url, json=make_transaction())


async def main() -> None:
    """Send TRAFFIC_RATE transactions a second, without waiting for the answers."""
    # Each request has a connection of its own, so that a slow model does not slow the customers.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with (
        # trust_env=False: ask no proxy, which Docker may have put into the environment.
        httpx.AsyncClient(limits=limits, trust_env=False) as client,
        asyncio.TaskGroup() as tasks,
    ):
        next_at = time.monotonic()
        while True:
            tasks.create_task(send(client))
            # Customers do not know of each other, so the gaps between them are exponential.
            next_at += random.expovariate(settings.TRAFFIC_RATE)
            await asyncio.sleep(next_at - time.monotonic())


if __name__ == "__main__":
    asyncio.run(main())
