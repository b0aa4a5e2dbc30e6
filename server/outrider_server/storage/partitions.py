"""Partitions of the history tables: made ahead, dropped after retention.

Every partitioned table is cut by the sequence clock. Names tell where they begin (UTC): `event_p20261124_060000`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

import asyncpg

from outrider_server.domain.sequence import microseconds_of, sequence_of
from outrider_server.storage.database import Connection
from outrider_server.storage.queries import load

HOUR_US = 3_600_000_000


@dataclass(frozen=True, slots=True)
class PartitionedTable:
    """A table and the width of its partitions in hours."""

    name: str
    hours: float


def partitioned_tables(partition_hours: float) -> tuple[PartitionedTable, ...]:
    """Every partitioned table; the history's width is a setting, the look-up tables' is fixed by what a look-up costs."""
    return (
        PartitionedTable("event", partition_hours),
        PartitionedTable("attempt", partition_hours),
        PartitionedTable("dead_letter", partition_hours),
        PartitionedTable("ledger", partition_hours),
        PartitionedTable("producer_frame", 4),
        PartitionedTable("idempotency", 4),
    )


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition: sequences from `first` up to, not including, `end`."""

    table: str
    name: str
    first: int
    end: int


class LockNotHad(Exception):
    """A table's lock was not to be had in time: nobody who publishes shall wait for it."""


def wanted(table: PartitionedTable, now_us: int, ahead: int) -> list[tuple[int, int]]:
    """The ranges of the partition of the moment, the one before and `ahead` further ones."""
    width = int(table.hours * HOUR_US)
    start = now_us // width * width
    return [
        (sequence_of(start + i * width, 0), sequence_of(start + (i + 1) * width, 0))
        for i in range(-1, ahead + 1)
    ]


def missing(first: int, end: int, have: Iterable[Partition]) -> list[tuple[int, int]]:
    """What of a range no partition of `have`, oldest first, covers. There are several gaps where the width was changed."""
    gaps = []
    for other in have:
        if other.end <= first or other.first >= end:
            continue
        if first < other.first:
            gaps.append((first, other.first))
        first = max(first, other.end)
    if first < end:
        gaps.append((first, end))
    return gaps


async def existing(connection: Connection, table: str) -> list[Partition]:
    """A table's partitions, oldest first."""
    rows = await connection.fetch(
        """
        SELECT child.relname AS name,
            (regexp_match(pg_get_expr(child.relpartbound, child.oid), $$FROM \\('(-?\\d+)'\\) TO \\('(-?\\d+)'\\)$$)) AS bounds
        FROM pg_inherits JOIN pg_class AS child ON child.oid = inhrelid JOIN pg_class AS parent ON parent.oid = inhparent
        WHERE parent.relname = $1 AND parent.relnamespace = current_schema()::regnamespace
        """,
        table,
    )
    partitions = [
        Partition(table, row["name"], int(row["bounds"][0]), int(row["bounds"][1])) for row in rows
    ]
    return sorted(partitions, key=lambda p: p.first)


async def ensure(
    connection: Connection, table: PartitionedTable, now_us: int, ahead: int, lock_ms_max: int
) -> int:
    """Make what is missing of `wanted`; returns how many were made. Raises `LockNotHad`."""
    have = await existing(connection, table.name)
    made = 0
    for first, end in wanted(table, now_us, ahead):
        for gap in missing(first, end, have):
            try:
                await _create(connection, table.name, *gap, lock_ms_max)
            except asyncpg.LockNotAvailableError as error:
                raise LockNotHad(table.name) from error
            except (asyncpg.DuplicateTableError, asyncpg.UniqueViolationError):
                continue  # another node makes the same ones at the same moment
            made += 1
    return made


async def _create(
    connection: Connection, table: str, first: int, end: int, lock_ms_max: int
) -> None:
    start = datetime.fromtimestamp(microseconds_of(first) / 1_000_000, UTC)
    async with connection.transaction():
        await connection.execute(f"SET LOCAL lock_timeout = {int(lock_ms_max)}")
        await connection.execute(
            f'CREATE TABLE IF NOT EXISTS "{table}_p{start:%Y%m%d_%H%M%S}" PARTITION OF "{table}" '
            f"FOR VALUES FROM ({first}) TO ({end})"
        )


async def sizes(connection: Connection, table: str) -> list[tuple[Partition, int]]:
    """A table's partitions, oldest first, with their bytes on disk, indexes included."""
    found = await existing(connection, table)
    return [
        (p, await connection.fetchval("SELECT pg_total_relation_size($1::regclass)", f'"{p.name}"'))
        for p in found
    ]


async def forget_revisions(connection: Connection, before: datetime) -> None:
    """Forget revisions that were replaced before `before`, the start of what is kept."""
    await connection.execute(load("forget_subscription_revisions"), before)
    await connection.execute(load("forget_endpoint_revisions"), before)


async def drop(connection: Connection, partition: Partition, lock_ms_max: int) -> bool:
    """Drop a partition; False when its lock was not to be had in time: nobody who publishes shall wait for it."""
    try:
        await _drop(connection, partition, lock_ms_max)
    except asyncpg.LockNotAvailableError:
        return False
    return True


async def _drop(connection: Connection, partition: Partition, lock_ms_max: int) -> None:
    async with connection.transaction():
        await connection.execute(f"SET LOCAL lock_timeout = {int(lock_ms_max)}")
        if partition.table == "ledger":
            await connection.execute(
                f"""
                INSERT INTO ledger_sum (tenant, matched, delivered, dead, cancelled)
                SELECT t.tenant, sum(t.matched), sum(t.delivered), sum(t.dead), sum(t.cancelled)
                FROM "{partition.name}", unnest(tenants, matched, delivered, dead, cancelled)
                    AS t (tenant, matched, delivered, dead, cancelled)
                GROUP BY t.tenant
                ON CONFLICT (tenant) DO UPDATE SET matched = ledger_sum.matched + EXCLUDED.matched,
                    delivered = ledger_sum.delivered + EXCLUDED.delivered, dead = ledger_sum.dead + EXCLUDED.dead,
                    cancelled = ledger_sum.cancelled + EXCLUDED.cancelled
                """  # noqa: S608 - the name comes from the catalogue
            )
        await connection.execute(f'DROP TABLE "{partition.name}"')


async def oldest_needed(connection: Connection) -> int:
    """The sequence below which nothing is owed in any shard; 0 while a shard has no owner, for then nobody knows."""
    return int(await connection.fetchval(load("oldest_needed")))
