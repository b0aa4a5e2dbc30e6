"""A tenure: one period in which this node holds its lease, and shards under it.

Shards come and go within it. Start, takeover, hand-off, lost connection and a database that went back are one path: take
the shards over (epoch + 1), load the configuration, read each window, subtract what is settled, count what is owed, write
a first record, open for ingest (`Tenure.adopt`). When anything that a record or a commit depends on fails, the tenure
ends, everything in memory is forgotten, and the next one starts from the log. A live node must not outlive its lost asynchronous commit.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from outrider_server.domain.errors import Unavailable
from outrider_server.domain.tenant import TenantConfiguration
from outrider_server.pipeline.catch_up import CatchUp
from outrider_server.pipeline.clock import DatabaseClock
from outrider_server.pipeline.deliver import Deliverer, DeliverLimits, Sender
from outrider_server.pipeline.match import Directory
from outrider_server.pipeline.persist import GroupLimits, Persister, Session
from outrider_server.pipeline.record import Recorder
from outrider_server.pipeline.slices import GiveWay
from outrider_server.policy.checkpoint import Window
from outrider_server.policy.lane import Lane
from outrider_server.policy.obligations import Obligations
from outrider_server.policy.plans import Limits
from outrider_server.storage import event_log, owed
from outrider_server.storage.database import Connection, DedicatedConnection, translated, until_lost
from outrider_server.storage.shards import TakenShard
from outrider_server.telemetry.logs import PipelineLog
from outrider_server.telemetry.metrics import Metrics

SESSIONS_MAX = 100_000
WINDOW_SLICE_EVENTS = 500
MOVE_POLL_SECONDS = 0.01
RECORD_SECONDS_MAX = 5.0
"""How long the last records of a shard that is handed off may take."""


class Connect(Protocol):
    """Opens a dedicated connection for a role; `durable` ones wait for the disk at commit."""

    async def __call__(self, role: str, *, durable: bool) -> DedicatedConnection:
        """The connection; the caller closes it."""
        ...


@dataclass(frozen=True, slots=True)
class TenureParts:
    """What outlives tenures, and the bounds."""

    connect: Connect
    clock: DatabaseClock
    directory: Directory
    sender: Sender
    metrics: Metrics
    log: PipelineLog
    lease_holds: Callable[[], bool]
    random: Callable[[], float]
    monotonic: Callable[[], float]
    limits: Limits
    groups: GroupLimits
    deliver: DeliverLimits
    record_interval_seconds: float
    catch_up_deliveries_max: int
    catch_up_bytes_max: int


class Tenure:
    """The stages of one tenure, running. Made by `open_tenure`."""

    def __init__(self, parts: TenureParts, obligations: Obligations) -> None:
        self.parts = parts
        self.obligations = obligations
        self.sessions: dict[str, Session] = {}
        self.deliverer: Deliverer
        self.persister: Persister
        self.recorder: Recorder
        self.catch_up: CatchUp
        self._reader: DedicatedConnection
        self._session_lock = asyncio.Lock()
        self._moving = asyncio.Lock()
        self._adopting: set[int] = set()

    async def session(self, producer: str, shards: set[int]) -> Session:
        """What is known of a producer in these shards; read from the log the first time, and after a shard came.

        Until the caller waits for something, it cannot be forgotten.
        """
        session = self.sessions.get(producer)
        if session is None or not session.reach.keys() >= shards:
            async with self._session_lock:
                session = self.sessions.get(producer)
                if session is None or not session.reach.keys() >= shards:
                    # Of these nobody else can write a row while it is being read.
                    held = [window for window in self.obligations.windows.values() if window.open]
                    known = await self._read_reach(producer)
                    session = self.sessions.get(producer)
                    if session is None:
                        if len(self.sessions) >= SESSIONS_MAX:
                            self._forget_idle_sessions()
                        session = self.sessions[producer] = Session(producer)
                    for window in held:
                        if self.obligations.windows.get(window.shard) is window:
                            # What is known already is at least as new.
                            session.reach.setdefault(window.shard, known.get(window.shard, (0, 0)))
        return session

    async def read_reach(self, producer: str) -> dict[int, tuple[int, int]]:
        """What is durable of a producer, per shard, whoever holds it: its latest session there, and the last frame."""
        async with self._session_lock:
            return await self._read_reach(producer)

    async def _read_reach(self, producer: str) -> dict[int, tuple[int, int]]:
        with translated():
            return await event_log.read_producer(self._reader, producer)

    def epochs(self) -> dict[int, int]:
        """The shards that memory stands for, and their epochs."""
        return {shard: window.epoch for shard, window in self.obligations.windows.items()}

    def configure(self, configuration: TenantConfiguration) -> None:
        """A tenant's configuration changed: swap its index, adapt lanes."""
        if not self.parts.directory.replace(configuration):
            return
        tenant = configuration.tenant
        for shard in tenant.everywhere:
            if shard in self.obligations.windows or shard in self._adopting:
                self._woken(
                    self.obligations.configure(
                        shard,
                        tenant.id,
                        configuration.endpoints,
                        configuration.subscriptions,
                        len(tenant.spread),
                    )
                )

    def remove(self, tenant: int) -> None:
        """A tenant was deleted: what is left of its deliveries is cancelled."""
        entry = self.parts.directory.remove(tenant)
        for shard in () if entry is None else entry.everywhere:
            if shard in self.obligations.windows or shard in self._adopting:
                self._woken(self.obligations.configure(shard, tenant, (), ()))

    async def adopt(
        self,
        connection: Connection,
        taken: Collection[TakenShard],
        load: Callable[[Collection[int]], Awaitable[list[TenantConfiguration]]],
    ) -> list[int]:
        """Take up shards that were taken over: read what the log says is open and owed of them, then let events in.

        `load` reads the configuration, after the epochs were raised: nobody can change it unseen any more. The one way
        for a start, a takeover and a hand-off. Returns the shards of which something waits for a person.
        """
        adoption = Adoption(self, connection)
        async with self._moving:
            # From before they are read, so that no change of a split tenant is missed.
            self._adopting = {each.shard for each in taken}
            await adoption.configure(taken, await load({each.shard for each in taken}))
            held_back = [each.shard for each in taken if await adoption.restore(each)]
            self._adopting = set()
            await self.recorder.record()
            for each in taken:
                self.obligations.windows[each.shard].open = True
            self.catch_up.start({each.shard for each in taken})
        return held_back

    async def release(
        self, shard: int, give: Callable[[int, int], Awaitable[None]], *, seconds_max: float
    ) -> bool:
        """Hand a shard off: let what is in flight end, owe or record the rest, then `give` (shard, epoch) away.

        So its next owner repeats nothing. False, and all goes on as before, where that takes longer than `seconds_max`.
        """
        async with self._moving:
            window = self.obligations.windows[shard]
            self.obligations.pause_shard(shard)
            until = self.parts.monotonic() + seconds_max
            while self.obligations.in_flight_of(shard):
                if self.parts.monotonic() >= until:
                    self._keep(shard)
                    return False
                await asyncio.sleep(MOVE_POLL_SECONDS)
            window.open = False
            until = max(until, self.parts.monotonic() + RECORD_SECONDS_MAX)
            while self.persister.concerns(shard) or not await self.recorder.forget(shard):
                if self.parts.monotonic() >= until:
                    window.open = True
                    self._keep(shard)
                    return False
                if self.persister.concerns(shard) or not await self.recorder.record():
                    await asyncio.sleep(MOVE_POLL_SECONDS)
            self._forgotten(shard)
            await give(shard, window.epoch)
            return True

    async def abandon(
        self, shards: Collection[int], give: Callable[[int, int], Awaitable[None]]
    ) -> None:
        """Give shards away as they are, at the end of a node's time: what has no outcome is sent again by the next owner."""
        async with self._moving:
            for shard in shards:
                self.obligations.windows[shard].open = False
            await self.persister.drained()
            await self.recorder.record()
            for shard in shards:
                epoch = self.obligations.windows[shard].epoch
                await self.recorder.forget(shard, clean=False)
                self._forgotten(shard)
                await give(shard, epoch)

    def _forgotten(self, shard: int) -> None:
        self.catch_up.forget(shard)
        windows = self.obligations.windows
        for entry in list(self.parts.directory.by_id.values()):
            if shard in entry.everywhere and windows.keys().isdisjoint(entry.everywhere):
                self.parts.directory.remove(entry.id)
        for session in self.sessions.values():
            session.reach.pop(shard, None)

    def _keep(self, shard: int) -> None:
        self.obligations.keep_shard(shard)
        for entry in list(self.parts.directory.by_id.values()):
            if shard in entry.everywhere:
                configuration = entry.configuration
                self._woken(
                    self.obligations.configure(
                        shard,
                        entry.id,
                        configuration.endpoints,
                        configuration.subscriptions,
                        len(entry.shards),
                    )
                )

    def want_catch_up(self, lane: Lane) -> None:
        """A lane has room for owed deliveries."""
        self.catch_up.want(lane)

    def _woken(self, lanes: Iterable[Lane]) -> None:
        for lane in lanes:
            self.catch_up.want(lane)
            self.deliverer.wake(lane)

    def _recorded(self, lanes: Iterable[Lane]) -> None:
        self.catch_up.recorded(lanes)
        self.deliverer.recorded()

    def _forget_idle_sessions(self) -> None:
        """A producer that is not busy can be read again when it comes back."""
        self.sessions = {
            name: session for name, session in self.sessions.items() if not session.idle()
        }


