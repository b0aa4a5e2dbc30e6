"""What every fault happens to: several tenants spread over the nodes, producers, receivers and their oracle.

Six tenants, one of them split over four shards. Each has five endpoints with lanes of 10: one that gets a request at a
time, for the order by key; one for single deliveries; one for batches; one that refuses a fifth; and one that refuses
everything while it is `down`: one in five of all. Three producers send keyed events: one follows homes, one never does
and mixes tenants in its frames, one writes to the split tenant alone. They keep their sessions over every fault.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from base64 import b64encode
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import asyncpg
from google.protobuf.duration_pb2 import Duration
from tests.support.ledger import (
    Fault,
    Findings,
    LedgerReceiver,
    Load,
    Sent,
    Wanted,
    answered,
    judge,
    missing,
    out_of_order,
)
from tests.support.processes import is_gone
from tests.support.service import Service, Template, service, until
from typing_extensions import override

from outrider import Publisher
from outrider.client import Client, connect
from outrider.errors import OutriderError, Unavailable
from outrider.v1 import (
    endpoint_pb2,
    endpoint_service_pb2,
    subscription_pb2,
    subscription_service_pb2,
    tenant_pb2,
    tenant_service_pb2,
)
from outrider.v1.event_pb2 import Event
from outrider_server.storage.ledger import Balance, balance

TENANTS = ("t1", "t2", "t3", "t4", "t5", "wide")
SPLIT = "wide"
SPLIT_SHARDS = 4
KEYS_OF_EACH = 4
RATE = 240.0
"""Events a second of all producers together: enough to be always in the middle of something, on two shared cores."""

KILL_SECONDS = 0.5
"""What a process that is killed sent before may be read by a busy receiver so much later."""

START_SECONDS = 60.0
WHOLE_SECONDS = 30.0
REST_SECONDS = 60.0
DRAIN_SECONDS = 10
CONFIGURE_SECONDS = 30.0

USUAL = ('"attempt failed"', '"batch"')
LINES_MAX = 3000

KNOBS: Mapping[str, object] = {
    "lane_deliveries_max": 10,
    "lease_seconds": 4,
    "lease_renew_seconds": 0.5,
    "lease_margin_seconds": 1,
    "drain_seconds": DRAIN_SECONDS,
    # Kills come quicker here than crashes do elsewhere, and are nobody's poison.
    "crash_seconds": 0,
    "log_lines_per_second_max": 5,
}


# The load


class KeyedLoad(Load):
    """Events of several tenants, each under one of a few keys of this producer's own. `marker` goes into every one."""

    def __init__(
        self, publisher: Publisher, producer: str, tenants: Sequence[str], **how: Any
    ) -> None:
        super().__init__(publisher, **how)
        self.producer = producer
        self.tenants = tenants
        self.marker: dict[str, str] = {}

    @override
    def _make(self, number: int, dice: random.Random) -> tuple[Event, dict[str, Any]]:
        event, data = super()._make(number, dice)
        event.tenant = dice.choice(self.tenants)
        event.key = f"{self.producer}.{dice.randrange(KEYS_OF_EACH)}"
        data.update(tenant=event.tenant, key=event.key)
        if marker := self.marker.pop(event.tenant, ""):
            data["marker"] = marker
        event.data = json.dumps(data).encode()
        return event, data


@dataclass(frozen=True)
class Plan:
    """An endpoint that each tenant has, and what it wants: in CEL, and again in Python."""

    name: str
    batch: bool
    fraction: float
    concurrency: int
    filter: str
    matches: Callable[[dict[str, Any]], bool]


PLANS = (
    Plan("ordered", batch=True, fraction=0.1, concurrency=1, filter="", matches=lambda _: True),
    Plan(
        "single",
        batch=False,
        fraction=0.0,
        concurrency=0,
        filter="total > 70",
        matches=lambda data: data["total"] > 70,
    ),
    Plan(
        "batch",
        batch=True,
        fraction=0.0,
        concurrency=0,
        filter='region != "us"',
        matches=lambda data: data["region"] != "us",
    ),
    Plan(
        "flaky",
        batch=True,
        fraction=0.2,
        concurrency=0,
        filter='region == "eu"',
        matches=lambda data: data["region"] == "eu",
    ),
    Plan(
        "down",
        batch=True,
        fraction=1.0,
        concurrency=0,
        filter='region == "apac"',
        matches=lambda data: data["region"] == "apac",
    ),
)


