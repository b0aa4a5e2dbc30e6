"""An endpoint's limits are exact with two workers, wherever events come in, also when the worker that keeps them is killed.

Producers come in by the public port on connections of their own, so that some reach each worker, and never follow a
tenant to its home: half of all frames are forwarded.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import pytest
from google.protobuf.duration_pb2 import Duration
from tests.faults.scene import KNOBS, read_holdings, workers_alive
from tests.support.ledger import LedgerReceiver, Request
from tests.support.service import Service, Template, service, until

from outrider import Publisher
from outrider.client import connect
from outrider.v1 import (
    endpoint_pb2,
    endpoint_service_pb2,
    subscription_pb2,
    subscription_service_pb2,
    tenant_pb2,
    tenant_service_pb2,
)
from outrider.v1.event_pb2 import Event

pytestmark = [pytest.mark.e2e, pytest.mark.postgres, pytest.mark.timeout(120)]

PATH = "/limited"
PRODUCERS = 10
EVENTS = 60
"""Of each producer: more than the endpoint is given in the time of a test."""

PER_SECOND = 100 / 60
LATE_SECONDS = 0.15
"""So much later than it was sent a busy receiver may see a request."""


@dataclass
class Limited:
    """Two workers with one endpoint under a limit, and producers on connections to both."""

    service: Service
    receiver: LedgerReceiver
    home: str

    @property
    def requests(self) -> list[Request]:
        return self.receiver.requests

    def kill_home(self) -> None:
        """kill -9 of the worker that the endpoint's tenant lives at."""
        os.kill(workers_alive(self.service)[self.home], signal.SIGKILL)


@asynccontextmanager
async def limited(
    fresh: Template, endpoint: endpoint_pb2.Endpoint, delay_seconds_max: float
) -> AsyncIterator[Limited]:
    """Everything published and acknowledged; deliveries under way."""
    given = {**KNOBS, "workers": 2, "node_name": "host"}
    with service(fresh, variables=None, **given) as running:
        running.start()
        await running.ready(60)
        await until(
            lambda: len(running.lines('"worker.ready"')) == 2, 30, "both workers\n" + running.tail()
        )
        secret = b"limits" * 6
        async with (
            LedgerReceiver() as receiver,
            connect(running.listen_address, fresh.key) as client,
            AsyncExitStack() as producers,
        ):
            receiver.add(PATH, secret, delay_seconds_max=delay_seconds_max)
            endpoint.url = receiver.url(PATH)
            endpoint.secret = "whsec_" + b64encode(secret).decode()
            endpoint.mode = endpoint_pb2.Endpoint.MODE_SINGLE
            await client.tenants.CreateTenant(
                tenant_service_pb2.CreateTenantRequest(tenant_id="acme", tenant=tenant_pb2.Tenant())
            )
            stored = await client.endpoints.CreateEndpoint(
                endpoint_service_pb2.CreateEndpointRequest(
                    parent="tenants/acme", endpoint_id="limited", endpoint=endpoint
                )
            )
            await client.subscriptions.CreateSubscription(
                subscription_service_pb2.CreateSubscriptionRequest(
                    parent="tenants/acme",
                    subscription_id="all",
                    subscription=subscription_pb2.Subscription(endpoint=stored.name, types=["*"]),
                )
            )
            connection = await running.connect()
            try:
                shard = await connection.fetchval("SELECT shard FROM tenant WHERE name = 'acme'")
            finally:
                await connection.close()
            home = (await read_holdings(running.connect))[shard].node
            assert home is not None
            publishers = [
                await producers.enter_async_context(
                    Publisher(
                        running.listen_address,
                        fresh.key,
                        f"producer {number}",
                        tenant="acme",
                        follow_homes=False,
                    )
                )
                for number in range(PRODUCERS)
            ]
            await asyncio.gather(
                *(
                    _publish(publisher, number * EVENTS)
                    for number, publisher in enumerate(publishers)
                )
            )
            reached = {publisher._first.node for publisher in publishers}
            assert len(reached) == 2, f"all producers came in by {reached}"
            for publisher in publishers:
                await publisher.close()
            yield Limited(running, receiver, home)