@asynccontextmanager
async def open_tenure(
    parts: TenureParts, upkeep: Callable[[Tenure, asyncio.TaskGroup], Awaitable[None]]
) -> AsyncIterator[Tenure]:
    """Run the stages, with no shard yet: see `Tenure.adopt`. Inside the block the node ingests and delivers.

    Leaving the block ends every stage at once (hand the shards off before, for a clean end). A stage that fails ends the block.
    `upkeep` starts the loops beside the path in the same group of tasks.
    """
    obligations = Obligations(parts.limits)
    tenure = Tenure(parts, obligations)
    opened: list[DedicatedConnection] = []

    async def connection(role: str, *, durable: bool = True) -> DedicatedConnection:
        opened.append(await parts.connect(role, durable=durable))
        return opened[-1]

    metrics = parts.metrics
    try:
        tenure._reader = await connection("read")  # noqa: SLF001 - the composition of this class
        async with asyncio.TaskGroup() as tasks:
            tenure.deliverer = Deliverer(
                obligations=obligations,
                sender=parts.sender,
                clock=parts.clock,
                limits=parts.deliver,
                lease_holds=parts.lease_holds,
                wants_catch_up=tenure.want_catch_up,
                random=parts.random,
                counters=metrics.deliver,
                log=parts.log,
                tasks=tasks,
            )
            tenure.catch_up = CatchUp(
                obligations=obligations,
                connection=await connection("catch_up"),
                clock=parts.clock,
                deliveries_max=parts.catch_up_deliveries_max,
                bytes_max=parts.catch_up_bytes_max,
                ready=tenure.deliverer.wake,
                counters=metrics.catch_up,
            )
            tenure.persister = Persister(
                obligations=obligations,
                clock=parts.clock,
                limits=parts.groups,
                enqueued=tenure.deliverer.wake_all,
                relieved=tenure.catch_up.want_all,
                ingest=metrics.ingest,
                counters=metrics.persist,
                lanes=metrics.lanes,
                log=parts.log,
                monotonic=parts.monotonic,
            )
            tenure.recorder = Recorder(
                obligations=obligations,
                connection=await connection("record", durable=False),
                clock=parts.clock,
                record_time=tenure.persister.record_time,
                interval_seconds=parts.record_interval_seconds,
                recorded=tenure._recorded,  # noqa: SLF001
                counters=metrics.record,
                lanes=metrics.lanes,
                log=parts.log,
                monotonic=parts.monotonic,
            )
            small, large = await connection("ingest"), await connection("ingest_large")
            tasks.create_task(until_lost(opened))
            tasks.create_task(tenure.recorder.run())
            tasks.create_task(tenure.catch_up.run())
            tasks.create_task(tenure.persister.run(small, large=False))
            tasks.create_task(tenure.persister.run(large, large=True))
            await upkeep(tenure, tasks)
            try:
                yield tenure
            finally:
                tenure.deliverer.stop()
                tenure.persister.refuse_all(
                    Unavailable(
                        "NOT_READY",
                        "the node takes its shards up again; retry",
                        retry_after_seconds=0.2,
                    )
                )
            raise _Ended
    except* _Ended:
        pass
    finally:
        for each in opened:
            each.terminate()


