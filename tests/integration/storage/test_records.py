"""A record is written whole or not at all, and only by the node whose memory continues the log."""

from __future__ import annotations

import asyncpg
import pytest
from tests.support.storage import (
    attempt,
    dead,
    make_partitions,
    make_tenant,
    owed,
    plan,
    sequences,
    take,
)

from outrider_server.policy.obligations import RecordPlan, ShardRecord
from outrider_server.storage import records
from outrider_server.storage.records import RecordConflict
from outrider_server.storage.shards import FENCED, TakenShard

Taken = dict[int, TakenShard]


@pytest.fixture
async def taken(connection: asyncpg.Connection) -> Taken:
    await make_partitions(connection)
    await make_tenant(connection)
    return await take(connection)


async def write(connection: asyncpg.Connection, record: RecordPlan, at: int) -> None:
    await records.write(connection, record, lambda shard: (at >> 10 << 10) + shard)


async def counts(connection: asyncpg.Connection) -> tuple[int, ...]:
    row = await connection.fetchrow(
        "SELECT (SELECT count(*) FROM attempt), (SELECT count(*) FROM dead_letter),"
        " (SELECT count(*) FROM owed), (SELECT count(*) FROM ledger)"
    )
    return tuple(row)


async def test_a_record_writes_all_of_its_plan(
    connection: asyncpg.Connection, taken: Taken
) -> None:
    one, two, three, four = sequences(4)
    await write(
        connection,
        plan(
            ShardRecord(5, taken[5].epoch, 1, two, {1: 4}, {1: 1}, {1: 1}, {2: 1}),
            ShardRecord(6, taken[6].epoch, 1, one),
            attempts=[attempt(1, 5, (one, 1), (two, 2))],
            dead_letters=[dead(1, 5, 1, two), dead(2, 5, 1, two, cancelled=True)],
            owed_inserts=[
                owed(1, 5, 1 << 20, 1, two, three, four),
                owed(1, 5, (1 << 20) + 1, 2, two, due_us=99, attempts=2),
                owed(1, 6, 1 << 20, 1, three),
            ],
        ),
        four,
    )
    assert await counts(connection) == (1, 2, 3, 1)
    shard = await connection.fetchrow("SELECT checkpoint, record_no FROM shard WHERE shard = 5")
    assert tuple(shard) == (two, 1)
    ledger = await connection.fetchrow("SELECT * FROM ledger")
    assert ledger["tenants"] == [1, 2]
    assert [ledger[name] for name in ("matched", "delivered", "dead", "cancelled")] == [
        [4, 0],
        [1, 0],
        [1, 0],
        [0, 1],
    ]
    assert ledger["at"] >= four
    await write(
        connection,
        plan(
            ShardRecord(5, taken[5].epoch, 2, three),
            ShardRecord(6, taken[6].epoch, 2, three),
            owed_updates=[(5, 1 << 20, (three, four))],
            owed_deletes=[(6, 1 << 20), (5, (1 << 20) + 1)],
        ),
        four,
    )
    rows = await connection.fetch("SELECT shard, first_sequence, sequences FROM owed")
    assert [tuple(row) for row in rows] == [(5, three, [three, four])]
    assert await counts(connection) == (1, 2, 1, 1)


@pytest.mark.parametrize("number", [0, 1, 3])
async def test_a_number_that_does_not_follow_writes_nothing(
    connection: asyncpg.Connection, taken: Taken, number: int
) -> None:
    (one,) = sequences(1)
    await write(connection, plan(ShardRecord(5, taken[5].epoch, 1, one)), one)
    with pytest.raises(RecordConflict):
        await write(
            connection,
            plan(
                ShardRecord(4, taken[4].epoch, 1, one),
                ShardRecord(5, taken[5].epoch, number, one),
                attempts=[attempt(1, 4, (one, 1))],
                owed_inserts=[owed(1, 4, 1, 1, one)],
            ),
            one,
        )
    assert await counts(connection) == (0, 0, 0, 0)
    assert await connection.fetchval("SELECT record_no FROM shard WHERE shard = 4") == 0
    # The connection is of further use.
    await write(connection, plan(ShardRecord(5, taken[5].epoch, 2, one)), one)


async def test_an_older_epoch_writes_nothing(connection: asyncpg.Connection, taken: Taken) -> None:
    (one,) = sequences(1)
    with pytest.raises(asyncpg.PostgresError) as caught:
        await write(
            connection,
            plan(ShardRecord(5, taken[5].epoch - 1, 1, one), attempts=[attempt(1, 5, (one, 1))]),
            one,
        )
    assert caught.value.sqlstate == FENCED
    await connection.execute("ROLLBACK")
    assert await counts(connection) == (0, 0, 0, 0)
