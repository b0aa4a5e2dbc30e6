"""One service under load, with its receivers and its oracle: what every crash test begins and ends with.

Five endpoints, single and batch, lanes of 10: one endpoint in five fails every request while `down`, two more refuse a
fifth of theirs. The publisher keeps one session over every fault.
"""

from __future__ import annotations

import asyncio
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.duration_pb2 import Duration
from tests.support.ledger import (
    Fault,
    Findings,
    LedgerReceiver,
    Load,
    Matches,
    Sent,
    Wanted,
    answered,
    judge,
    missing,
)
from tests.support.service import SERVER, Service, Template, service, until

from outrider import Publisher
from outrider.client import Client, connect
from outrider.v1 import (
    endpoint_pb2,
    endpoint_service_pb2,
    subscription_pb2,
    subscription_service_pb2,
    tenant_pb2,
    tenant_service_pb2,
)

TENANT = "acme"
READY_SECONDS = 5.0
RESUME_SECONDS = 10.0
REST_SECONDS = 40.0
DRAIN_SECONDS = 10

FAILING = 0.2
KNOBS: dict[str, object] = {
    "lane_deliveries_max": 10,
    "lease_seconds": 4,
    "lease_renew_seconds": 0.5,
    "lease_margin_seconds": 1,
    "drain_seconds": DRAIN_SECONDS,
    # Kills come quicker here than crashes do elsewhere, and are nobody's poison.
    "crash_seconds": 0,
}


@dataclass(frozen=True)
class Plan:
    """An endpoint of the scenario with its subscriptions: (name, types, filter, the filter again in Python)."""

    path: str
    batch: bool
    fraction: float
    subscriptions: tuple[tuple[str, tuple[str, ...], str, Matches], ...]


def _is_order(type_: str) -> bool:
    return type_.startswith("sales_order.")


PLANS = (
    Plan(
        "/single",
        batch=False,
        fraction=0.0,
        subscriptions=(
            ("large-orders", ("sales_order.*",), "total > 60",
             lambda type_, data: _is_order(type_) and data["total"] > 60),
        ),
    ),
    Plan(
        "/single-flaky",
        batch=False,
        fraction=FAILING,
        subscriptions=(
            ("european-invoices", ("invoice.posted",), 'region == "eu"',
             lambda type_, data: type_ == "invoice.posted" and data["region"] == "eu"),
        ),
    ),
    Plan(
        "/batch",
        batch=True,
        fraction=0.0,
        subscriptions=(
            ("everything", ("sales_order.*", "invoice.*"), "", lambda _type, _data: True),
        ),
    ),
    Plan(
        "/batch-flaky",
        batch=True,
        fraction=FAILING,
        subscriptions=(
            ("not-american", ("sales_order.*",), 'region != "us"',
             lambda type_, data: _is_order(type_) and data["region"] != "us"),
            ("small", ("sales_order.created",), "total < 30",
             lambda type_, data: type_ == "sales_order.created" and data["total"] < 30),
        ),
    ),
    Plan(
        "/down",
        batch=True,
        fraction=1.0,
        subscriptions=(
            ("asian", ("*",), 'region == "apac"', lambda _type, data: data["region"] == "apac"),
        ),
    ),
)  # fmt: skip


@dataclass
class Scenario:
    """What a crash test works with."""

    service: Service
    client: Client
    publisher: Publisher
    receiver: LedgerReceiver
    subscriptions: dict[str, Wanted]
    load: Load
    loading: asyncio.Task[None]
    faults: list[Fault] = field(default_factory=list)

    @property
    def sent(self) -> dict[int, Sent]:
        return self.load.sent

    async def under_load(self, events: int, seconds: float = 20) -> None:
        """Wait until so many more events were acknowledged, and each endpoint got something meanwhile."""
        acked = self.publisher.stats.events_acked + events
        seen = {path: self.receiver.count(path) for path in self.receiver.targets}
        await until(
            lambda: (
                self._loads()
                and self.publisher.stats.events_acked >= acked
                and all(self.receiver.count(path) > before for path, before in seen.items())
            ),
            seconds,
            f"{events} more events: {self.publisher.stats}\n{self.service.tail()}",
        )

    def _loads(self) -> bool:
        if self.loading.done():
            self.loading.result()
        return True

    @contextmanager
    def fault(self, what: str) -> Any:
        """What happens inside is a fault; it is over when the block ends."""
        fault = Fault(what, time.monotonic())
        self.faults.append(fault)
        yield fault
        fault.ended = time.monotonic()

    async def kill_and_restart(self, program: Sequence[str] = SERVER) -> float:
        """kill -9 of the server, started again at once; returns how long it took to be ready."""
        with self.fault("kill -9 of the server"):
            self.service.kill()
            self.service.start(program)
            return await self.service.ready(READY_SECONDS)

    async def comes_back(self, tenures: int) -> None:
        """Wait until the server, which lost its database, has begun a tenure more than `tenures` and is ready."""
        await until(
            lambda: len(self.service.lines("tenure.began")) > tenures,
            RESUME_SECONDS,
            f"a new tenure\n{self.service.tail()}",
        )
        await self.service.ready(RESUME_SECONDS)

    def tenures(self) -> int:
        return len(self.service.lines("tenure.began"))

    def heal(self) -> None:
        """The endpoint that is down comes back."""
        self.receiver.targets["/down"].fraction = 0.0

    async def rest(self, seconds: float = REST_SECONDS, *, without: Sequence[str] = ()) -> None:
        """End the load and wait until all of it is acknowledged, and delivered but for some subscriptions."""
        self.load.stop()
        await self.loading
        self.heal()
        await answered(self.sent, self.publisher, RESUME_SECONDS)
        deadline = time.monotonic() + seconds
        left = missing(
            self.receiver,
            self.sent,
            [wanted for name, wanted in self.subscriptions.items() if name not in without],
        )
        while left and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
            left -= self.receiver.delivered

    def judge(self, *, without: Sequence[str] = ()) -> Findings:
        """The oracle's word. `without`: subscriptions whose deliveries need not come."""
        found = judge(self.receiver, self.sent, self.subscriptions.values(), self.faults)
        if without:
            found.lost = [
                line for line in found.lost if not any(f"to {name} " in line for name in without)
            ]
        return found

    async def balanced(self, seconds: float = REST_SECONDS) -> list[int]:
        """Wait for the ledger, stop the server cleanly, and return what its own `balance` then prints of the tenant."""
        await self.service.settled(TENANT, seconds)
        assert await self.service.terminate(DRAIN_SECONDS + 5) == 0, self.service.tail()
        return self.service.balance_printed()[TENANT]

    async def end_well(self) -> Findings:
        """Come to rest; nothing may be lost, invented or doubled, and the books must balance with nothing owed."""
        await self.rest()
        found = self.judge()
        wrong = found.wrong()
        assert not wrong, f"{wrong}\n{found}\n{self.service.tail()}"
        matched, delivered, dead, cancelled, owed, window = await self.balanced()
        assert (dead, cancelled, owed, window) == (0, 0, 0, 0)
        assert matched == delivered == found.expected
        return found


