"""A tenure: one period in which this node holds its shards.

Start, takeover, lost connection and a database that went back are one path: take the shards over (epoch + 1), load the
configuration, read each window, subtract what is settled, count what is owed, write a first record, open for ingest. When
anything that a record or a commit depends on fails, the tenure ends, everything in memory is forgotten, and the next one
starts from the log. A live node must not outlive its lost asynchronous commit.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
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
from outrider_server.policy.checkpoint import Window
from outrider_server.policy.lane import Lane
from outrider_server.policy.obligations import Obligations
from outrider_server.policy.plans import Limits
from outrider_server.storage import event_log, owed
from outrider_server.storage.database import DedicatedConnection, translated, until_lost
from outrider_server.storage.shards import TakenShard
from outrider_server.telemetry.logs import PipelineLog
from outrider_server.telemetry.metrics import Metrics

SESSIONS_MAX = 100_000


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

    async def session(self, producer: str) -> Session:
        """What is known of a producer; read from the log the first time."""
        session = self.sessions.get(producer)
        if session is None:
            async with self._session_lock:
                session = self.sessions.get(producer)
                if session is None:
                    with translated():
                        known = await event_log.read_producer(self._reader, producer)
                    if len(self.sessions) >= SESSIONS_MAX:
                        self._forget_idle_sessions()
                    session = self.sessions[producer] = Session(producer, *(known or (0, 0)))
        return session

    def configure(self, configuration: TenantConfiguration) -> None:
        """A tenant's configuration changed: swap its index, adapt lanes."""
        if not self.parts.directory.replace(configuration):
            return
        woken = self.obligations.configure(
            configuration.tenant.id, configuration.endpoints, configuration.subscriptions
        )
        self._woken(woken)

    def remove(self, tenant: int) -> None:
        """A tenant was deleted: what is left of its deliveries is cancelled."""
        self.parts.directory.remove(tenant)
        self._woken(self.obligations.configure(tenant, (), ()))

    async def drain(self, seconds_max: float) -> None:
        """A clean end: commit what was taken in, let requests in flight end, record. No new ingest may come."""
        self.deliverer.stop()
        try:
            async with asyncio.timeout(seconds_max):
                await self.persister.drained()
                await self.deliverer.quiet()
        except TimeoutError:
            pass  # what is still in flight is sent again by the next owner
        await self.recorder.record()

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
    parts: TenureParts,
    shards: Iterable[TakenShard],
    configurations: list[TenantConfiguration],
    upkeep: Callable[[Tenure, asyncio.TaskGroup], Awaitable[None]],
) -> AsyncIterator[Tenure]:
    """Take up the shards and run the stages; inside the block the node ingests and delivers.

    Leaving the block ends every stage at once (see `Tenure.drain` for a clean end). A stage that fails ends the block.
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
        await _restore(tenure, list(shards), configurations, tenure._reader)  # noqa: SLF001
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
            await tenure.recorder.record()
            small, large = await connection("ingest"), await connection("ingest_large")
            tasks.create_task(until_lost(opened))
            tasks.create_task(tenure.recorder.run())
            tasks.create_task(tenure.catch_up.run())
            tasks.create_task(tenure.persister.run(small, large=False))
            tasks.create_task(tenure.persister.run(large, large=True))
            tenure.catch_up.start()
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


async def _restore(
    tenure: Tenure,
    shards: list[TakenShard],
    configurations: list[TenantConfiguration],
    connection: DedicatedConnection,
) -> None:
    """Read what the log says is open and owed."""
    obligations = tenure.obligations
    tenure.parts.directory.load(configurations)
    for configuration in configurations:
        obligations.configure(
            configuration.tenant.id, configuration.endpoints, configuration.subscriptions
        )
    configured = {configuration.tenant.id for configuration in configurations}
    tenants: defaultdict[int, list[int]] = defaultdict(list)
    for tenant, shard in await event_log.read_tenants(connection):
        tenants[shard].append(tenant)
        if tenant not in configured:  # deleted: what it is still owed is cancelled, not forgotten
            obligations.configure(tenant, (), ())
    for taken in shards:
        events = []
        if tenants[taken.shard]:
            events = await event_log.read_window(connection, tenants[taken.shard], taken.checkpoint)
        settled: set[tuple[int, int]] = set()
        if events:
            settled = await event_log.read_settled(connection, taken.shard, events[0][0])
        last = events[-1][0] if events else taken.checkpoint
        window = Window(taken.shard, taken.epoch, taken.checkpoint, taken.record_no, last)
        obligations.restore_window(window, events, settled)
    for counted in await owed.count(connection, [taken.shard for taken in shards]):
        obligations.restore_owed(
            counted.subscription, counted.tenant, counted.backlog, counted.retry_us
        )