# Who holds what


@dataclass(frozen=True)
class Holding:
    """A shard's owner at a moment."""

    node: str | None
    epoch: int
    live: bool
    held_back: bool


Connect = Callable[[], Awaitable["asyncpg.Connection[asyncpg.Record]"]]


async def read_holdings(connect_: Connect) -> dict[int, Holding]:
    connection = await connect_()
    try:
        rows = await connection.fetch(
            "SELECT shard.shard, shard.node, shard.epoch, shard.held_back,"
            " coalesce(node.expires_at >= now(), false) AS live"
            " FROM shard LEFT JOIN node ON node.name = shard.node"
        )
    finally:
        await connection.close()
    return {
        row["shard"]: Holding(row["node"], row["epoch"], row["live"], row["held_back"])
        for row in rows
    }


def workers_alive(running: Service) -> dict[str, int]:
    """The process of each worker of a supervisor that lives now."""
    alive: dict[str, int] = {}
    for line in running.lines('"worker.started"'):
        said = json.loads(line)
        if is_gone(said["pid"]):
            alive.pop(said["node"], None)
        else:
            alive[said["node"]] = said["pid"]
    return alive


@dataclass
class Scene:
    """What a fault works with. `services`: the hosts; `nodes`: the names of all nodes that should live."""

    services: list[Service]
    nodes: list[str]
    connect: Connect
    receiver: LedgerReceiver
    subscriptions: dict[str, Wanted]
    publishers: list[Publisher]
    loads: list[KeyedLoad]
    loading: list[asyncio.Task[None]]
    homes: dict[str, tuple[int, ...]]
    faults: list[Fault] = field(default_factory=list)
    unordered: set[str] = field(default_factory=set)
    """Tenants whose order by key is not asked about."""

    @property
    def service(self) -> Service:
        return self.services[0]

    @property
    def sent(self) -> dict[int, Sent]:
        return {number: sent for load in self.loads for number, sent in load.sent.items()}

    @property
    def acked(self) -> int:
        return sum(publisher.stats.events_acked for publisher in self.publishers)

    def tail(self) -> str:
        """What the services said that is not said all the time."""
        said = []
        for running in self.services:
            for log in (running.log, running.state / "postgres.log"):
                if log.exists():
                    lines = log.read_text(errors="replace").splitlines()
                    lines = [line for line in lines if not any(word in line for word in USUAL)]
                    said += [f"--- {running.folder.name} {log.name}", *lines[-LINES_MAX:]]
        return "\n".join(said)

    def check_load(self) -> None:
        """Raise what a producer failed with, if one did."""
        for task in self.loading:
            if task.done():
                task.result()

    async def under_load(self, events: int, seconds: float = 30.0) -> None:
        """Wait until each producer got so many more events acknowledged, and receivers got something meanwhile."""
        acked = [publisher.stats.events_acked + events for publisher in self.publishers]
        requests = len(self.receiver.requests)

        def enough() -> bool:
            self.check_load()
            return len(self.receiver.requests) > requests and all(
                publisher.stats.events_acked >= least
                for publisher, least in zip(self.publishers, acked, strict=True)
            )

        deadline = time.monotonic() + seconds
        while not enough():
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"not within {seconds:g} s: {events} more events of each producer\n"
                    f"{await self.state()}"
                )
            await asyncio.sleep(0.02)

    async def state(self) -> str:
        """How things stand, for who must find out why."""
        stats = "\n".join(
            f"{load.producer}: {publisher.stats}"
            for load, publisher in zip(self.loads, self.publishers, strict=True)
        )
        return f"{stats}\n{self._fault_words()}\n{await self._words()}\n{self.tail()}"

    async def _words(self) -> str:
        try:
            counts = Counter((h.node, h.live) for h in (await self.holdings()).values())
        except (OSError, asyncpg.PostgresError) as error:
            return f"no database: {error}"
        return f"shards: {dict(counts)}"

    async def holdings(self) -> dict[int, Holding]:
        return await read_holdings(self.connect)

    async def held_by(self, node: str) -> frozenset[int]:
        return frozenset(shard for shard, h in (await self.holdings()).items() if h.node == node)

    async def whole(
        self, seconds: float = WHOLE_SECONDS, *, nodes: Sequence[str] | None = None
    ) -> float:
        """Wait until every shard is held by a live node, and each of `nodes` (default: all) holds some."""
        nodes = self.nodes if nodes is None else nodes
        began = time.monotonic()
        words = ""
        while True:
            try:
                held = await self.holdings()
            except (OSError, asyncpg.PostgresError) as error:
                words = str(error)
            else:
                if all(h.live for h in held.values()) and set(nodes) <= {
                    h.node for h in held.values()
                }:
                    return time.monotonic() - began
                words = str(Counter((h.node, h.live) for h in held.values()))
            assert time.monotonic() - began < seconds, (
                f"not whole within {seconds:g} s: {words}\n{self.tail()}"
            )
            await asyncio.sleep(0.05)

    async def even(self, seconds: float = WHOLE_SECONDS) -> None:
        """Wait until no node holds more than twice its share: starts and restarts have come to rest."""
        share = 64 / len(self.nodes)
        deadline = time.monotonic() + seconds
        while True:
            counts = Counter(h.node for h in (await self.holdings()).values())
            if set(counts) == set(self.nodes) and max(counts.values()) <= 1.5 * share:
                return
            assert time.monotonic() < deadline, f"not even within {seconds:g} s: {counts}"
            await asyncio.sleep(0.1)

    @contextmanager
    def fault(self, what: str, shards: frozenset[int] | None = None) -> Iterator[Fault]:
        """What happens inside is a fault; it is over when the block ends, or earlier by its own `ended`."""
        fault = Fault(what, time.monotonic(), shards=shards)
        self.faults.append(fault)
        yield fault
        fault.ended = min(fault.ended, time.monotonic())

    async def kill_node(self, node: str, pid: int) -> Fault:
        """kill -9 of one node's process. Only what lived in its shards may come twice."""
        before = await self.held_by(node)
        with self.fault(f"kill -9 of {node}", before) as fault:
            os.kill(pid, signal.SIGKILL)
            fault.ended = fault.began + KILL_SECONDS
            try:
                # What it was given since the first look counts as well, and stands under its name until it is taken.
                fault.shards = before | await self.held_by(node)
            except (OSError, asyncpg.PostgresError):
                fault.shards = None
        return fault

    # The end

    async def stop_load(self) -> None:
        for load in self.loads:
            load.stop()
        await asyncio.gather(*self.loading)

    def heal(self) -> None:
        for target in self.receiver.targets.values():
            target.fraction = 0.0

    async def rest(
        self, seconds: float = REST_SECONDS, *, without: frozenset[str] = frozenset()
    ) -> None:
        """End the load; wait until all is acknowledged, and delivered but to the tenants `without`."""
        await self.stop_load()
        self.heal()
        for load, publisher in zip(self.loads, self.publishers, strict=True):
            try:
                await answered(load.sent, publisher, WHOLE_SECONDS)
            except TimeoutError:
                raise AssertionError(
                    f"{load.producer} got no answers within {WHOLE_SECONDS:g} s: {publisher.stats}\n"
                    f"{await self._words()}\n{self.tail()}"
                ) from None
            except OutriderError as error:
                refused = [
                    f"event {number} of {sent.data['tenant']}: {sent.handle.exception()!r}"
                    for number, sent in load.sent.items()
                    if sent.handle.done() and sent.handle.exception() is not None
                ]
                raise AssertionError(
                    f"{load.producer}: {error}\n{refused[:5]}\n{self._fault_words()}\n{self.tail()}"
                ) from error
        wanted = [w for name, w in self.subscriptions.items() if name.split("/")[0] not in without]
        left = missing(self.receiver, self.sent, wanted)
        deadline = time.monotonic() + seconds
        while left and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
            left -= self.receiver.delivered

    def judge(self) -> Findings:
        found = judge(self.receiver, self.sent, self.subscriptions.values(), self.faults)
        for name, wanted in self.subscriptions.items():
            tenant, plan = name.split("/")
            if plan == "ordered" and tenant not in self.unordered:
                found.disordered += out_of_order(self.receiver, self.sent, wanted, _key)
        return found

    async def balances(self) -> list[Balance]:
        connection = await self.connect()
        try:
            return await balance(connection)
        finally:
            await connection.close()

    async def settled(self, seconds: float = REST_SECONDS) -> None:
        """Wait until nothing is open or owed, and everything is accounted for."""
        deadline = time.monotonic() + seconds
        while True:
            rows = await self.balances()
            if all(not row.owed and not row.window and row.holds() for row in rows):
                return
            assert time.monotonic() < deadline, (
                f"not settled within {seconds:g} s: {[row for row in rows if row.owed or row.window]}\n{self.tail()}"
            )
            await asyncio.sleep(0.1)

    async def end_well(self) -> Findings:
        """Come to rest: nothing lost, invented, doubled or out of order, and the books balance with nothing owed."""
        await self.rest()
        found = self.judge()
        wrong = found.wrong()
        assert not wrong, (
            f"{wrong}\n{found}\n{self._fault_words()}\n{await self._words()}\n{self.tail()}"
        )
        await self.settled()
        for running in self.services:
            assert await running.terminate(DRAIN_SECONDS + 20) == 0, running.tail()
        table = await asyncio.to_thread(self.service.balance_printed)
        matched, delivered, dead, cancelled, owed, window = (
            sum(row[column] for row in table.values()) for column in range(6)
        )
        assert (dead, cancelled, owed, window) == (0, 0, 0, 0), table
        assert matched == delivered == found.expected, (table, str(found))
        return found

    def _fault_words(self) -> str:
        return "\n".join(
            f"{f.began:.3f}-{f.ended:.3f} {f.what} shards {'all' if f.shards is None else sorted(f.shards)}"
            for f in self.faults[-20:]
        )

    def figures(self, found: Findings) -> dict[str, object]:
        """What a run is remembered by."""
        return {
            "acknowledged": found.acknowledged,
            "deliveries": found.deliveries,
            "lost": len(found.lost),
            "duplicates": found.duplicates,
            "bound": found.bound,
            "out of order": len(found.disordered),
        }