async def _publish(publisher: Publisher, first: int) -> None:
    outcomes = await publisher.publish_many(
        Event(type="sales_order.created", data=json.dumps({"n": first + number}).encode())
        for number in range(EVENTS)
    )
    assert not [outcome for outcome in outcomes if isinstance(outcome, Exception)]


def too_many(arrivals: list[float]) -> list[str]:
    """Windows in which more requests began than the limit gives: its rate and one."""
    return [
        f"{last - first + 1} in {arrivals[last] - arrivals[first]:.2f} s from {arrivals[first]:.2f}"
        for first in range(len(arrivals))
        for last in range(first + 1, len(arrivals))
        if last - first > PER_SECOND * (arrivals[last] - arrivals[first] + LATE_SECONDS)
    ]


def at_once(requests: list[Request]) -> list[str]:
    """Requests that began while an earlier one was open."""
    found = []
    open_until = 0.0
    for request in requests:
        if request.arrived < open_until:
            found.append(
                f"{request.ids} at {request.arrived:.3f}, one was open to {open_until:.3f}"
            )
        open_until = max(open_until, request.ended or float("inf"))
    return found


async def test_a_rate_of_100_a_minute_is_exact_with_two_workers_and_over_a_kill(
    fresh_state: Template,
) -> None:
    endpoint = endpoint_pb2.Endpoint(
        concurrency=20,
        rate_limit=endpoint_pb2.RateLimit(requests=100, period=Duration(seconds=60), burst=1),
    )
    async with limited(fresh_state, endpoint, 0.02) as made:
        began = time.monotonic()
        await until(lambda: len(made.requests) >= 12, 20, "the first requests")
        steady = made.requests[-1].arrived - made.requests[0].arrived
        # Nothing else is slow here: what it may send it does send.
        assert 11 / PER_SECOND - 1 < steady < 11 / PER_SECOND + 2
        made.kill_home()
        killed = len(made.requests)
        await until(
            lambda: len(made.requests) > killed + 12 and time.monotonic() - began > 20,
            40,
            "requests after the kill\n" + made.service.tail(),
        )
        arrivals = [request.arrived for request in made.requests]
        assert too_many(arrivals) == []


async def test_a_concurrency_of_one_is_exact_with_two_workers_and_over_a_kill(
    fresh_state: Template,
) -> None:
    async with limited(fresh_state, endpoint_pb2.Endpoint(concurrency=1), 0.06) as made:
        for kill in (True, True, False):
            seen = len(made.requests)
            await until(
                lambda least=seen + 60: len(made.requests) >= least,  # type: ignore[misc]
                40,
                "more requests\n" + made.service.tail(),
            )
            if kill:
                starts = len(made.service.lines('"worker.started"'))
                # The kill falls into a request, which its receiver would have held for long.
                target = made.receiver.targets[PATH]
                usual, target.delay_seconds_max = target.delay_seconds_max, 10.0
                seen = len(made.requests)
                await until(
                    lambda least=seen: (  # type: ignore[misc]
                        len(made.requests) > least and made.requests[-1].ended is None
                    ),
                    5,
                    "an open request",
                )
                target.delay_seconds_max = usual
                made.kill_home()
                await until(
                    lambda most=starts: len(made.service.lines('"worker.started"')) > most,  # type: ignore[misc]
                    20,
                    "its restart",
                )
        assert at_once(made.requests) == []
        assert any(request.ended and not request.answered for request in made.requests), (
            "a kill cut a request"
        )


def test_what_these_tests_look_for_would_be_found() -> None:
    steady = [number / PER_SECOND for number in range(20)]
    assert too_many(steady) == []
    assert too_many([*steady, steady[-1] + 0.3])
    first = Request(PATH, 1.0, 200, signed=True, ids=["a"], numbers=[1], ended=2.0)
    second = Request(PATH, 1.9, 200, signed=True, ids=["b"], numbers=[2], ended=3.0)
    assert at_once([first, second])
    second.arrived = 2.0
    assert at_once([first, second]) == []
