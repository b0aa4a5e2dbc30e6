"""One world from one seed: nodes, a database, producers, receivers, people who change things, and what goes wrong.

`run(seed)` is the whole of it. The same seed is the same world, step by step; `Result.digest` says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any, cast

import asyncpg
import structlog
from tests.simulation.loop import TRACE_STEPS, Life, LifeState, SimulationLoop, StepsExceeded
from tests.simulation.node import (
    Link,
    Network,
    NodeLimits,
    PlainSealer,
    SimulatedNode,
    passing,
    superseded,
)
from tests.simulation.oracle import Named, Oracle, Sent, Subscribed, Violation, deliveries_in
from tests.simulation.replacing import replaced
from tests.simulation.store import SHARDS, Latency, Store, TenantRow

from outrider.v1 import error_reason_pb2, event_pb2, ingest_service_pb2
from outrider_server.api import frames
from outrider_server.domain.delivery import HELD_BACK_US
from outrider_server.domain.endpoint import (
    BatchPolicy,
    DeliveryMode,
    Endpoint,
    EndpointState,
    RetryPolicy,
)
from outrider_server.domain.outcome import AttemptError, Outcome, Verdict
from outrider_server.domain.subscription import SubscriptionState
from outrider_server.domain.tenant import Tenant
from outrider_server.pipeline import homes
from outrider_server.pipeline.deliver import DeliverLimits
from outrider_server.pipeline.persist import GroupLimits
from outrider_server.policy import assignment
from outrider_server.policy.lane import Lane
from outrider_server.policy.plans import Limits
from outrider_server.secrets.sealing import Sealer
from outrider_server.storage import endpoints, shards
from outrider_server.storage.shards import LeaseLost

SETTLE_SECONDS = 60.0
QUIET_SECONDS = 1.5
ACTIVE, PAUSED = 1, 2
TYPES = ("a.x", "a.y", "b.x")
PATTERNS = (("*",), ("a.*",), ("a.x",), ("b.*", "a.y"))


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a world."""

    seed: int
    stormy: bool
    digest: int
    steps: int
    seconds: float
    acks: int
    requests: int
    repeated: int
    faults: int
    violation: str | None
    trace: tuple[str, ...] = field(repr=False, default=())


@dataclass(slots=True)
class Tastes:
    """How an endpoint behaves."""

    fails: float
    lost: float
    slow: float


class FakeSender:
    """Sends a node's requests to the receivers of this world."""

    def __init__(self, world: World, node: SimulatedNode) -> None:
        self._world = world
        self._node = node

    async def send(
        self, endpoint: Endpoint, message_id: str, body: bytes, content_type: str, timestamp: int
    ) -> Outcome:
        """One request, its way there and back."""
        world, node, tenure = self._world, self._node, self._node.tenures
        named = deliveries_in(body)
        world.oracle.started(node, endpoint.id, named)
        world.loop.note("send", (endpoint.id, named))
        reply: asyncio.Future[Outcome] = world.loop.create_future()
        world.loop.call_later(
            world.latency.statement(),
            world.arrives,
            endpoint,
            named,
            reply,
            context=world.loop.outside,
        )
        outcome = await reply
        world.oracle.ended(node, tenure, named, outcome.verdict)
        return outcome


