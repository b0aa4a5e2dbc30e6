"""One node, composed of the server's own objects over the fake store and the fake network.

The one place of the simulation that knows how the server puts its stages together: it follows `outrider_server.app`, and
where that changes, this file changes. Everything that runs in it is the server's own code, but for what stands below.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Any, cast
from uuid import UUID

import grpc
from tests.simulation.loop import LIFE, Life, SimulationLoop
from tests.simulation.store import START_US, FakeConnection, Fenced, Store

from outrider.v1 import ingest_service_pb2
from outrider_server.api import interceptors
from outrider_server.api.ingest_service import IngestService
from outrider_server.api.links import Portions
from outrider_server.api.peers import Peers, unreachable
from outrider_server.api.publish_stream import StreamLimits
from outrider_server.api.tenancy import Tenancy
from outrider_server.domain.access import Caller, Role
from outrider_server.domain.errors import OutriderError, Unavailable
from outrider_server.domain.event import Event
from outrider_server.domain.tenant import Tenant
from outrider_server.pipeline.admission import Admission, LargeRoom, Room
from outrider_server.pipeline.clock import DatabaseClock
from outrider_server.pipeline.deliver import DeliverLimits, Sender
from outrider_server.pipeline.homes import Homes
from outrider_server.pipeline.ingest import EventChecker, IngestLimits
from outrider_server.pipeline.large import LargeEvents
from outrider_server.pipeline.match import Directory, TenantEntry, match
from outrider_server.pipeline.persist import GroupLimits
from outrider_server.pipeline.tenure import Tenure, TenureParts, open_tenure
from outrider_server.policy.assignment import Assignment, View
from outrider_server.policy.plans import Limits
from outrider_server.secrets.sealing import Sealer
from outrider_server.storage import configuration, tenants
from outrider_server.storage.database import (
    CannotConnect,
    application_name,
    is_unavailable,
    translated,
    until_lost,
)
from outrider_server.storage.event_log import ProducerConflict
from outrider_server.storage.records import RecordConflict
from outrider_server.storage.shards import LeaseLost
from outrider_server.telemetry import counters
from outrider_server.telemetry.logs import PipelineLog
from outrider_server.telemetry.metrics import Metrics
from outrider_server.upkeep import jobs
from outrider_server.upkeep.lease import Lease
from outrider_server.upkeep.moves import Moves

LEASE_SECONDS = 2.0
RENEW_SECONDS = 0.5
MARGIN_SECONDS = 0.5
BACK_OFF_SECONDS = (0.05, 0.1, 0.2, 0.5)
CHANGES_CHECK_SECONDS = 0.5
DRAIN_SECONDS = 2.0
CONNECT_SECONDS = 1.0
_LOST = (RecordConflict, ProducerConflict, Fenced)
"""What ends a tenure whose shards, or whose memory, were not its own any more."""
LARGE_EVENT_BYTES = 200
ROOM_BYTES = 3000


@dataclass(frozen=True, slots=True)
class NodeLimits:
    """What the seed decides of a node's bounds: small ones, so that every bound is met."""

    limits: Limits
    groups: GroupLimits
    deliver: DeliverLimits
    record_seconds: float
    catch_up_deliveries: int
    catch_up_bytes: int
    stream_frames: int
    crash_seconds: float
    workers: int


class NullLogger:
    """Says nothing."""

    def info(self, *_: object, **__: object) -> None:
        """Nothing."""

    warning = error = info


class PlainSealer:
    """Opens what was never sealed."""

    def unseal(self, tenant: int, purpose: str, name: str, sealed: bytes) -> bytes:
        """What was given."""
        return sealed


class InProcessLargeEvents:
    """Checks large events here: there are no child processes in this world. It takes its time, like them."""

    def __init__(self, limits: IngestLimits, seconds: Callable[[], float]) -> None:
        self._checker = EventChecker(limits)
        self._counters = counters.MatchCounters()
        self._seconds = seconds

    async def check_and_match(self, event: Event, entry: TenantEntry) -> None:
        """As LargeEvents does."""
        self._checker.check(event, entry)
        await asyncio.sleep(self._seconds())
        match(entry, event, self._checker.parse(event.data), self._counters)


def plain_metrics() -> Metrics:
    """The counters of a node without their readers, which are slow to make."""
    metrics = Metrics.__new__(Metrics)
    for name, made in (
        ("ingest", counters.IngestCounters),
        ("match", counters.MatchCounters),
        ("persist", counters.PersistCounters),
        ("lanes", counters.LaneCounters),
        ("deliver", counters.DeliverCounters),
        ("record", counters.RecordCounters),
        ("catch_up", counters.CatchUpCounters),
        ("prune", counters.PruneCounters),
        ("homes", counters.HomesCounters),
        ("api", counters.ApiCounters),
        ("telemetry", counters.TelemetryCounters),
    ):
        setattr(metrics, name, made())
    return metrics


