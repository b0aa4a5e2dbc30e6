"""Partitions are there before they are needed, leave no gap when their width changes, and go without anybody waiting."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import asyncpg
import pytest
from tests.support.storage import made_event, make_partitions, make_tenant, now_us, store

from outrider_server.domain.sequence import sequence_of
from outrider_server.storage import partitions
from outrider_server.storage.partitions import HOUR_US, LockNotHad, PartitionedTable, missing

MORNING_US = int(datetime(2026, 3, 1, 10, 30, tzinfo=UTC).timestamp()) * 1_000_000
DAY, HOUR = PartitionedTable("event", 24), PartitionedTable("event", 1)
LOCK_MS = 100


async def ensure(connection: Any, table: PartitionedTable, at_us: int, ahead: int) -> int:
    return await partitions.ensure(connection, table, at_us, ahead, LOCK_MS)


async def ranges(connection: Any, table: str = "event") -> list[tuple[float, float]]:
    """Partitions as hours around the morning."""
    found = await partitions.existing(connection, table)
    return [
        ((p.first / 1024 - MORNING_US) / HOUR_US, (p.end / 1024 - MORNING_US) / HOUR_US)
        for p in found
    ]


async def test_every_table_gets_the_moments_partition_one_before_and_some_ahead(
    connection: asyncpg.Connection,
) -> None:
    for table in partitions.partitioned_tables(24):
        assert await ensure(connection, table, MORNING_US, 2) == 4
        assert await ensure(connection, table, MORNING_US, 2) == 0
        assert await ensure(connection, table, MORNING_US + int(table.hours * HOUR_US), 2) == 1
        found = await ranges(connection, table.name)
        assert all(end == start for (_, end), (start, _) in pairwise(found))
    assert await ranges(connection) == [(-34.5 + 24 * i, -10.5 + 24 * i) for i in range(5)]
    names = [p.name for p in await partitions.existing(connection, "event")]
    assert names[1] == "event_p20260301_000000"


@pytest.mark.parametrize(("before", "after"), [(DAY, HOUR), (HOUR, DAY)], ids=["narrow", "wide"])
async def test_a_change_of_width_leaves_no_gap(
    connection: asyncpg.Connection, before: PartitionedTable, after: PartitionedTable
) -> None:
    tenant = await make_tenant(connection)
    await ensure(connection, before, MORNING_US, 3)
    for moment in range(0, 60 * 100, 5):  # as rounds every five minutes over four days
        at_us = MORNING_US + moment * 60_000_000
        if moment % 60 == 0:
            await ensure(connection, after, at_us, 3)
            await store(connection, made_event(tenant, sequence_of(at_us, 5)))
    found = await ranges(connection)
    assert all(end == start for (_, end), (start, _) in pairwise(found))


def test_what_is_missing_of_a_range_is_every_gap_of_it() -> None:
    def have(*bounds: tuple[int, int]) -> list[partitions.Partition]:
        return [partitions.Partition("t", "n", first, end) for first, end in bounds]

    assert missing(10, 20, have()) == [(10, 20)]
    assert missing(10, 20, have((0, 10), (20, 30))) == [(10, 20)]
    assert missing(10, 20, have((0, 12), (14, 15), (18, 30))) == [(12, 14), (15, 18)]
    assert missing(10, 20, have((10, 20))) == missing(10, 20, have((0, 30))) == []
    assert missing(10, 20, have((12, 14))) == [(10, 12), (14, 20)]


async def test_a_dropped_ledger_partition_lives_on_in_the_sum(
    connection: asyncpg.Connection,
) -> None:
    table = PartitionedTable("ledger", 24)
    await ensure(connection, table, MORNING_US, 1)
    at = sequence_of(MORNING_US, 5)
    for number, tenants in enumerate(([1, 2], [1])):
        await connection.execute(
            "INSERT INTO ledger VALUES ($1, 5, $2, $3, $4, $4, $4, $4)",
            at,
            number,
            tenants,
            [10 * t + number for t in tenants],
        )
    await connection.execute("INSERT INTO ledger_sum VALUES (1, 100, 200, 300, 400)")
    day = (await partitions.existing(connection, "ledger"))[1]
    assert await partitions.drop(connection, day, LOCK_MS)
    rows = await connection.fetch("SELECT * FROM ledger_sum ORDER BY tenant")
    assert [tuple(row) for row in rows] == [(1, 121, 221, 321, 421), (2, 20, 20, 20, 20)]
    assert len(await partitions.existing(connection, "ledger")) == 2


async def test_who_publishes_does_not_wait_for_a_drop_nor_a_new_partition(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    await make_partitions(connection)
    tenant = await make_tenant(connection)
    (_, day, _) = await partitions.existing(connection, "event")
    async with other.transaction():
        await other.copy_records_to_table(
            "event",
            records=[
                (tenant, sequence_of(now_us(), 5), 5, "a", 0, [], 1, b"1"),
            ],
            columns=("tenant", "sequence", "shard", "type", "time_us", "targets", "config_version", "data"),
        )  # fmt: skip
        assert not await partitions.drop(connection, day, LOCK_MS)
        with pytest.raises(LockNotHad):
            await ensure(connection, DAY, now_us(), 2)
    assert await ensure(connection, DAY, now_us(), 2) == 1
    assert await partitions.drop(connection, day, LOCK_MS)


async def test_sizes_tell_each_partition_with_its_indexes(connection: asyncpg.Connection) -> None:
    await make_partitions(connection)
    tenant = await make_tenant(connection)
    before = await partitions.sizes(connection, "event")
    await store(
        connection,
        *(made_event(tenant, sequence_of(now_us() + i, 5), data=b"1" * 1000) for i in range(100)),
    )
    after = await partitions.sizes(connection, "event")
    assert [p for p, _ in after] == [p for p, _ in before]
    assert [a - b > 50_000 for (_, a), (_, b) in zip(after, before, strict=True)] == [
        False,
        True,
        False,
    ]


async def test_revisions_are_forgotten_once_a_later_one_is_older_than_what_is_kept(
    connection: asyncpg.Connection,
) -> None:
    tenant = await make_tenant(connection)
    endpoint = await connection.fetchval(
        "INSERT INTO endpoint (tenant, name, settings, sealed) VALUES ($1, 'e', '{}', '') RETURNING id",
        tenant,
    )
    subscription = await connection.fetchval(
        "INSERT INTO subscription (tenant, name, endpoint, types) VALUES ($1, 's', $2, '{}') RETURNING id",
        tenant,
        endpoint,
    )
    today = datetime.now(UTC)
    for version in range(1, 5):
        at = today - timedelta(days=40 - 10 * version)  # 30, 20, 10, 0 days back
        await connection.execute(
            "INSERT INTO subscription_revision VALUES ($1, $2, $3, 1, 1, '{}', '', NULL, $4)",
            subscription,
            version,
            tenant,
            at,
        )
        await connection.execute(
            "INSERT INTO endpoint_revision VALUES ($1, $2, $3, 1, 1, '{}', '', $4)",
            endpoint,
            version,
            tenant,
            at,
        )
    await partitions.forget_revisions(connection, today - timedelta(days=15))
    for table in ("subscription_revision", "endpoint_revision"):
        rows = await connection.fetch(f"SELECT version FROM {table} ORDER BY 1")
        assert [row["version"] for row in rows] == [2, 3, 4]