class _Ended(Exception):
    """Cancels what is left of a tenure's tasks."""


class Adoption:
    """Reads shards from the log into a tenure's memory, in slices that give way to the loop."""

    def __init__(self, tenure: Tenure, connection: Connection) -> None:
        self._tenure = tenure
        self._connection = connection
        self._tenants: defaultdict[int, list[int]] = defaultdict(list)

    async def configure(
        self, taken: Collection[TakenShard], configurations: Iterable[TenantConfiguration]
    ) -> None:
        """Indexes and lanes of the tenants of these shards."""
        tenure = self._tenure
        shards = {each.shard for each in taken}
        configured: set[tuple[int, int]] = set()
        giving_way = GiveWay(tenure.parts.monotonic)
        for read in configurations:
            tenant, configuration = read.tenant, read
            if not tenure.parts.directory.replace(read):  # a later one came while it was read
                configuration = tenure.parts.directory.by_id[tenant.id].configuration
                tenant = configuration.tenant
            for shard in shards.intersection(tenant.everywhere):
                configured.add((tenant.id, shard))
                tenure.obligations.configure(
                    shard,
                    tenant.id,
                    configuration.endpoints,
                    configuration.subscriptions,
                    len(tenant.spread),
                )
            if giving_way.due():
                await giving_way()
        for tenant_id, shard in await event_log.read_tenants(self._connection, sorted(shards)):
            self._tenants[shard].append(tenant_id)
            if (tenant_id, shard) not in configured:
                # Deleted: what it is still owed is cancelled, not forgotten.
                tenure.obligations.configure(shard, tenant_id, (), ())

    async def restore(self, taken: TakenShard) -> bool:
        """The window of a shard, page by page, and what it owes. Returns whether any of it is held back."""
        obligations = self._tenure.obligations
        shard, connection = taken.shard, self._connection
        window = Window(shard, taken.epoch, taken.checkpoint, taken.record_no, taken.checkpoint)
        window.open = False
        held_back = False
        # Counted first: records that are written meanwhile add to it.
        for counted in await owed.count(connection, [shard]):
            held_back |= taken.held_back
            obligations.restore_owed(
                shard, counted.subscription, counted.tenant, counted.backlog, counted.retry_us
            )
        obligations.restore_window(window, (), set())
        tenants = self._tenants[shard]
        if not tenants:
            return held_back
        settled: set[tuple[int, int]] | None = None
        pages = event_log.read_window(connection, shard, tenants, taken.checkpoint)
        async with aclosing(pages):
            async for page in pages:
                if settled is None:
                    settled = await event_log.read_settled(connection, shard, page[0][0])
                for start in range(0, len(page), WINDOW_SLICE_EVENTS):
                    owing = obligations.restore_window(
                        window,
                        page[start : start + WINDOW_SLICE_EVENTS],
                        settled,
                        held_back=taken.held_back,
                    )
                    held_back |= taken.held_back and owing
                    await asyncio.sleep(0)
                window.clock.known(page[-1][0])
        return held_back