class Link:
    """A publish stream's connection: messages both ways, in order, each after a while."""

    def __init__(self, loop: SimulationLoop, latency: Callable[[], float]) -> None:
        self._loop = loop
        self._latency = latency
        self.to_server = Pipe(loop)
        self.to_client = Pipe(loop)
        self.task: asyncio.Task[None] | None = None
        self.life: Life | None = None
        self.client: Life | None = None
        self.cut_off = False
        self.error: BaseException | None = None

    # What the service calls of its context.

    async def read(self) -> Any:
        """The next message of the producer, EOF when there will be none."""
        message = await self.to_server.get()
        return grpc.aio.EOF if message is None else message

    async def write(self, message: Any) -> None:
        """Send a message to the producer."""
        if not self.cut_off:
            self._loop.call_later(
                self._latency(), self.to_client.arrive, context=self._loop.outside
            )
            self.to_client.send(message)

    # What the producer calls.

    def send(self, message: Any) -> None:
        """Send a message to the service; None ends the stream."""
        if not self.cut_off:
            self.to_server.send(message)
            self._loop.call_later(
                self._latency(), self.to_server.arrive, context=self._loop.outside
            )

    def cut(self) -> None:
        """Break the connection: the producer sees the end, the service's task is cancelled."""
        if self.cut_off:
            return
        self.cut_off = True
        self.to_client.close()
        if self.task is not None:
            context = self._loop.outside.copy()
            context.run(LIFE.set, self.life)
            self._loop.call_later(self._latency(), self._cancel, context=context)

    def ended(self, task: asyncio.Task[None]) -> None:
        """The service ended the stream."""
        if not task.cancelled():
            self.error = task.exception()
        self._loop.call_later(self._latency(), self.to_client.close, context=self._loop.outside)

    def _cancel(self) -> None:
        assert self.task is not None
        self.task.cancel()


class Pipe:
    """One direction of a link. What was sent arrives in order, however long each took."""

    def __init__(self, loop: SimulationLoop) -> None:
        self._loop = loop
        self._sent: deque[Any] = deque()
        self._arrived: deque[Any] = deque()
        self._waiting: asyncio.Future[None] | None = None
        self._closed = False

    def send(self, message: Any) -> None:
        """Put a message on its way; `arrive` is called once for each."""
        self._sent.append(message)

    def arrive(self) -> None:
        """The first of those on their way arrives."""
        if self._sent:
            self._arrived.append(self._sent.popleft())
        self._wake()

    def close(self) -> None:
        """Nothing arrives any more."""
        self._closed = True
        self._wake()

    async def get(self) -> Any:
        """The next message; None at the end."""
        while not self._arrived:
            if self._closed:
                return None
            self._waiting = self._loop.create_future()
            await self._waiting
        return self._arrived.popleft()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


class PeerCall:
    """A node's call to another node, over a link: bytes both ways."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def write(self, message: bytes) -> None:
        """Send."""
        self._link.send(message)

    async def read(self) -> Any:
        """The next message, EOF at the end."""
        message = await self._link.to_client.get()
        return grpc.aio.EOF if message is None else message

    def cancel(self) -> None:
        """End the call."""
        self._link.cut()


class FakePeers:
    """The other nodes of this world: `Peers` without channels and proofs. What travels is what the real one carries."""

    def __init__(self, node: SimulatedNode, network: Network) -> None:
        self._node = node
        self._network = network

    @asynccontextmanager
    async def call(
        self, address: str, method: str, caller: Caller, seconds_max: float | None
    ) -> AsyncIterator[PeerCall]:
        """A call to the process that listens there; raises `Unavailable` where none does, or where it does not answer."""
        link = self._network.open(self._node, address, caller)
        if link is None:
            await asyncio.sleep(self._network.latency())
            raise unreachable(address)
        try:
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    proved = await link.to_client.get()
            except TimeoutError:
                raise unreachable(address) from None
            if proved is None:
                raise unreachable(address)
            yield PeerCall(link)
        finally:
            link.cut()

    async def close(self) -> None:
        """Nothing is kept."""


class Network:
    """The links of this world, and who listens where."""

    def __init__(self, loop: SimulationLoop, latency: Callable[[], float]) -> None:
        self.links: dict[Link, None] = {}
        self.listening: dict[str, SimulatedNode] = {}
        self.latency = latency
        self._loop = loop

    def link(self) -> Link:
        """A new connection."""
        made = Link(self._loop, self.latency)
        self.links[made] = None
        return made

    def open(self, client: SimulatedNode, address: str, caller: Caller) -> Link | None:
        """A connection from one node to another."""
        node = self.listening.get(address)
        if node is None:
            return None
        made = self.link()
        made.client = client.life
        node.open_portions(made, caller)
        return made

    def ended(self, life: Life) -> None:
        """A process is gone: the other ends see it."""
        for link in list(self.links):
            if link.life is life:
                link.task = None
            if life in (link.life, link.client):
                link.cut()
                del self.links[link]


class Unary:
    """What a unary call's context is asked for: nothing."""


