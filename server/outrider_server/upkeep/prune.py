"""Prune: partitions are made ahead, and dropped once retention is over and nothing is owed below their end.

Rules:
- A missing partition must never happen: they are made days ahead, and a start makes them before it takes anything in.
- What retention ends is told: deliveries still owed become dead letters with the reason `expired`, in records.
- Dropping waits for no publisher: a lock that is not had at once is asked for again at the next round.
- Every node ends what its own shards owe; the one that holds shard 0 drops, once no shard owes anything below, and only
  while each shard has an owner who keeps its window short. It knows no window but its own: what another's may still hold
  is left alone for many times as long as a window gets.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from outrider_server.domain.sequence import SEQUENCE_MAX, sequence_of
from outrider_server.pipeline.clock import DatabaseClock
from outrider_server.pipeline.persist import FRAME_ANSWER_SECONDS
from outrider_server.pipeline.record import Recorder
from outrider_server.policy.obligations import Obligations
from outrider_server.storage import owed, partitions
from outrider_server.storage.database import Connection
from outrider_server.storage.partitions import PartitionedTable
from outrider_server.telemetry.counters import PruneCounters

AHEAD = 3
LEADER = 0
"""Whoever holds this shard drops partitions."""

INTERVAL_SECONDS = 300.0
LOCK_MS_MAX = 100
EXPIRE_PAGE_ROWS = 200
WINDOW_SECONDS = 60.0
WINDOWS_KEPT = 10
"""Windows' lengths back from now of which nothing is dropped."""

FRAME_ANSWER_HOURS = FRAME_ANSWER_SECONDS / 3600
"""How long frames' answers are kept."""


@dataclass(frozen=True, slots=True)
class Retention:
    """How long events are kept: `days`, or less where they would exceed `bytes_max` (0: no such bound).

    `idempotency_hours`: how long idempotency keys are kept.
    """

    days: float = 90.0
    bytes_max: int = 0
    partition_hours: float = 24.0
    idempotency_hours: float = 24.0


class Pruner:
    """Makes and drops partitions over one connection. `window_seconds`: how old windows get."""

    def __init__(
        self,
        *,
        connection: Connection,
        clock: DatabaseClock,
        retention: Retention,
        counters: PruneCounters,
        window_seconds: float = WINDOW_SECONDS,
    ) -> None:
        self._connection = connection
        self._clock = clock
        self.retention = retention
        self._counters = counters
        self._kept_hours = WINDOWS_KEPT * window_seconds / 3600
        self._tables = partitions.partitioned_tables(retention.partition_hours)

    async def make_ahead(self) -> None:
        """Make every partition that the next hours and days need; raises `LockNotHad` where somebody is in the way."""
        now_us = self._clock.now_us()
        for table in self._tables:
            self._counters.partitions_created += await partitions.ensure(
                self._connection, table, now_us, AHEAD, LOCK_MS_MAX
            )

    async def run(self, obligations: Obligations, recorder: Recorder) -> None:
        """Prune for ever."""
        while True:
            await asyncio.sleep(INTERVAL_SECONDS)
            try:
                await self.make_ahead()
            except partitions.LockNotHad as error:  # there are some left
                structlog.get_logger().warning("prune.lock_not_had", table=str(error))
            await self.drop_ended(obligations, recorder)

    async def drop_ended(self, obligations: Obligations, recorder: Recorder) -> None:
        """Expire what is owed below the end of retention, then drop what lies wholly below it."""
        end = await self._retention_end()
        await self._expire(obligations, recorder, end)
        if LEADER not in obligations.windows:
            return
        safe = min(
            (window.checkpoint for window in obligations.windows.values() if len(window)),
            default=SEQUENCE_MAX,
        )
        safe = min(safe, await partitions.oldest_needed(self._connection))
        for table in self._tables:
            if table.name == "producer_frame":
                until = self._hours_back(FRAME_ANSWER_HOURS)
            elif table.name == "idempotency":
                until = self._hours_back(self.retention.idempotency_hours)
            else:
                until = min(end, safe)
            await self._drop(table, until)
        await partitions.forget_revisions(
            self._connection, datetime.fromtimestamp((end >> 10) / 1e6, UTC)
        )

    async def _expire(self, obligations: Obligations, recorder: Recorder, end: int) -> None:
        shards = list(obligations.windows)
        while True:
            look = obligations.look()
            rows = await owed.find_below(self._connection, shards, end, EXPIRE_PAGE_ROWS)
            # What is not ended here is in memory, on its way.
            if not obligations.end_rows(look, rows, expired_below=end):
                return
            await recorder.record()

    async def _drop(self, table: PartitionedTable, until: int) -> None:
        until = min(until, self._hours_back(self._kept_hours))
        for partition in await partitions.existing(self._connection, table.name):
            if partition.end > until:
                return
            if not await partitions.drop(self._connection, partition, LOCK_MS_MAX):
                structlog.get_logger().warning("prune.lock_not_had", partition=partition.name)
                return
            self._counters.partitions_dropped += 1

    async def _retention_end(self) -> int:
        """The sequence below which nothing needs to be kept."""
        end = self._hours_back(max(self.retention.days * 24, self._kept_hours))
        if self.retention.bytes_max:
            kept = 0
            sizes = await partitions.sizes(self._connection, "event")
            over = self._hours_back(self._kept_hours)
            for partition, size in reversed(sizes):
                kept += size
                if kept > self.retention.bytes_max and partition.end <= over:
                    return max(end, partition.end)
        return end

    def _hours_back(self, hours: float) -> int:
        return sequence_of(self._clock.now_us() - int(hours * partitions.HOUR_US), 0)
