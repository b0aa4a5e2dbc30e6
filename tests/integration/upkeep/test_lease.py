"""The lease is trusted for less time than the database grants it, whatever the answer took."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import asyncpg
import pytest
from tests.support.node import RunningNode, event, soon, until
from tests.support.postgres import Database
from tests.support.receiver import Receiver
from tests.support.storage import BOOT, OTHER_BOOT

from outrider_server.pipeline.clock import DatabaseClock
from outrider_server.storage.shards import LeaseLost
from outrider_server.upkeep.lease import Lease


class Clock:
    """A monotonic clock that a test turns."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lease_of(
    clock: Clock, boot: str = BOOT, renew_seconds: float = 0.001, node: str = "one"
) -> Lease:
    return Lease(
        node=node,
        boot=boot,
        address="a:1",
        lease_seconds=10,
        renew_seconds=renew_seconds,
        margin_seconds=3,
        clock=DatabaseClock(),
        monotonic=clock,
    )


@pytest.fixture
async def connection(database: Database) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database.dsn)
    yield connection
    await connection.close()


async def test_it_holds_until_the_margin_before_its_end(connection: asyncpg.Connection) -> None:
    clock = Clock()
    lease = lease_of(clock)
    assert not lease.holds()
    assert len(await lease.take_over(connection)) == 64
    assert lease.remaining_seconds() == 7
    clock.now += 6.9
    assert lease.holds()
    clock.now += 0.1
    assert not lease.holds()
    await lease.release(connection)
    clock.now = 0
    assert not lease.holds()


class Slow:
    """A connection whose answers take two seconds."""

    def __init__(self, connection: asyncpg.Connection, clock: Clock) -> None:
        self._connection = connection
        self._clock = clock

    def __getattr__(self, name: str) -> object:
        self._clock.now += 2
        return getattr(self._connection, name)


async def test_a_slow_answer_does_not_lengthen_it(connection: asyncpg.Connection) -> None:
    clock = Clock()
    lease = lease_of(clock)
    before = clock.now
    await lease.take_over(Slow(connection, clock))
    assert clock.now > before + 2
    assert lease.remaining_seconds() == max(0.0, before + 7 - clock.now)


async def test_it_is_renewed_and_lost_to_another_boot(connection: asyncpg.Connection) -> None:
    clock = Clock()
    lease = lease_of(clock)
    await lease.take_over(connection)
    clock.now += 50
    renewing = asyncio.ensure_future(lease.run(connection))
    await until(lease.holds)
    renewing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await renewing
    await connection.execute("UPDATE node SET boot = $1", OTHER_BOOT)
    with pytest.raises(LeaseLost):
        await soon(lease.run(connection))
    with pytest.raises(LeaseLost):
        await lease.take_over(connection)
    # A boot that never was the node takes its place.
    assert (
        len(await lease_of(clock, "22222222-0000-0000-0000-000000000003").take_over(connection))
        == 64
    )


class Waiting:
    """What a node waits for, and what happens meanwhile: `scripts` run one a pause; then it is to stop."""

    def __init__(self, clock: Clock, *scripts: Callable[[], Awaitable[object]]) -> None:
        self.told: list[str] = []
        self.pauses: list[float] = []
        self._clock = clock
        self._scripts = list(scripts)

    def __call__(self, problem: str) -> None:
        self.told.append(problem)

    async def pause(self, seconds: float) -> bool:
        self.pauses.append(seconds)
        self._clock.now += seconds
        if not self._scripts:
            return True
        await self._scripts.pop(0)()
        return False


@pytest.fixture
async def other(database: Database) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(
        database.dsn, server_settings={"application_name": "outrider/one/00000000/test"}
    )
    yield connection
    await connection.close()


async def test_it_is_a_nodes_turn_when_two_looks_found_a_lease_expired(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    clock = Clock()
    holder, newcomer = lease_of(clock), lease_of(clock, OTHER_BOOT, renew_seconds=3, node="two")
    await holder.take_over(other)

    async def expire() -> None:
        await other.execute("UPDATE node SET expires_at = now() - interval '1 s'")

    async def renew_and_expire() -> None:
        await other.execute("UPDATE node SET expires_at = now() - interval '1 ms'")

    async def renew() -> None:
        await other.execute("UPDATE node SET expires_at = now() + interval '1 h'")

    async def nothing() -> None:
        pass

    waiting = Waiting(clock, nothing, expire, renew, expire, renew_and_expire, nothing)
    assert await newcomer.turn(connection, waiting.pause, waiting)
    assert waiting.pauses == [3] * 6
    assert set(waiting.told) == {"another node holds the shards"}
    assert not await connection.fetch("SELECT FROM node WHERE name = 'two'"), "it took nothing yet"
    assert len(await newcomer.take_over(connection)) == 64


async def test_free_shards_are_taken_without_waiting_and_a_stop_ends_waiting(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    clock = Clock()
    holder, newcomer = lease_of(clock), lease_of(clock, OTHER_BOOT, node="two")
    waiting = Waiting(clock)
    assert await holder.turn(other, waiting.pause, waiting)
    await holder.take_over(other)
    assert await holder.turn(other, waiting.pause, waiting)
    assert waiting.pauses == []
    assert not await newcomer.turn(connection, waiting.pause, waiting)


async def test_a_name_is_refused_after_a_lease_while_its_process_lives_and_free_once_it_is_gone(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    clock = Clock()
    holder, newcomer = lease_of(clock), lease_of(clock, OTHER_BOOT)
    await holder.take_over(other)

    async def nothing() -> None:
        pass

    waiting = Waiting(clock, *[nothing] * 200)
    began = clock.now
    with pytest.raises(LeaseLost, match=r"another process runs as node 'one'.* another node_name"):
        await newcomer.turn(connection, waiting.pause, waiting)
    assert 10 <= clock.now - began < 10.2
    assert set(waiting.told) == {"another process runs as this node"}
    row = await connection.fetchrow("SELECT boot::text FROM node")
    assert row["boot"] == BOOT, "the holder keeps its place"

    waiting = Waiting(clock, other.close, *[lambda: asyncio.sleep(0.01)] * 90)
    assert await newcomer.turn(connection, waiting.pause, waiting)
    assert len(await newcomer.take_over(connection)) == 64


async def test_nothing_is_sent_while_the_lease_is_not_trusted(node: RunningNode) -> None:
    async with Receiver() as receiver:
        demo = await node.tenant()
        await demo.subscription(await demo.endpoint("hook", receiver.url("/hook")))
        lease = node.node._lease
        deadline, lease._deadline = lease._deadline, 0.0
        await demo.publish(*[event() for _ in range(5)])
        await demo.publish(event())
        await until(lambda: node.tenure.deliverer._turns)
        assert receiver.requests == []
        lease._deadline = deadline
        await soon(receiver.wait_for_deliveries(6))