def _key(sent: Sent) -> str:
    return f"{sent.data['tenant']}/{sent.data['key']}"


# Beginning


@asynccontextmanager
async def workers_scene(
    fresh: Template,
    *,
    seed: int,
    workers: int = 2,
    rate: float = RATE,
    variables: Mapping[str, str] | None = None,
    knobs: Mapping[str, object] | None = None,
) -> AsyncIterator[Scene]:
    """One host with so many workers, under load inside the block."""
    given = {**KNOBS, "node_name": "host", "workers": workers, **(knobs or {})}
    with service(fresh, variables=variables, **given) as running:
        running.start()
        await running.ready(START_SECONDS)
        nodes = [f"host.{n}" for n in range(1, workers + 1)] if workers > 1 else ["host"]
        async with scene(
            fresh,
            [running],
            nodes,
            running.connect,
            target=running.listen_address,
            manage=running.listen_address,
            seed=seed,
            rate=rate,
        ) as made:
            yield made


@asynccontextmanager
async def scene(
    fresh: Template,
    services: list[Service],
    nodes: list[str],
    connect_: Connect,
    *,
    target: str,
    manage: str,
    seed: int,
    rate: float,
    here: str = "127.0.0.1",
) -> AsyncIterator[Scene]:
    """Configure services that are ready, and load them until the block ends."""
    async with (
        LedgerReceiver(seed=seed, host=here) as receiver,
        connect(manage, fresh.key) as client,
    ):
        made = Scene(services, nodes, connect_, receiver, {}, [], [], [], {})
        await made.whole(START_SECONDS)
        await made.even()
        await configure(made, client)
        for number, (producer, tenants, follow) in enumerate(
            (("follower", TENANTS, True), ("mixer", TENANTS, False), ("wide", (SPLIT,), True))
        ):
            publisher = Publisher(
                target,
                fresh.key,
                producer,
                # Company for events, so that frames mix tenants.
                linger_ms=2.0 if follow else 40.0,
                follow_homes=follow,
                backoff_ms_max=500,
            )
            made.publishers.append(publisher)
            made.loads.append(
                KeyedLoad(
                    publisher,
                    producer,
                    tenants,
                    rate=rate / 3,
                    seed=seed * 3 + number,
                    first=number,
                    stride=3,
                )
            )
        loop = asyncio.get_running_loop()
        made.loading = [loop.create_task(load.run()) for load in made.loads]
        try:
            yield made
        finally:
            for load in made.loads:
                load.stop()
            for task in made.loading:
                task.cancel()
            await asyncio.gather(*made.loading, return_exceptions=True)
            # Nobody answers what is still under way once the services have ended, which only a failed run leaves.
            seconds = 2.0 if all(running.running for running in services) else 0.1
            await asyncio.gather(
                *(publisher.close(seconds) for publisher in made.publishers), return_exceptions=True
            )