class SimulatedNode:
    """A process that runs a node until it is stopped, killed, or has to end by itself."""

    def __init__(
        self,
        *,
        loop: SimulationLoop,
        store: Store,
        random: Random,
        name: str,
        life: Life,
        limits: NodeLimits,
        sender: Callable[[SimulatedNode], Sender],
        network: Network,
        unforeseen: Callable[[BaseException], None],
        skew_us: int,
    ) -> None:
        self.name = name
        self._unforeseen = unforeseen
        self.life = life
        self.address = f"{life.name}:1"
        self.tenures = 0
        self.checked_at = -1.0
        self._loop = loop
        self._store = store
        self._limits = limits
        self._boot = str(UUID(int=random.getrandbits(128), version=4))
        self._stop = asyncio.Event()
        self._orderly = False
        self._moves: Moves | None = None
        self._changed_unread: set[int] = set()
        self._clock = DatabaseClock(lambda: START_US + skew_us + round(loop.time() * 1e6))
        self.directory = Directory()
        self.metrics = plain_metrics()
        ingest = IngestLimits(large_event_bytes=LARGE_EVENT_BYTES)
        self.admission = Admission(
            directory=self.directory,
            limits=ingest,
            room=Room(ROOM_BYTES),
            large_room=LargeRoom(ROOM_BYTES),
            forwarded_room=Room(ROOM_BYTES),
            large=cast(LargeEvents, InProcessLargeEvents(ingest, store.latency.statement)),
            metrics=self.metrics,
            monotonic=loop.time,
            now_us=self._clock.now_us,
        )
        self._homes = Homes(name, self._find_homes)
        self.service = IngestService(
            admission=self.admission,
            limits=StreamLimits(frames_max=limits.stream_frames),
            homes=self._homes,
            peers=cast(Peers, FakePeers(self, network)),
            wrong_home=self._wrong_home,
            counters=self.metrics.homes,
            now_us=self._clock.now_us,
            seconds=loop.time,
            node=lambda: self.address,
        )
        self.portions = Portions(self.admission, self.service.reader, self.metrics.homes)
        self.tenancy = Tenancy(cast(Any, self), self._changed, self._epoch)
        self.lease = Lease(
            node=name,
            boot=self._boot,
            address=lambda: self.address,
            lease_seconds=LEASE_SECONDS,
            renew_seconds=RENEW_SECONDS,
            margin_seconds=MARGIN_SECONDS,
            clock=self._clock,
            monotonic=loop.time,
        )
        self._parts = TenureParts(
            connect=cast(Any, self._connect),
            clock=self._clock,
            directory=self.directory,
            sender=sender(self),
            metrics=self.metrics,
            log=PipelineLog(clock=loop.time, counters=self.metrics.telemetry, logger=NullLogger()),
            lease_holds=self._lease_holds,
            random=random.random,
            monotonic=loop.time,
            limits=limits.limits,
            groups=limits.groups,
            deliver=limits.deliver,
            record_interval_seconds=limits.record_seconds,
            catch_up_deliveries_max=limits.catch_up_deliveries,
            catch_up_bytes_max=limits.catch_up_bytes,
        )

    # What the world asks for.

    def serves(self) -> bool:
        """Whether its door is open."""
        return self.admission.tenure is not None and not self.admission.draining

    def holds(self, shard: int) -> bool:
        """Whether changes of tenants that live in this shard are made here."""
        return self._epoch(shard) is not None

    def stop(self) -> None:
        """Drain and end."""
        self._stop.set()

    def start(self) -> asyncio.Task[None]:
        """Run as a process of its own."""
        return self._spawn(self._run())

    def open_stream(self, link: Link, tenant: int | None) -> None:
        """A producer opens a stream."""
        link.life = self.life
        link.task = self._spawn(
            self._call(self.service.PublishStream, None, cast(Any, link), tenant)
        )
        link.task.add_done_callback(link.ended)

    def open_portions(self, link: Link, caller: Caller) -> None:
        """Another node opens a link."""
        link.life = self.life
        link.task = self._spawn(self._serve_portions(link, caller))
        link.task.add_done_callback(link.ended)

    async def _serve_portions(self, link: Link, caller: Caller) -> None:
        interceptors._caller.set(caller)
        await link.write(b"proof")
        await self.portions.serve(None, cast(Any, link))

    def publish(
        self, request: ingest_service_pb2.PublishRequest, tenant: int | None
    ) -> asyncio.Task[Any]:
        """A unary call."""
        return self._spawn(self._call(self.service.Publish, request, Unary(), tenant))

    def change(
        self, tenant: Tenant, table: str, key: int, changes: dict[str, Any]
    ) -> asyncio.Task[None]:
        """A management call that changes a tenant's configuration."""
        return self._spawn(self._change(tenant, table, key, changes))

    def leaks(self) -> int:
        """Bytes that nobody gave back."""
        admission = self.admission
        return admission.room.taken + admission.large_room.taken + admission.forwarded_room.taken

    def _spawn(self, coroutine: Any) -> asyncio.Task[Any]:
        context = self._loop.outside.copy()
        context.run(LIFE.set, self.life)
        return context.run(self._loop.create_task, coroutine)

    async def _call(self, method: Any, request: Any, context: Any, tenant: int | None) -> Any:
        interceptors._caller.set(Caller("key", Role.PUBLISHER, tenant))
        return await method(request, context)

    async def _change(self, tenant: Tenant, table: str, key: int, changes: dict[str, Any]) -> None:
        async with self.tenancy.work(dry_run=False) as work:
            await cast(Any, work.connection).ask("simulated_change", tenant.id, table, key, changes)
            await work.changes(tenant)

    # As `app.Node` does it.

    async def _run(self) -> None:
        watching = self._loop.create_task(self._watch_changes())
        failures = 0
        while not self._stop.is_set():
            try:
                await self._hold_tenure()
            except Exception as error:  # noqa: BLE001 - as in app.Node._hold_tenures
                for leaf in _leaves(error):
                    if isinstance(leaf, LeaseLost):
                        raise leaf from None
                first = _leaves(error)[0]
                self._orderly = isinstance(first, OutriderError) or is_unavailable(first)
                self._loop.note("tenure ended", repr(first))
                if not (self._orderly or isinstance(first, _LOST)):
                    self._unforeseen(first)
            began = self.admission.tenure is not None
            self.admission.tenure = None
            failures = 0 if began else min(failures + 1, len(BACK_OFF_SECONDS) - 1)
            await self._pause(BACK_OFF_SECONDS[failures])
        with contextlib.suppress(Exception):
            connection = await self._connect("lease", durable=True)
            try:
                await self.lease.end(connection)
            finally:
                await connection.close()
        watching.cancel()

    async def _pause(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stop.wait()
        return self._stop.is_set()

    async def _hold_tenure(self) -> None:
        async with contextlib.AsyncExitStack() as stack:

            async def connection(role: str) -> Any:
                made = await self._connect(role, durable=True)
                stack.callback(made.terminate)
                return made

            lease = await connection("lease")
            if not await self.lease.begin(lease, self._pause, lambda _: None):
                return
            cancelling, moving = await connection("jobs"), await connection("moves")
            self.directory.clear()

            async def upkeep(tenure: Tenure, tasks: asyncio.TaskGroup) -> None:
                moves = self._moves = self._moves_of(tenure, moving)
                tasks.create_task(until_lost((lease, cancelling, moving)))
                tasks.create_task(self.lease.run(lease, tenure.epochs))
                tasks.create_task(moves.run())
                tasks.create_task(
                    jobs.cancel_deleted(tenure.obligations, tenure.recorder, cancelling)
                )

            self.tenures += 1
            async with open_tenure(self._parts, upkeep) as tenure:
                await self._serve(tenure, lease)

    def _moves_of(self, tenure: Tenure, connection: Any) -> Moves:
        async def load(shards: Collection[int]) -> Any:
            return await configuration.load_shards(connection, cast(Sealer, PlainSealer()), shards)

        def settled(view: View) -> None:
            self._looked(tenure, view)

        return Moves(
            tenure=tenure,
            lease=self.lease,
            assignment=Assignment(self.name, self._limits.workers, RENEW_SECONDS),
            homes=self._homes,
            connection=connection,
            load=load,
            monotonic=self._loop.time,
            renew_seconds=RENEW_SECONDS,
            crash_seconds=self._limits.crash_seconds,
            orderly=self._orderly,
            settled=settled,
            counters=self.metrics.homes,
        )

    def _looked(self, tenure: Tenure, view: View) -> None:
        if self.admission.tenure is tenure or self._stop.is_set():
            return
        if not tenure.obligations.windows and not any(shard.live for shard in view.shards):
            return
        self.admission.tenure = tenure
        self._loop.note("tenure began", self.tenures)

    async def _serve(self, tenure: Tenure, lease: Any) -> None:
        await self._stop.wait()
        self.admission.draining = True
        self.lease.draining = True
        await self.lease.renew(lease, tenure.epochs)
        with contextlib.suppress(Exception):
            await self.service.go_away()
        assert self._moves is not None
        await self._moves.drain(DRAIN_SECONDS)

    async def _connect(self, role: str, *, durable: bool) -> FakeConnection:
        try:
            made = await self._store.connect(
                application_name(self.name, self._boot, role), self.life
            )
        except OSError as error:
            raise CannotConnect("the database", str(error)) from error
        if not durable:
            await made.execute("SET synchronous_commit = off")
        return made

    # `Database`, as far as changes need it.

    @asynccontextmanager
    async def transaction(self, *, dry_run: bool) -> AsyncIterator[FakeConnection]:
        """One connection in a transaction."""
        with translated():
            connection = await self._connect("api", durable=True)
            try:
                async with connection.transaction():
                    yield connection
            finally:
                # A pool takes a connection back, whatever cancels its caller, when its last statement has ended.
                await asyncio.shield(asyncio.ensure_future(connection.settled()))
                connection.terminate()

    def _epoch(self, shard: int) -> int | None:
        tenure = self.admission.tenure
        if tenure is None or not self.admission.holds(shard) or not self.lease.holds():
            return None
        return tenure.obligations.windows[shard].epoch

    def _wrong_home(self, names: Sequence[str]) -> None:
        self._homes.forget(names)
        if self._moves is not None:
            self._moves.look_soon()

    async def _find_homes(
        self, names: Collection[str], ids: Collection[int]
    ) -> list[tuple[int, str, tuple[int, ...]]]:
        with translated():
            connection = await self._connect("api", durable=True)
            try:
                return await tenants.find_homes(cast(Any, connection), names, ids)
            finally:
                connection.terminate()

    def _lease_holds(self) -> bool:
        holds = self.lease.holds()
        if holds:
            self.checked_at = self._loop.time()
        return holds

    async def _changed(self, tenant: int) -> None:
        tenure = self.admission.tenure
        if tenure is None:
            return
        try:
            await self._changed_in(tenure, tenant)
        except BaseException:
            self._changed_unread.add(tenant)
            raise

    async def _changed_in(self, tenure: Tenure, tenant: int) -> None:
        with translated():
            connection = await self._connect("api", durable=True)
            try:
                loaded = await configuration.load_tenant(
                    cast(Any, connection), cast(Sealer, PlainSealer()), tenant
                )
            finally:
                connection.terminate()
        if loaded is None:
            tenure.remove(tenant)
        elif not tenure.obligations.windows.keys().isdisjoint(loaded.tenant.everywhere):
            tenure.configure(loaded)

    async def _watch_changes(self) -> None:
        while True:
            await asyncio.sleep(CHANGES_CHECK_SECONDS)
            with contextlib.suppress(OutriderError):
                await self._look_at_split_tenants()
            for tenant in sorted(self._changed_unread):
                self._changed_unread.discard(tenant)
                with contextlib.suppress(OutriderError):
                    await self._changed(tenant)

    async def _look_at_split_tenants(self) -> None:
        tenure = self.admission.tenure
        if tenure is None:
            return
        with translated():
            connection = await self._connect("api", durable=True)
            try:
                versions = await tenants.find_split(
                    cast(Any, connection), tenure.obligations.windows
                )
            finally:
                connection.terminate()
        for tenant, version in versions.items():
            entry = self.directory.by_id.get(tenant)
            if entry is None or entry.version != version:
                self._changed_unread.add(tenant)
        self._changed_unread.update(
            entry.id
            for entry in self.directory.by_id.values()
            if len(entry.everywhere) > 1 and entry.id not in versions
        )


def superseded(error: BaseException | None) -> bool:
    """Whether a stream ended because a later session of its producer took over."""
    return isinstance(error, OutriderError) and error.reason == "SESSION_SUPERSEDED"


def passing(error: BaseException | None) -> bool:
    """Whether a call or stream that ended with this may be begun again."""
    return isinstance(error, Unavailable) or (
        isinstance(error, OutriderError) and error.reason == "STREAM_REPLACED"
    )


def _leaves(error: BaseException) -> list[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
