"""Lease, takeover and fence: who holds a shard, and that nobody else writes to it."""

from __future__ import annotations

import asyncio
import time

import asyncpg
import pytest
from tests.support.postgres import Database
from tests.support.storage import BOOT, OTHER_BOOT, take

from outrider_server.storage import shards
from outrider_server.storage.shards import FENCED, LeaseLost


async def test_a_takeover_raises_every_epoch_and_keeps_the_rest(
    connection: asyncpg.Connection,
) -> None:
    first = await take(connection)
    assert sorted(first) == list(range(64))
    await connection.execute("UPDATE shard SET checkpoint = 7 << 10, record_no = 3 WHERE shard = 9")
    second = await take(connection)
    assert {shard: t.epoch - first[shard].epoch for shard, t in second.items()} == dict.fromkeys(
        range(64), 1
    )
    assert (second[9].checkpoint, second[9].record_no) == (7 << 10, 3)


async def test_another_node_gets_nothing_before_the_lease_ends_and_all_after(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    await take(connection)
    assert await take(other, "two", OTHER_BOOT) == {}
    await connection.execute(
        "UPDATE node SET expires_at = now() - interval '1 s' WHERE name = 'one'"
    )
    # Whoever still has a backend of the old owner open loses it.
    assert len(await take(other, "two", OTHER_BOOT)) == 64
    with pytest.raises(
        (asyncpg.PostgresConnectionError, asyncpg.InterfaceError, asyncpg.InternalClientError)
    ):
        await connection.execute("SELECT 1")


async def test_a_shard_that_another_took_meanwhile_is_left_to_it(
    connection: asyncpg.Connection, other: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = type(connection).fetch
    raced = []

    async def raced_fetch(self: asyncpg.Connection, query: str, *arguments: object) -> object:
        rows = await fetch(self, query, *arguments)
        if self is other and "LEFT JOIN node" in query and not raced:
            raced.append(len(rows))
            await take(connection)  # between the look and the locks
        return rows

    monkeypatch.setattr(asyncpg.Connection, "fetch", raced_fetch)
    assert await take(other, "two", OTHER_BOOT) == {}
    assert raced == [64]
    holders = await connection.fetch("SELECT DISTINCT node FROM shard")
    assert [row["node"] for row in holders] == ["one"]


async def test_the_fence_lets_the_owner_write_and_nobody_else(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    taken = await take(connection)
    await connection.execute(shards.fence_statement([(9, taken[9].epoch), (3, taken[3].epoch)]))
    await connection.execute("COMMIT")
    await connection.execute(shards.fence_statement([]))
    await connection.execute("COMMIT")
    await other.execute("UPDATE shard SET epoch = epoch + 1 WHERE shard = 3")
    with pytest.raises(asyncpg.PostgresError) as caught:
        await connection.execute(shards.fence_statement([(9, taken[9].epoch), (3, taken[3].epoch)]))
    assert caught.value.sqlstate == FENCED
    await connection.execute("ROLLBACK")


async def test_a_takeover_waits_for_transactions_under_the_fence(
    connection: asyncpg.Connection, other: asyncpg.Connection, database: Database
) -> None:
    taken = await take(connection)
    await connection.execute(shards.fence_statement([(9, taken[9].epoch)]))
    # The same boot, so that its own backends are not ended: what counts is the lock.
    taking = asyncio.ensure_future(take(other))
    watcher = await asyncpg.connect(database.dsn)
    deadline = time.monotonic() + 10
    while not await watcher.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
        assert time.monotonic() < deadline
    assert not taking.done()
    await connection.execute("COMMIT")
    assert (await taking)[9].epoch == taken[9].epoch + 1
    await watcher.close()


async def test_only_the_boot_that_holds_the_lease_renews_it(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    await take(connection)
    await shards.renew_lease(connection, "one", BOOT, "b:2", 20.0)
    row = await connection.fetchrow(
        "SELECT address, expires_at - now() > interval '15 s' AS long FROM node"
    )
    assert tuple(row) == ("b:2", True)
    await other.execute("UPDATE node SET boot = $1", OTHER_BOOT)
    with pytest.raises(LeaseLost):
        await shards.renew_lease(connection, "one", BOOT, "b:2", 20.0)
    with pytest.raises(LeaseLost):
        await shards.take_over(connection, "one", BOOT, "b:2", 20.0, again=True)
    # A release of one that lost it does not end the other's.
    await shards.release(connection, "one", BOOT)
    assert await connection.fetchval("SELECT expires_at > now() FROM node")


async def test_an_expired_lease_may_be_renewed_while_nobody_took_it(
    connection: asyncpg.Connection,
) -> None:
    await take(connection)
    await connection.execute("UPDATE node SET expires_at = now() - interval '1 h'")
    await shards.renew_lease(connection, "one", BOOT, "a:1", 10.0)
    assert await connection.fetchval("SELECT expires_at > now() FROM node")


async def test_a_release_frees_the_shards_at_once(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    await take(connection)
    await shards.release(connection, "one", BOOT)
    assert len(await take(other, "two", OTHER_BOOT)) == 64


async def test_the_clock_is_the_databases(connection: asyncpg.Connection) -> None:
    before = await connection.fetchval("SELECT clock_timestamp()")
    now_us = await shards.database_clock_us(connection)
    after = await connection.fetchval("SELECT clock_timestamp()")
    assert before.timestamp() <= now_us / 1e6 + 1e-5
    assert now_us / 1e6 <= after.timestamp() + 1e-5


async def test_an_incumbent_is_one_with_a_lease_and_connections(
    connection: asyncpg.Connection, other: asyncpg.Connection, database: Database
) -> None:
    async def incumbent(boot: str = OTHER_BOOT) -> bool:
        return await shards.has_incumbent(other, "one", boot)

    assert not await incumbent()
    await take(connection)
    assert await incumbent()  # by its connection's name, `connection` is of this boot
    assert not await incumbent(BOOT)
    await other.execute("UPDATE node SET expires_at = now() - interval '1 s'")
    assert not await incumbent()
    await other.execute("UPDATE node SET expires_at = now() + interval '1 h'")
    assert await incumbent()
    await other.execute("UPDATE node SET boot = '22222222-0000-0000-0000-000000000003'")
    assert not await incumbent()
    await other.execute("UPDATE node SET boot = $1", BOOT)
    await connection.close()
    async with asyncio.timeout(10):
        while await incumbent():  # a backend ends a moment after its connection
            await asyncio.sleep(0.01)


async def test_what_is_free_is_told_by_the_lease_it_was_held_under(
    connection: asyncpg.Connection,
) -> None:
    assert await shards.find_free(connection, "two") == shards.FreeShards(True, frozenset())
    await take(connection)
    assert await shards.find_free(connection, "one") == shards.FreeShards(True, frozenset())
    assert await shards.find_free(connection, "two") == shards.FreeShards(False, frozenset())
    await connection.execute("UPDATE node SET expires_at = now() - interval '1 s'")
    first = await shards.find_free(connection, "two")
    assert (first.unowned, len(first.expired)) == (False, 1)
    assert await shards.find_free(connection, "two") == first
    await connection.execute("UPDATE node SET expires_at = expires_at + interval '1 ms'")
    assert not (await shards.find_free(connection, "two")).expired & first.expired
    await connection.execute("DELETE FROM node")
    assert await shards.find_free(connection, "two") == shards.FreeShards(True, frozenset())