class World:
    """Everything that the seed decides."""

    def __init__(
        self, seed: int, *, stormy: bool = False, trace_steps: int | None = TRACE_STEPS
    ) -> None:
        self.random = random = Random(seed)
        self.stormy = stormy
        self.loop = SimulationLoop(random, trace_steps=trace_steps)
        self.latency = Latency(random, 0.12 if stormy else random.choice((0.0, 0.01, 0.05)))
        self.store = Store(self.loop, random, self.latency, self._violate)
        self.oracle = Oracle(self.store)
        self.nodes: dict[str, SimulatedNode] = {}
        self.lives: list[SimulatedNode] = []
        self.network = Network(self.loop, self.latency.statement)
        self.tastes: dict[int, Tastes] = {}
        self.faults = 0
        self.healed = False
        self.tenants: dict[int, Tenant] = {}
        self._boots = 0
        self._numbers = 0
        self._frozen: dict[str, tuple[Life, float]] = {}
        self.names = ["north", "south"][: 1 if random.random() < 0.5 else 2]
        self._make_configuration()
        self._limits = self._draw_limits()
        self.faults_max = 6 if stormy else random.choice((0, 1, 2, 2, 3, 4, 6))

    def _violate(self, text: str) -> None:
        self.oracle.violate(text)

    # What there is in the beginning.

    def _make_configuration(self) -> None:
        random = self.random
        for number in range(1, 1 + random.choice((1, 1, 2))):
            spread = tuple(random.sample(range(SHARDS), random.choice((1, 1, 1, 2))))
            self.store.tables["tenant"][number] = TenantRow(number, f"t{number}", spread)
            self.tenants[number] = Tenant(number, f"t{number}", spread[0], shards=spread)
            if len(spread) > 1 and len(self.names) > 1:
                self.oracle.split.add(number)
            for _ in range(random.choice((1, 2, 2, 3))):
                self._put_endpoint(number)
            for _ in range(random.choice((1, 2, 3))):
                subscribed = self._draw_subscription(number)
                subscribed.created_at = 0.0
                self.store.tables["subscription"][subscribed.id] = {
                    **self._subscription_row(subscribed),
                    "version": 1,
                }

    def _put_endpoint(self, tenant: int) -> None:
        random = self.random
        number = len(self.store.tables["endpoint"]) + 1
        retry = RetryPolicy(
            base_seconds=random.choice((0.01, 0.05, 0.2)),
            factor=2.0,
            maximum_seconds=0.5,
            attempts_max=random.choice((2, 4, 30)),
        )
        spec = endpoints.EndpointSpec(
            url="http://x/",
            secrets=(),
            mode=random.choice((DeliveryMode.SINGLE, DeliveryMode.BATCH)),
            batch=BatchPolicy(
                events_max=random.choice((2, 3, 8)), linger_ms=random.choice((0.0, 5.0, 20.0))
            ),
            retry=retry,
            concurrency=random.choice((1, 1, 2, 4)),
            attempt_timeout_seconds=1.0,
        )
        sealed = endpoints._sealed(cast(Sealer, Sealing()), tenant, number, spec)
        self.store.tables["endpoint"][number] = {
            "id": number, "tenant": tenant, "name": f"e{number}", "version": 1, "state": int(EndpointState.ACTIVE),
            "settings": endpoints._settings(spec), "sealed": sealed, "deleted": False,
        }  # fmt: skip
        self.oracle.attempts_max[number] = retry.attempts_max
        if spec.concurrency == 1:
            self.oracle.single.add(number)
        self.tastes[number] = Tastes(
            fails=random.choice((0.0, 0.0, 0.2, 0.6)),
            lost=random.choice((0.0, 0.0, 0.05)),
            slow=random.choice((0.0, 0.05, 0.3)),
        )

    def _draw_subscription(self, tenant: int) -> Subscribed:
        number = len(self.oracle.subscriptions) + 1
        of_tenant = [
            row["id"] for row in self.store.tables["endpoint"].values() if row["tenant"] == tenant
        ]
        subscribed = Subscribed(
            number, tenant, self.random.choice(of_tenant), self.random.choice(PATTERNS), None
        )
        self.oracle.subscriptions[number] = subscribed
        return subscribed

    def _subscription_row(self, subscribed: Subscribed) -> dict[str, Any]:
        return {
            "id": subscribed.id, "tenant": subscribed.tenant, "name": f"s{subscribed.id}", "endpoint": subscribed.endpoint,
            "state": int(SubscriptionState.ACTIVE), "types": list(subscribed.types), "filter": "", "filter_ast": None,
            "deleted": False,
        }  # fmt: skip

    def _draw_limits(self) -> NodeLimits:
        random = self.random
        return NodeLimits(
            limits=Limits(
                lane_deliveries_max=random.choice((1, 2, 4, 100)),
                lane_bytes_max=random.choice((1500, 64 * 1024 * 1024)),
                held_bytes_max=random.choice((2500, 8000, 512 * 1024 * 1024)),
                window_us_max=random.choice((50_000, 300_000, 5_000_000)),
                window_events_max=random.choice((3, 20, 200_000)),
            ),
            groups=GroupLimits(events_max=random.choice((3, 5000)), bytes_max=8 * 1024 * 1024),
            deliver=DeliverLimits(
                requests_in_flight_max=random.choice((2, 2000)),
                outcomes_unrecorded_max=random.choice((3, 200_000)),
            ),
            record_seconds=0.1,
            catch_up_deliveries=random.choice((1, 3, 500)),
            catch_up_bytes=random.choice((900, 16 * 1024 * 1024)),
            stream_frames=64,
            crash_seconds=random.choice((0.0, 0.0, 60.0)),
            workers=len(self.names),
        )

    # Nodes.

    def boot(self, name: str) -> None:
        """Start a process for this node."""
        self._boots += 1
        life = Life(f"{name}#{self._boots}")
        node = SimulatedNode(
            loop=self.loop,
            store=self.store,
            random=self.random,
            name=name,
            life=life,
            limits=self._limits,
            sender=lambda made: FakeSender(self, made),
            network=self.network,
            unforeseen=lambda error: self._violate(f"a tenure ended with {error!r}"),
            skew_us=self.random.choice((0, 0, -700_000, 1_300_000)),
        )
        self.nodes[name] = node
        self.lives.append(node)
        self.network.listening[node.address] = node
        self.loop.note("boot", life.name)
        node.start().add_done_callback(
            lambda task: self._exited(node, task), context=self.loop.outside
        )
        if not self.healed and self.faults < self.faults_max and self.random.random() < 0.6:
            self._plan_for(node)

    def _plan_for(self, node: SimulatedNode) -> None:
        """Something is to happen to this process after so many of its steps: at any await."""
        self.faults += 1
        steps = node.life.steps + self.random.randint(1, self.random.choice((60, 300, 900)))
        if self.random.random() < 0.6:
            node.life.at[steps] = lambda: self.crash(node)
        else:
            node.life.at[steps] = lambda: self.freeze(node)

    def _exited(self, node: SimulatedNode, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, LeaseLost):
            self._violate(f"{node.life.name} ended with {error!r}")
        if node.life.state is not LifeState.DEAD:
            self.crash(node)

    def crash(self, node: SimulatedNode) -> None:
        """End a process without a goodbye, and start another soon."""
        self.loop.note("crash", node.life.name)
        self.loop.kill(node.life)
        self._frozen.pop(node.life.name, None)
        self.store.disconnect(node.life)
        self.network.listening.pop(node.address, None)
        self.network.ended(node.life)
        if self.nodes.get(node.name) is node:
            del self.nodes[node.name]
            self.loop.call_later(
                self.random.choice((0.01, 0.3, 1.0, 4.0)),
                self.boot,
                node.name,
                context=self.loop.outside,
            )

    def freeze(self, node: SimulatedNode) -> None:
        """Stop a process for a while, often past its lease."""
        self.loop.note("freeze", node.life.name)
        self.loop.freeze(node.life)
        self._frozen[node.life.name] = (node.life, self.loop.time())
        self.loop.call_later(
            self.random.choice((0.1, 1.0, 2.5, 6.0)),
            self._thaw,
            node.life.name,
            context=self.loop.outside,
        )

    def _thaw(self, name: str) -> None:
        held = self._frozen.pop(name, None)
        if held is not None:
            life, since = held
            self.loop.note("thaw", name)
            self.oracle.thawed[name] = (self.loop.time(), since)
            self.loop.thaw(life)

    def serving(self) -> SimulatedNode | None:
        """A node whose door is open; a stopped process looks like one."""
        found = [node for node in self.nodes.values() if node.serves()]
        return self.random.choice(found) if found else None

    def home(self, tenant: int) -> SimulatedNode | None:
        """The node where a tenant's configuration is changed."""
        shard = self.tenants[tenant].shard
        return next((node for node in self.nodes.values() if node.holds(shard)), None)

    # Receivers.

    def arrives(
        self, endpoint: Endpoint, named: list[Named], reply: asyncio.Future[Outcome]
    ) -> None:
        """A request arrives, or does not."""
        random, tastes = self.random, self.tastes[endpoint.id]
        fails = tastes.fails / (3 if self.healed else 1)
        seconds = self.latency.statement()
        if random.random() < tastes.slow:
            seconds += random.uniform(0.05, 1.3)
        outcome = Outcome(Verdict.DELIVERED, 200, AttemptError.NONE, 1.0)
        draw = random.random()
        if draw < fails:
            outcome = Outcome(
                Verdict.RETRY, 500, AttemptError.STATUS, 1.0, "answered with status 500"
            )
        elif draw < fails + tastes.lost:
            outcome = Outcome(Verdict.RETRY, 0, AttemptError.CONNECT, 1.0, "not there")
        else:
            for each in named:
                self.oracle.received[each] += 1
            if random.random() < tastes.lost:  # its answer is lost
                outcome = Outcome(Verdict.RETRY, 0, AttemptError.DISCONNECTED, 1.0, "no answer")
        if seconds > endpoint.attempt_timeout_seconds:
            seconds = endpoint.attempt_timeout_seconds
            outcome = Outcome(Verdict.RETRY, 0, AttemptError.TIMEOUT, 1000.0, "no answer")
        self.loop.note("receive", (endpoint.id, named, int(outcome.verdict)))
        self.loop.call_later(seconds, _settle, reply, outcome, context=self.loop.outside)

    # What goes on.

    async def live(self) -> None:
        """From the start of the nodes to the end of everything."""
        loop, random = self.loop, self.random
        for name in self.names:
            loop.call_later(random.choice((0.0, 0.0, 0.2)), self.boot, name, context=loop.outside)
        producers = [Producer(self, f"p{n}") for n in range(random.choice((1, 2, 2, 3)))]
        if random.random() < 0.5:
            # One module in two processes, or one that came back before its old connection was given up.
            producers.append(Producer(self, producers[0].name, like=producers[0]))
        work = [loop.create_task(producer.run()) for producer in producers]
        if random.random() < 0.5:
            work.append(loop.create_task(UnaryCaller(self).run()))
        beside = [loop.create_task(self._watch())]
        if self.faults_max:
            beside.append(loop.create_task(self._disturb()))
        if self.stormy or random.random() < 0.5:
            beside.append(loop.create_task(self._change()))
        try:
            async with asyncio.timeout(4 * SETTLE_SECONDS):
                await asyncio.gather(*work)
        except TimeoutError:
            self._violate("what was published is not acknowledged")
        for task in beside[1:]:
            task.cancel()
        await asyncio.wait(beside[1:] or work)
        self._heal()
        try:
            async with asyncio.timeout(SETTLE_SECONDS):
                while not self.oracle.is_settled() or not self._calm():
                    await self._let_go()
                    await self._resume()
                    await asyncio.sleep(0.1)
        except TimeoutError:
            self._violate("what was acknowledged is not delivered: " + self._left())
        await asyncio.sleep(QUIET_SECONDS)
        if not self.oracle.is_settled():
            self._violate("what was settled is not any more")
        self.oracle.end(list(self.nodes.values()))

    async def _resume(self) -> None:
        """Whatever is paused goes on; a pause that nobody saw answered may still come."""
        for table in ("endpoint", "subscription"):
            for key, row in list(self.store.tables[table].items()):
                if row["state"] == PAUSED and not row["deleted"]:
                    await self._make_change(row["tenant"], table, key, {"state": ACTIVE})

    async def _let_go(self) -> None:
        """Somebody looks at what kept crashing its nodes, and lets it be sent."""
        owed = self.store.tables["owed"].values()
        if any(row.due_us == HELD_BACK_US for row in owed):
            self.loop.note("let go")
            with contextlib.suppress(OSError, asyncpg.PostgresError):
                connection = await self.store.connect("person", None)
                await shards.let_go(cast(Any, connection))
                connection.terminate()

    def _calm(self) -> bool:
        return bool(self.nodes) and not self._frozen

    def _left(self) -> str:
        tables = self.store.tables
        behind = [
            sequence
            for _, sequence in tables["event"]
            if sequence > tables["shard"][sequence & 1023].checkpoint
        ]
        serving = [n.life.name for n in self.nodes.values() if n.admission.tenure is not None]
        return f"{len(tables['owed'])} owed rows, {len(behind)} open events, served by {serving}"

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(0.3)
            self.oracle.look()

    def _heal(self) -> None:
        """Nothing goes wrong from here on."""
        self.healed = True
        self.loop.note("heal")
        self.latency.calm()
        self.store.breaks.clear()
        self.store.commit_breaks.clear()
        for node in self.lives:
            node.life.at.clear()
        for name in list(self._frozen):
            self._thaw(name)

    async def _disturb(self) -> None:
        """Things go wrong."""
        random = self.random
        while self.faults < self.faults_max:
            await asyncio.sleep(random.choice((0.0, 0.05, 0.3, 1.0, 3.0)))
            kind = random.randrange(8)
            self.faults += 1
            nodes = [n for n in self.nodes.values() if n.life.state is LifeState.RUNNING]
            if kind == 0:
                self.store.crash(random.choice((0.02, 0.3, 1.5)))
                self.oracle.look()
            elif kind == 7:
                role = random.choice(("record", "record", "ingest", "ingest_large", "moves"))
                self.store.commit_breaks[role] = random.random() < 0.5
            elif kind in (1, 6):
                for _ in range(random.choice((1, 1, 3))):
                    at = self.store.statements + random.randint(1, 60)
                    self.store.breaks[at] = random.random() < 0.5
            elif kind == 2 and self.network.links:
                link = random.choice(list(self.network.links))
                if link.task is not None and not link.task.done():
                    self.loop.cancel_after(link.task, random.randint(1, 12))
            elif kind == 3 and nodes:
                self.loop.note("stop")
                random.choice(nodes).stop()
            elif nodes:
                self._plan_for(random.choice(nodes))

    async def _change(self) -> None:
        """People change the configuration."""
        random = self.random
        for _ in range(random.choice((1, 2, 4))):
            while self.stormy and self.serving() is None:
                await asyncio.sleep(0.05)
            await asyncio.sleep(random.choice((0.01, 0.1, 0.5, 1.5)))
            tenant = random.choice(list(self.tenants))
            kind = 0 if self.stormy and random.random() < 0.6 else random.randrange(6)
            if kind in (0, 5):
                subscribed = self._draw_subscription(tenant)
                if await self._make_change(
                    tenant, "subscription", subscribed.id, self._subscription_row(subscribed)
                ):
                    subscribed.created_at = self.loop.time()
            elif kind == 1:
                rows = self._living("subscription", tenant)
                if len(rows) > 1:
                    key = random.choice(rows)
                    self.oracle.subscriptions[key].deleting = True
                    await self._make_change(tenant, "subscription", key, {"deleted": True})
            else:
                table = "subscription" if kind in (2, 3) else "endpoint"
                rows = self._living(table, tenant)
                if rows:
                    key = random.choice(rows)
                    await self._make_change(tenant, table, key, {"state": PAUSED})
                    if random.random() < 0.6:
                        await asyncio.sleep(random.choice((0.05, 0.5, 1.0)))
                        await self._make_change(tenant, table, key, {"state": ACTIVE})

    def _living(self, table: str, tenant: int) -> list[int]:
        return [
            row["id"]
            for row in self.store.tables[table].values()
            if row["tenant"] == tenant
            and not row["deleted"]
            and not (table == "subscription" and self.oracle.subscriptions[row["id"]].deleting)
        ]

    async def _make_change(
        self, tenant: int, table: str, key: int, changes: dict[str, Any]
    ) -> bool:
        """One management call; whether it was answered."""
        node = self.home(tenant)
        if node is None:
            return False
        self.loop.note("change", (table, key, sorted(changes)))
        task = node.change(self.tenants[tenant], table, key, changes)
        if not self.healed and self.random.random() < 0.2:
            self.loop.cancel_after(task, self.random.randint(1, 10))
        await asyncio.wait({task}, timeout=3.0)
        if not task.done():
            task.cancel()
            return False
        return not task.cancelled() and task.exception() is None

    def number(self) -> int:
        """A number for an event, its name everywhere."""
        self._numbers += 1
        return self._numbers


class Producer:
    """A module that publishes over a stream: sends again what was refused, and comes back when it is cut off.

    `like`: a second process of the same producer and session, which sends the same frames.
    """

    def __init__(self, world: World, name: str, like: Producer | None = None) -> None:
        self.name = name
        self._world = world
        random = world.random
        self.tenant: int = like.tenant if like else random.choice(list(world.tenants))
        self.frames: list[ingest_service_pb2.Frame] = like.frames if like else []
        self.numbers: list[list[int]] = like.numbers if like else []
        if like is None:
            for place in range(random.randint(2, 7) + (4 if world.stormy else 0)):
                frame, numbers = self._draw_frame(place + 1)
                self.frames.append(frame)
                self.numbers.append(numbers)
        self._session = 1
        self._first = 0
        """How many frames lie before the session's first one."""
        self._acked: set[int] = set()
        self._window = random.choice((1, 2, 4, 8))
        self._patience = random.choice((0.1, 0.5, 3.0))
        self._thinks = 0.4 if world.stormy else random.choice((0.0, 0.0, 0.02, 0.2))
        self._twin = like is not None
        self._renews = like is None and random.random() < 0.1

    def _draw_frame(self, number: int) -> tuple[ingest_service_pb2.Frame, list[int]]:
        world, random = self._world, self._world.random
        frame = ingest_service_pb2.Frame(number=number, tenant=f"t{self.tenant}")
        numbers = []
        large = random.random() < 0.15
        for _ in range(random.choice((1, 1, 2, 4))):
            event_number = world.number()
            numbers.append(event_number)
            poison = random.random() < 0.01
            key = f"k{event_number}" if random.random() < 0.3 else ""
            type_ = random.choice(TYPES)
            pad = "x" * 220 if large else ""
            frame.events.append(
                event_pb2.Event(
                    type=type_, key=self.name, source="poison" if poison else "", idempotency_key=key,
                    data=b'{"n":%d,"pad":"%b"}' % (event_number, pad.encode()),
                )
            )  # fmt: skip
            world.oracle.sent[event_number] = Sent(
                self.tenant, type_, self.name, bool(key), poison, 0.0
            )
        return frame, numbers

    async def run(self) -> None:
        """Until every frame is acknowledged."""
        world = self._world
        failures = 0
        while len(self._acked) < len(self.frames):
            acked = len(self._acked)
            node = world.serving()
            if node is None:
                await asyncio.sleep(world.random.choice((0.05, 0.2)))
                continue
            if self._renews and self._acked and world.random.random() < 0.3:
                self._renew()
            link = world.network.link()
            node.open_stream(link, None)
            try:
                await self._publish(link)
            finally:
                link.cut()
                world.network.links.pop(link, None)
            if superseded(link.error) and self._twin:
                return
            if link.error is not None and not passing(link.error):
                world.oracle.violate(f"a stream of {self.name} ended with {link.error!r}")
            if len(self._acked) > acked:
                failures = 0
            # Two processes of one name would push each other out for ever without a pause that grows.
            await asyncio.sleep(world.random.choice((0.0, 0.01, 0.1)) * 2**failures)
            failures = min(failures + 1, 6)

    def _renew(self) -> None:
        """The module restarted: a later session, in which it sends what it has no answer for."""
        self._renews = False
        self._session += 1
        self._first = min(place for place in range(len(self.frames)) if place not in self._acked)

    async def _publish(self, link: Link) -> None:
        world = self._world
        link.send(
            ingest_service_pb2.PublishStreamRequest(
                open=ingest_service_pb2.OpenStream(producer=self.name, session=self._session)
            )
        )
        opened = await self._answer(link)
        if opened is None or opened.WhichOneof("message") != "opened":
            return
        place = min(p for p in range(len(self.frames)) if p not in self._acked)
        sent: list[int] = []
        refused: int | None = None
        leaving = False
        while sent or len(self._acked) < len(self.frames):
            while (
                not leaving
                and refused is None
                and place < len(self.frames)
                and len(sent) < self._window
            ):
                if self._thinks:
                    await asyncio.sleep(world.random.uniform(0, self._thinks))
                self._send(link, place)
                sent.append(place)
                place += 1
            if not sent:
                if leaving:
                    link.send(None)
                    return
                if refused is not None:
                    await asyncio.sleep(world.random.choice((0.0, 0.05, 0.2)))
                    place, refused = refused, None
                    continue
                place = min(p for p in range(len(self.frames)) if p not in self._acked)
                continue
            answer = await self._answer(link)
            kind = None if answer is None else answer.WhichOneof("message")
            if kind is None:
                return
            if kind == "going_away":
                leaving = True
                continue
            number = answer.ack.number if kind == "ack" else answer.refused.number
            expected = sent.pop(0)
            if number != expected - self._first + 1:
                world.oracle.violate(f"{self.name} got an answer to {number} before {expected}")
                return
            if kind == "ack":
                self._note(expected, answer.ack)
            elif refused is None:
                refused = expected
                if answer.refused.reason == error_reason_pb2.ERROR_REASON_NOT_READY:
                    leaving = True
        link.send(None)

    def _send(self, link: Link, place: int) -> None:
        world = self._world
        frame = ingest_service_pb2.Frame()
        frame.CopyFrom(self.frames[place])
        frame.number = place - self._first + 1
        for number in self.numbers[place]:
            sent = world.oracle.sent[number]
            if not sent.sessions:
                sent.at = world.loop.time()
            sent.sessions.add((self.name, self._session))
        link.send(ingest_service_pb2.PublishStreamRequest(frame=frame))

    def _note(self, place: int, ack: Any) -> None:
        frame = ingest_service_pb2.Frame()
        frame.CopyFrom(self.frames[place])
        frame.number = ack.number
        self._world.oracle.acked(self.name, self._session, frame, ack, self.numbers[place])
        self._acked.add(place)

    async def _answer(self, link: Link) -> Any:
        """The next message; None when the stream ended or it took too long."""
        try:
            async with asyncio.timeout(self._patience):
                return await link.to_client.get()
        except TimeoutError:
            self._patience = min(10.0, 2 * self._patience)
            return None


class UnaryCaller:
    """A module that publishes in single calls, each with an idempotency key, until each is answered."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def run(self) -> None:
        """A few calls."""
        world, random = self._world, self._world.random
        tenant = random.choice(list(world.tenants))
        for _ in range(random.randint(1, 4)):
            number = world.number()
            type_ = random.choice(TYPES)
            world.oracle.sent[number] = Sent(
                tenant, type_, "u", True, False, world.loop.time(), {("u", number)}
            )
            request = ingest_service_pb2.PublishRequest(parent=f"tenants/t{tenant}")
            request.events.add(
                type=type_, key="u", idempotency_key=f"k{number}", data=b'{"n":%d}' % number
            )
            while True:
                node = world.serving()
                if node is None:
                    await asyncio.sleep(0.2)
                    continue
                task = node.publish(request, None)
                if not world.healed and random.random() < 0.2:
                    world.loop.cancel_after(task, random.randint(1, 8))
                await asyncio.wait({task}, timeout=random.choice((0.1, 1.0)))
                if not task.done():
                    task.cancel()
                elif not task.cancelled():
                    error = task.exception()
                    if error is None:
                        (result,) = task.result().results
                        world.oracle.acked_event(number, result.id, f"k{number}")
                        break
                    if not passing(error):
                        world.oracle.violate(f"a call ended with {error!r}")
                await asyncio.sleep(random.choice((0.0, 0.1)))


class Sealing(PlainSealer):
    """Seals nothing."""

    def seal(self, tenant: int, purpose: str, name: str, plain: bytes) -> bytes:
        """As it is."""
        return plain


def _settle(reply: asyncio.Future[Outcome], outcome: Outcome) -> None:
    if not reply.done():
        reply.set_result(outcome)


def _lane_hash(lane: Lane) -> int:
    return lane.endpoint.id * SHARDS + lane.shard


@contextmanager
def determined() -> Iterator[None]:
    """What makes a run the same each time: no order by address, no collector in between; no lines; and few shards."""
    collects = gc.isenabled()
    logging = structlog.get_config()
    gc.disable()
    structlog.configure(processors=[_drop])
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(Lane, "__hash__", _lane_hash))
        for module in (assignment, frames, homes):
            stack.enter_context(replaced(module, "SHARD_COUNT", SHARDS))
        try:
            yield
        finally:
            structlog.configure(**logging)
            if collects:
                gc.enable()


def _drop(*_: object) -> Any:
    raise structlog.DropEvent


def run(seed: int, *, stormy: bool = False, traced: bool = False) -> Result:
    """One world; what came of it. `stormy`: more goes wrong in it, and everything takes longer.

    `traced` tells every step in words, else a violation tells the last ones.
    """
    with determined():
        world = World(seed, stormy=stormy, trace_steps=None if traced else TRACE_STEPS)
        violation: str | None = None
        try:
            world.loop.run(world.live())
        except Violation as error:
            violation = str(error)
        except StepsExceeded as error:
            violation = f"it does not end: {error}"
        if violation is None and world.loop.errors:
            violation = f"a callback raised: {world.loop.errors[0]}"
    loop = world.loop
    oracle = world.oracle
    trace = (
        tuple(
            f"{at:10.6f} {life:9} {kind:12} {detail.decode() if isinstance(detail, bytes) else detail}"
            for at, life, kind, detail in loop.trace
        )
        if traced or violation
        else ()
    )
    return Result(
        seed, stormy, loop.digest, loop.steps, loop.time(), oracle.acks, oracle.requests, oracle.repeated, world.faults,
        violation, trace,
    )  # fmt: skip