@asynccontextmanager
async def scenario(
    fresh: Template,
    *,
    rate: float,
    seed: int,
    program: Sequence[str] = SERVER,
    knobs: dict[str, object] | None = None,
) -> AsyncIterator[Scenario]:
    """A ready service with everything configured, under load inside the block."""
    key = fresh.key
    with service(fresh, **{**KNOBS, **(knobs or {})}) as running:
        running.start(program)
        await running.ready(READY_SECONDS)
        async with (
            LedgerReceiver(seed=seed) as receiver,
            connect(running.listen_address, key) as client,
        ):
            subscriptions = await _configure(running, client, receiver, seed)
            publisher = Publisher(
                running.listen_address, key, "crash", tenant=TENANT, backoff_ms_max=500
            )
            load = Load(publisher, rate=rate, seed=seed)
            loading = asyncio.get_running_loop().create_task(load.run())
            try:
                yield Scenario(running, client, publisher, receiver, subscriptions, load, loading)
            finally:
                load.stop()
                loading.cancel()
                await asyncio.gather(loading, return_exceptions=True)
                if not running.running:
                    # Nobody will answer what is still under way, which only a failed test leaves.
                    await asyncio.gather(publisher.close(0.1), return_exceptions=True)
                else:
                    await asyncio.gather(publisher.close(2.0), return_exceptions=True)


async def _configure(
    running: Service, client: Client, receiver: LedgerReceiver, seed: int
) -> dict[str, Wanted]:
    await client.tenants.CreateTenant(
        tenant_service_pb2.CreateTenantRequest(tenant_id=TENANT, tenant=tenant_pb2.Tenant())
    )
    for number, plan in enumerate(PLANS):
        secret = bytes([number + 1]) * 32
        receiver.add(plan.path, secret, fraction=plan.fraction)
        endpoint = await client.endpoints.CreateEndpoint(
            endpoint_service_pb2.CreateEndpointRequest(
                parent=f"tenants/{TENANT}",
                endpoint_id=plan.path.strip("/"),
                endpoint=endpoint_pb2.Endpoint(
                    url=receiver.url(plan.path),
                    mode=endpoint_pb2.Endpoint.MODE_BATCH
                    if plan.batch
                    else endpoint_pb2.Endpoint.MODE_SINGLE,
                    secret="whsec_" + b64encode(secret).decode(),
                    retry=endpoint_pb2.RetryPolicy(
                        base=_duration(0.1), factor=2, maximum=_duration(1.0), attempts_max=1000
                    ),
                ),
            )
        )
        for name, types, filter_, _ in plan.subscriptions:
            await client.subscriptions.CreateSubscription(
                subscription_service_pb2.CreateSubscriptionRequest(
                    parent=f"tenants/{TENANT}",
                    subscription_id=name,
                    subscription=subscription_pb2.Subscription(
                        endpoint=endpoint.name, types=types, filter=filter_
                    ),
                )
            )
    connection = await running.connect()
    try:
        rows = await connection.fetch("SELECT name, id FROM subscription")
    finally:
        await connection.close()
    ids = {row["name"]: row["id"] for row in rows}
    return {
        name: Wanted(name, ids[name], plan.path, matches)
        for plan in PLANS
        for name, _, _, matches in plan.subscriptions
    }


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration
