"""Rows for tests of storage: a tenant with a subscription, events, and records made by hand."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

import asyncpg

from outrider_server.domain.delivery import AttemptRow, Cause, DeadLetter, OwedInsert
from outrider_server.domain.event import EVENT_OVERHEAD_BYTES, Event
from outrider_server.domain.outcome import Verdict
from outrider_server.domain.sequence import SHARD_COUNT, sequence_of
from outrider_server.policy.obligations import RecordPlan, ShardRecord
from outrider_server.storage import event_log, partitions, shards
from outrider_server.storage.shards import TakenShard

BOOT = "00000000-0000-0000-0000-000000000001"
OTHER_BOOT = "11111111-0000-0000-0000-000000000002"


def now_us() -> int:
    return time.time_ns() // 1000


async def make_partitions(connection: asyncpg.Connection, at_us: int | None = None) -> None:
    """Partitions around a time, as a start makes them."""
    for table in partitions.partitioned_tables(24):
        await partitions.ensure(connection, table, at_us or now_us(), 1, 1000)


async def take(
    connection: asyncpg.Connection,
    node: str = "one",
    boot: str = BOOT,
    numbers: Collection[int] = range(SHARD_COUNT),
    *,
    orderly: bool = False,
    crash_seconds: float = 0.0,
) -> dict[int, TakenShard]:
    """Become a node and take what it gets of these shards, whatever it had before; those it got by number."""
    await shards.become(connection, node, boot, "a:1", 10.0)
    view = await shards.look(connection)
    taken = await shards.take(
        connection,
        node,
        boot,
        [shard for shard in view.shards if shard.shard in numbers],
        orderly=orderly,
        crash_seconds=crash_seconds,
    )
    return {each.shard: each for each in taken}


async def make_tenant(connection: asyncpg.Connection, name: str = "demo", shard: int = 5) -> int:
    """A tenant's number."""
    return int(
        await connection.fetchval(
            "INSERT INTO tenant (name, shard, shards) VALUES ($1, $2, ARRAY[$2::smallint])"
            " RETURNING id",
            name,
            shard,
        )
    )


def made_event(
    tenant: int, sequence: int, *targets: int, data: bytes = b"1", **texts: Any
) -> Event:
    """An event that has its sequence."""
    return Event(
        tenant,
        "sales.made",
        data,
        1_700_000_000_000_000,
        sequence=sequence,
        targets=targets,
        size=len(data) + EVENT_OVERHEAD_BYTES,
        **texts,
    )


async def store(connection: asyncpg.Connection, *events: Event) -> None:
    """Events in a transaction of their own, without a fence."""
    await event_log.begin(connection, [])
    await event_log.append(connection, events, [], [])
    await event_log.commit(connection)


def sequences(count: int, shard: int = 5, at_us: int | None = None) -> list[int]:
    """Sequences one microsecond apart."""
    first = at_us or now_us()
    return [sequence_of(first + i, shard) for i in range(count)]


def plan(*records: ShardRecord, **parts: Any) -> RecordPlan:
    """A record of these shards."""
    lists = ("attempts", "dead_letters", "owed_inserts", "owed_updates", "owed_deletes")
    return RecordPlan(
        list(records),
        **{name: parts.get(name, []) for name in lists},
        claimed=set(),
        rows=[],
    )


def attempt(
    tenant: int, shard: int, *named: tuple[int, int], verdict: int = Verdict.DELIVERED
) -> AttemptRow:
    """An attempt that carried (sequence, subscription) pairs."""
    return AttemptRow(
        shard, tenant, 1, 1, tuple(s for s, _ in named), tuple(t for _, t in named), 1, verdict, 200, 0, 1.5, "", b""
    )  # fmt: skip


def dead(
    tenant: int, shard: int, subscription: int, *of: int, cancelled: bool = False
) -> DeadLetter:
    """A dead letter."""
    return DeadLetter(shard, tenant, 1, subscription, of, 3, cancelled, "reason")


def owed(
    tenant: int,
    shard: int,
    row: int,
    subscription: int,
    *of: int,
    due_us: int = 0,
    attempts: int = 0,
) -> OwedInsert:
    """An owed row."""
    return OwedInsert(shard, row, tenant, subscription, of, attempts, due_us, Cause.LANE_FULL)
