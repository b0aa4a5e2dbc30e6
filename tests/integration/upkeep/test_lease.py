"""The lease is trusted for less time than the database grants it, whatever the answer took."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

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


def lease_of(clock: Clock, boot: str = BOOT, renew_seconds: float = 0.001) -> Lease:
    return Lease(
        node="one",
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