SPLIT_CHANGE_SECONDS = 1.5


async def configure(made: Scene, client: Client) -> None:
    """The tenants with their endpoints and subscriptions; fills in what the oracle needs to know."""
    retry = endpoint_pb2.RetryPolicy(
        base=_duration(0.1), factor=2, maximum=_duration(1.0), attempts_max=1000
    )
    secrets = random.Random(7)
    for tenant in TENANTS:  # each is made at the node that has the fewest
        shards = SPLIT_SHARDS if tenant == SPLIT else 1
        await _call(
            client.tenants.CreateTenant,
            tenant_service_pb2.CreateTenantRequest(
                tenant_id=tenant, tenant=tenant_pb2.Tenant(shards=shards)
            ),
        )
        for plan in PLANS:
            path = f"/{tenant}/{plan.name}"
            secret = secrets.randbytes(32)
            made.receiver.add(path, secret, fraction=plan.fraction, delay_seconds_max=0.01)
            endpoint = endpoint_pb2.Endpoint(
                url=made.receiver.url(path),
                mode=endpoint_pb2.Endpoint.MODE_BATCH
                if plan.batch
                else endpoint_pb2.Endpoint.MODE_SINGLE,
                secret="whsec_" + b64encode(secret).decode(),
                concurrency=plan.concurrency or (0 if shards == 1 else SPLIT_SHARDS),
                retry=retry,
            )
            stored = await _call(
                client.endpoints.CreateEndpoint,
                endpoint_service_pb2.CreateEndpointRequest(
                    parent=f"tenants/{tenant}", endpoint_id=plan.name, endpoint=endpoint
                ),
            )
            await _call(
                client.subscriptions.CreateSubscription,
                subscription_service_pb2.CreateSubscriptionRequest(
                    parent=f"tenants/{tenant}",
                    subscription_id=plan.name,
                    subscription=subscription_pb2.Subscription(
                        endpoint=stored.name, types=["*"], filter=plan.filter
                    ),
                ),
            )
    # The other owners of a split tenant's shards learn of a change within half a second of its answer.
    await asyncio.sleep(SPLIT_CHANGE_SECONDS)
    connection = await made.connect()
    try:
        rows = await connection.fetch(
            "SELECT tenant.name AS tenant, subscription.name, subscription.id"
            " FROM subscription JOIN tenant ON tenant.id = subscription.tenant"
        )
        spread = await connection.fetch("SELECT name, shards FROM tenant")
    finally:
        await connection.close()
    ids = {(row["tenant"], row["name"]): row["id"] for row in rows}
    made.homes = {row["name"]: tuple(row["shards"]) for row in spread if row["name"] in TENANTS}
    for tenant in TENANTS:
        for plan in PLANS:
            made.subscriptions[f"{tenant}/{plan.name}"] = Wanted(
                f"{tenant}/{plan.name}",
                ids[tenant, plan.name],
                f"/{tenant}/{plan.name}",
                _matcher(tenant, plan),
            )


def _matcher(tenant: str, plan: Plan) -> Callable[[str, dict[str, Any]], bool]:
    return lambda _type, data: data["tenant"] == tenant and plan.matches(data)


async def _call(method: Any, request: Any) -> Any:
    """One management call, again while a node or a home is not ready for it yet."""
    deadline = time.monotonic() + CONFIGURE_SECONDS
    while True:
        try:
            return await method(request)
        except Unavailable:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.2)


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration


async def gone(pids: Sequence[int], seconds: float) -> None:
    """Wait for the end of processes."""
    await until(lambda: all(is_gone(pid) for pid in pids), seconds, f"the end of all of {pids}")
