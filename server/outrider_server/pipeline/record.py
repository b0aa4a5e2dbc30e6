"""Record: about every 100 ms, everything that came to an end, in one numbered transaction.

Rules:
- One record at a time; whoever wants the next waits for its commit.
- A record that fails leaves memory and log apart, and there is no way to tell how: the error rises, the tenure ends.
- Its commit may be asynchronous (the connection says so): losing it costs duplicates, never events.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from outrider_server.pipeline.clock import DatabaseClock
from outrider_server.policy.lane import Lane
from outrider_server.policy.obligations import Obligations
from outrider_server.policy.plans import RecordPlan
from outrider_server.storage import records
from outrider_server.storage.database import Connection
from outrider_server.telemetry.counters import LaneCounters, RecordCounters
from outrider_server.telemetry.logs import PipelineLog


class Recorder:
    """Writes records over one connection. `recorded` is called after each with the lanes that got owed rows."""

    def __init__(
        self,
        *,
        obligations: Obligations,
        connection: Connection,
        clock: DatabaseClock,
        record_time: Callable[[int], int],
        interval_seconds: float,
        recorded: Callable[[Iterable[Lane]], None],
        counters: RecordCounters,
        lanes: LaneCounters,
        log: PipelineLog,
        monotonic: Callable[[], float],
    ) -> None:
        self._obligations = obligations
        self._connection = connection
        self._clock = clock
        self._record_time = record_time
        self._interval_seconds = interval_seconds
        self._recorded = recorded
        self._counters = counters
        self._lanes = lanes
        self._log = log
        self._monotonic = monotonic
        self._lock = asyncio.Lock()

    async def run(self) -> None:
        """Record for ever."""
        while True:
            started = self._monotonic()
            await self.record()
            await asyncio.sleep(max(0.0, self._interval_seconds - (self._monotonic() - started)))

    async def record(self) -> bool:
        """Write one record; False when there was nothing to write."""
        async with self._lock:
            plan = self._obligations.plan_record(self._clock.now_us())
            if plan is None:
                self._recorded(())
                return False
            started = self._monotonic()
            try:
                await records.write(self._connection, plan, self._record_time)
            except BaseException:
                self._counters.failures += 1
                raise
            self._count(plan, self._monotonic() - started)
            self._recorded(self._obligations.recorded(plan))
            return True

    async def forget(self, shard: int, *, clean: bool = True) -> bool:
        """Forget a shard between two records, if memory holds nothing of it that the log does not say.

        With `clean` false it is forgotten whatever it holds: the next owner finds out what is still to be sent.
        """
        async with self._lock:
            if clean and not self._obligations.is_clean(shard):
                return False
            self._obligations.forget_shard(shard)
            return True

    def _count(self, plan: RecordPlan, seconds: float) -> None:
        counters = self._counters
        counters.records += 1
        for shard in plan.shards:
            counters.deliveries_delivered += sum(shard.delivered.values())
            counters.deliveries_dead += sum(shard.dead.values())
            counters.deliveries_cancelled += sum(shard.cancelled.values())
        counters.owed_inserted += len(plan.owed_inserts)
        counters.owed_removed += len(plan.owed_deletes)
        counters.commit_seconds.observe(seconds)
        self._log.log_batch(
            "record",
            events=sum(len(attempt.sequences) for attempt in plan.attempts),
            seconds=seconds,
            attempts=len(plan.attempts),
            shards=len(plan.shards),
            owed_inserted=len(plan.owed_inserts),
            owed_shrunk=len(plan.owed_updates),
            owed_removed=len(plan.owed_deletes),
            dead_letters=len(plan.dead_letters),
        )
        for insert in plan.owed_inserts:
            self._lanes.spilled.add(insert.cause.name.lower(), count=len(insert.sequences))
