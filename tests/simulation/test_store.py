"""The fake store: the few things of Postgres that the simulated code leans on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import asyncpg
import pytest
from tests.simulation import statements
from tests.simulation.loop import SimulationLoop
from tests.simulation.store import FakeConnection, Latency, NodeRow, ShardRow, Store

from outrider_server.storage.queries import load
from outrider_server.storage.shards import fence_statement


def with_store(test: Callable[[Store], Awaitable[Any]], seed: int = 1) -> Any:
    random = Random(seed)
    loop = SimulationLoop(random)
    broken: list[str] = []
    store = Store(loop, random, Latency(random, 0.0), broken.append)

    async def main() -> Any:
        result = await test(store)
        assert broken == []
        return result

    return loop.run(main())


async def connect(store: Store, role: str = "ingest", *, durable: bool = True) -> FakeConnection:
    connection = await store.connect(f"outrider/north/0000/{role}", None)
    if not durable:
        await connection.execute("SET synchronous_commit = off")
    return connection


async def set_frame(connection: FakeConnection, frame: int) -> None:
    await connection.fetch(load("set_producers"), ["p"], [0], [1], [frame])


async def set_and_fail(connection: FakeConnection) -> None:
    async with connection.transaction():
        await set_frame(connection, 2)
        await connection.execute("SELECT fence($1::smallint[], $2::bigint[])", [0], [9])


def test_every_twin_was_written_after_what_its_statement_says() -> None:
    changed = sorted(dict(statements.now().items() ^ statements.noted().items()))
    assert changed == [], (
        "these statements changed: look whether their twins in tests/simulation/store.py still do the same,"
        " then run python -m tests.simulation --note-statements"
    )


def test_a_transaction_is_seen_by_others_when_it_is_committed() -> None:
    async def test(store: Store) -> None:
        one = await connect(store)
        await one.execute("BEGIN")
        await set_frame(one, 1)
        assert store.tables["producer"] == {}
        await one.execute("COMMIT")
        assert store.tables["producer"] == {("p", 0): (1, 1)}

    with_store(test)


def test_a_takeover_waits_for_the_fences_under_way_and_ends_later_ones() -> None:
    async def test(store: Store) -> None:
        writer, taker = await connect(store), await connect(store, "moves")
        await writer.execute(fence_statement([(0, 0)]))
        async with taker.transaction():
            locking = asyncio.ensure_future(taker.execute(load("lock_shards"), [0]))
            await asyncio.sleep(5)
            assert not locking.done()
            await writer.execute("COMMIT")
            await locking
            await taker.fetch(load("take_shards"), [0], "south", False, 0.0)
        taken: ShardRow = store.tables["shard"][0]
        assert (taken.epoch, taken.node, taken.released) == (1, "south", False)
        with pytest.raises(asyncpg.PostgresError) as told:
            await writer.execute(fence_statement([(0, 0)]))
        assert told.value.sqlstate == "OR001"

    with_store(test)


def test_a_failed_transaction_does_nothing_and_commit_does_not_say_so() -> None:
    async def test(store: Store) -> None:
        one = await connect(store)
        await one.execute("BEGIN")
        await set_frame(one, 1)
        with pytest.raises(asyncpg.PostgresError):
            await one.execute("SELECT fence($1::smallint[], $2::bigint[])", [0], [9])
        with pytest.raises(asyncpg.InFailedSQLTransactionError):
            await set_frame(one, 2)
        assert await one.execute("COMMIT") == "ROLLBACK"
        assert store.tables["producer"] == {}

    with_store(test)


def test_a_savepoint_takes_back_what_came_after_it() -> None:
    async def test(store: Store) -> None:
        one = await connect(store)
        async with one.transaction():
            await set_frame(one, 1)
            with pytest.raises(asyncpg.PostgresError):
                await set_and_fail(one)
        assert store.tables["producer"] == {("p", 0): (1, 1)}

    with_store(test)


def test_a_crash_takes_back_asynchronous_commits_and_never_synchronous_ones() -> None:
    async def test(store: Store) -> int:
        lazy, strict = await connect(store, durable=False), await connect(store)
        await set_frame(strict, 1)
        await set_frame(lazy, 2)
        assert store.tables["producer"] == {("p", 0): (1, 2)}
        assert not store.is_durable("producer", ("p", 0))
        store.crash(0.1)
        frame: int = store.tables["producer"]["p", 0][1]
        await asyncio.sleep(0.1)
        assert lazy.is_closed()
        assert strict.is_closed()
        await connect(store)
        return frame

    assert {with_store(test, seed) for seed in range(20)} == {1, 2}


def test_a_synchronous_commit_makes_durable_what_was_committed_before_it() -> None:
    async def test(store: Store) -> None:
        lazy, strict = await connect(store, durable=False), await connect(store)
        await set_frame(lazy, 1)
        await strict.fetch(load("set_producers"), ["q"], [0], [1], [1])
        store.crash(0.1)
        assert store.tables["producer"] == {("p", 0): (1, 1), ("q", 0): (1, 1)}

    with_store(test)


def test_a_commit_whose_connection_breaks_may_hold_or_not() -> None:
    def breaking(runs: bool) -> Callable[[Store], Awaitable[bool]]:
        async def test(store: Store) -> bool:
            one = await connect(store)
            await one.execute("BEGIN")
            await set_frame(one, 1)
            store.breaks[store.statements + 1] = runs
            with pytest.raises(asyncpg.ConnectionDoesNotExistError):
                await one.execute("COMMIT")
            assert one.is_closed()
            return bool(store.tables["producer"])

        return test

    assert with_store(breaking(runs=True))
    assert not with_store(breaking(runs=False))


def test_a_backend_that_is_ended_gives_its_locks_back() -> None:
    async def test(store: Store) -> None:
        store.tables["node"]["north"] = NodeRow("boot", "a", -1.0)
        old, new = await connect(store), await store.connect("outrider/south/1111/moves", None)
        await old.execute(fence_statement([(0, 0)]))
        async with new.transaction():
            await new.execute(load("terminate_backends"), ["north"], "south", "1111")
            await new.execute(load("lock_shards"), [0])
        await asyncio.sleep(1)
        assert old.is_closed()

    with_store(test)


def test_one_statement_at_a_time_and_a_cancelled_one_ends_first() -> None:
    async def test(store: Store) -> None:
        one = await connect(store)
        asking = asyncio.ensure_future(set_frame(one, 1))
        await asyncio.sleep(0)
        with pytest.raises(asyncpg.InterfaceError):
            await set_frame(one, 2)
        asking.cancel()
        await asyncio.sleep(0)
        await set_frame(one, 3)
        assert store.tables["producer"] == {("p", 0): (1, 3)}

    for seed in range(20):
        with_store(test, seed)


def test_whoever_listens_is_told_at_the_commit() -> None:
    async def test(store: Store) -> None:
        heard: list[str] = []
        listening, telling = await connect(store), await connect(store)
        await listening.add_listener("news", lambda *args: heard.append(args[2]))
        async with telling.transaction():
            await telling.execute("SELECT pg_notify($1, '')", "news")
            await asyncio.sleep(1)
            assert heard == []
        await asyncio.sleep(1)
        assert heard == ["news"]

    with_store(test)
