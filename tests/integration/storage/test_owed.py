"""Owed rows are found by subscription: those that wait for room in order, those that wait for a time when it has come."""

from __future__ import annotations

import asyncpg
import pytest
from tests.support.storage import make_partitions, owed, plan, sequences, take

from outrider_server.domain.delivery import OwedInsert
from outrider_server.policy.obligations import ShardRecord
from outrider_server.storage import owed as storage
from outrider_server.storage import records
from outrider_server.storage.owed import OwedCount

NAMED = sequences(12)


@pytest.fixture
async def rows(connection: asyncpg.Connection) -> list[OwedInsert]:
    await make_partitions(connection)
    taken = await take(connection)
    rows = [
        owed(1, 5, 1, 10, NAMED[4], NAMED[5]),
        owed(1, 5, 2, 10, NAMED[0]),
        owed(1, 5, 3, 11, NAMED[2]),
        owed(1, 5, 4, 10, NAMED[1], due_us=300, attempts=1),
        owed(1, 5, 5, 10, NAMED[3], due_us=100, attempts=2),
        owed(1, 5, 6, 11, NAMED[6], due_us=200, attempts=3),
        owed(2, 6, 1, 20, NAMED[7]),
    ]
    await records.write(
        connection,
        plan(
            ShardRecord(5, taken[5].epoch, 1, 0),
            ShardRecord(6, taken[6].epoch, 1, 0),
            owed_inserts=rows,
        ),
        lambda _: NAMED[-1],
    )
    return rows


def ids(found: list[storage.FoundRow]) -> list[int]:
    return [row.id for row in found]


async def test_the_backlog_comes_in_sequence_order_up_to_a_horizon(
    connection: asyncpg.Connection, rows: list[OwedInsert]
) -> None:
    found, horizon = await storage.find_backlog(connection, 5, [10, 11], [], 10)
    assert (ids(found), horizon) == ([2, 3, 1], None)
    assert found[2].sequences == [NAMED[4], NAMED[5]]
    assert (found[0].shard, found[0].tenant, found[0].subscription) == (5, 1, 10)
    found, horizon = await storage.find_backlog(connection, 5, [10, 11], [], 2)
    assert (ids(found), horizon) == ([2, 3], NAMED[2])
    found, horizon = await storage.find_backlog(connection, 5, [10, 11], [3, 2], 2)
    assert (ids(found), horizon) == ([1], None)
    assert await storage.find_backlog(connection, 5, [], [], 2) == ([], None)


async def test_retries_come_when_they_are_due_and_the_next_one_is_told(
    connection: asyncpg.Connection, rows: list[OwedInsert]
) -> None:
    found, following = await storage.find_retries(connection, 5, [10, 11], [], 10, 99)
    assert (ids(found), following) == ([], 100)
    found, following = await storage.find_retries(connection, 5, [10, 11], [], 10, 200)
    assert (ids(found), following) == ([5, 6], 300)
    assert [row.attempt for row in found] == [2, 3]
    found, following = await storage.find_retries(connection, 5, [10, 11], [5], 1, 999)
    assert (ids(found), following) == ([6], 300)
    found, following = await storage.find_retries(connection, 5, [10], [4, 5], 10, 999)
    assert (ids(found), following) == ([], None)


async def test_counts_tell_the_backlog_and_the_first_retry(
    connection: asyncpg.Connection, rows: list[OwedInsert]
) -> None:
    counts = await storage.count(connection, [5])
    assert sorted(counts, key=lambda c: c.subscription) == [
        OwedCount(5, 10, 1, 2, 100),
        OwedCount(5, 11, 1, 1, 200),
    ]
    assert await storage.count(connection, [6, 7]) == [OwedCount(6, 20, 2, 1, None)]
    assert await storage.total(connection, [5, 6]) == (8, 0)
    assert await storage.total(connection, [6, 7]) == (1, 0)
    assert await storage.total(connection, []) == (0, 0)


async def test_a_shards_rows_are_not_taken_for_anothers(
    connection: asyncpg.Connection, rows: list[OwedInsert]
) -> None:
    """A split tenant's subscription has rows in several shards, under numbers that may be equal."""
    await connection.execute(
        "INSERT INTO owed (shard, id, tenant, subscription, first_sequence, sequences, attempt, due_us, cause)"
        " SELECT 8, id, tenant, subscription, first_sequence, sequences, attempt, due_us, cause"
        " FROM owed WHERE subscription = 10"
    )
    for shard in (5, 8):
        found, _ = await storage.find_backlog(connection, shard, [10], [], 10)
        assert [(row.shard, row.id) for row in found] == [(shard, 2), (shard, 1)]
        found, following = await storage.find_retries(connection, shard, [10], [], 10, 200)
        assert [(row.shard, row.id) for row in found] == [(shard, 5)]
        assert following == 300
        of = await storage.find_of(connection, shard, 10, 10)
        assert {(row.shard, row.id) for row in of} == {(shard, n) for n in (1, 2, 4, 5)}
    found, following = await storage.find_retries(connection, 6, [10, 11], [], 10, 999)
    assert (found, following) == ([], None)
    counts = await storage.count(connection, [5, 8])
    assert {(c.shard, c.subscription): (c.backlog, c.retry_us) for c in counts} == {
        (5, 10): (2, 100),
        (5, 11): (1, 200),
        (8, 10): (2, 100),
    }


async def test_rows_of_a_subscription_and_rows_below_a_sequence_are_found(
    connection: asyncpg.Connection, rows: list[OwedInsert]
) -> None:
    assert sorted(ids(await storage.find_of(connection, 5, 10, 10))) == [1, 2, 4, 5]
    assert len(await storage.find_of(connection, 5, 10, 3)) == 3
    below = await storage.find_below(connection, [5], NAMED[3], 10)
    assert sorted(ids(below)) == [2, 3, 4]
    assert await storage.find_below(connection, [6], NAMED[3], 10) == []
    assert len(await storage.find_below(connection, [5], NAMED[3], 2)) == 2
