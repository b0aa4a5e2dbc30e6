"""The lease is trusted for less time than the database grants it, whatever the answer took."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import asyncpg
import pytest
from tests.support.node import RunningNode, event, soon, until
from tests.support.postgres import Database
from tests.support.receiver import Receiver
from tests.support.storage import BOOT, OTHER_BOOT

from outrider_server.pipeline.clock import DatabaseClock
from outrider_server.storage import shards
from outrider_server.storage.shards import LeaseLost
from outrider_server.upkeep.lease import INCUMBENT_CHECK_SECONDS, Lease, ShardsLost


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
        address=lambda: "a:1",
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


async def never(_: float) -> bool:
    raise AssertionError("there is nothing to wait for")


async def begin(lease: Lease, connection: asyncpg.Connection) -> None:
    assert await lease.begin(connection, never, lambda _: None)


async def take(connection: asyncpg.Connection, lease: Lease, *numbers: int) -> dict[int, int]:
    """The epochs of these shards, taken under this lease."""
    view = await shards.look(connection)
    taken = await shards.take(
        connection,
        lease.node,
        lease.boot,
        [view.shards[number] for number in numbers],
        orderly=False,
        crash_seconds=60,
    )
    return {each.shard: each.epoch for each in taken}


async def test_it_holds_until_the_margin_before_its_end(connection: asyncpg.Connection) -> None:
    clock = Clock()
    lease = lease_of(clock)
    assert not lease.holds()
    await begin(lease, connection)
    assert lease.remaining_seconds() == 7
    clock.now += 6.9
    assert lease.holds()
    clock.now += 0.1
    assert not lease.holds()
    assert lease.remaining_seconds() == 0
    await lease.renew(connection, dict)
    assert lease.holds()
    await lease.end(connection)
    clock.now = 0
    assert not lease.holds()
    assert (await shards.look(connection)).nodes[0].live is False


class Slow:
    """A connection whose answers take seconds."""

    def __init__(self, connection: asyncpg.Connection, clock: Clock, seconds: float = 2) -> None:
        self._connection = connection
        self._clock = clock
        self._seconds = seconds

    def __getattr__(self, name: str) -> object:
        self._clock.now += self._seconds
        return getattr(self._connection, name)


async def test_a_slow_answer_does_not_lengthen_it(connection: asyncpg.Connection) -> None:
    clock = Clock()
    lease = lease_of(clock)
    before = clock.now
    await begin(lease, Slow(connection, clock))
    assert clock.now > before + 2
    assert lease._deadline <= before + 2 + 7, "counted from before it was asked for"
    for answer_seconds in (2, 9):
        before = clock.now
        await lease.renew(Slow(connection, clock, answer_seconds), dict)
        assert clock.now > before + answer_seconds
        assert lease._deadline == before + 7
    assert not lease.holds(), "an answer that came after all of it is no lease"


async def test_it_is_renewed_and_lost_to_another_boot(connection: asyncpg.Connection) -> None:
    clock = Clock()
    lease = lease_of(clock)
    await begin(lease, connection)
    clock.now += 50
    renewing = asyncio.ensure_future(lease.run(connection, dict))
    await until(lease.holds)
    renewing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await renewing
    await connection.execute("UPDATE node SET boot = $1", OTHER_BOOT)
    with pytest.raises(LeaseLost):
        await soon(lease.run(connection, dict))
    with pytest.raises(LeaseLost):
        await begin(lease, connection)
    # A boot that never was the node takes its place.
    third = lease_of(clock, "22222222-0000-0000-0000-000000000003")
    await begin(third, connection)
    assert third.holds()
    # Where nobody took its place it begins again, like after a lost connection.
    await begin(third, connection)


async def test_a_renewal_keeps_what_memory_stands_for(connection: asyncpg.Connection) -> None:
    clock = Clock()
    lease = lease_of(clock)
    await begin(lease, connection)
    held = await take(connection, lease, 3, 9)
    clock.now += 1
    await lease.renew(connection, lambda: held)
    assert lease.remaining_seconds() == 7
    # A shard that the log gives to this node, but that it has not taken up yet, is no loss.
    await lease.renew(connection, lambda: {3: held[3]})
    assert lease.holds()


@pytest.mark.parametrize(
    "change",
    [
        "node = 'two', epoch = epoch + 1",
        "epoch = epoch + 1",  # let go of by somebody: to be taken anew
        "node = NULL, released = true",
    ],
)
async def test_a_shard_that_another_took_ends_the_trust_at_once(
    connection: asyncpg.Connection, change: str
) -> None:
    lease = lease_of(Clock())
    await begin(lease, connection)
    held = await take(connection, lease, 3, 9)
    await connection.execute(f"UPDATE shard SET {change} WHERE shard = 9")
    with pytest.raises(ShardsLost, match="took 1 of this node's shards"):
        await lease.renew(connection, lambda: held)
    assert not lease.holds()
    # It is still the node: the next tenure takes its own up again.
    await begin(lease, connection)
    assert lease.holds()


async def test_what_is_handed_off_while_it_is_renewed_is_not_lost(
    connection: asyncpg.Connection,
) -> None:
    lease = lease_of(Clock())
    await begin(lease, connection)
    held = await take(connection, lease, 3, 9)
    asked: list[dict[int, int]] = []

    def memory() -> dict[int, int]:
        asked.append({3: held[3]} if asked else held)  # 9 went in between
        return asked[-1]

    await shards.release(connection, lease.node, [(9, held[9], "two")])
    await lease.renew(connection, memory)
    assert lease.holds()
    assert len(asked) == 2


async def test_what_is_taken_while_it_is_renewed_is_no_loss(
    connection: asyncpg.Connection,
) -> None:
    """It was not there yet when the renewal was asked for."""
    lease = lease_of(Clock())
    await begin(lease, connection)
    held = await take(connection, lease, 3)
    asked: list[dict[int, int]] = []

    def memory() -> dict[int, int]:
        asked.append({3: held[3], 9: 77} if asked else held)
        return asked[-1]

    await lease.renew(connection, memory)
    assert lease.holds()


async def test_a_node_that_drains_says_so_with_its_renewal(
    connection: asyncpg.Connection,
) -> None:
    lease = lease_of(Clock())
    await begin(lease, connection)
    assert (await shards.look(connection)).nodes[0].takes
    lease.draining = True
    await lease.renew(connection, dict)
    assert not (await shards.look(connection)).nodes[0].takes


async def test_the_clock_of_the_database_is_measured_with_each_renewal(
    connection: asyncpg.Connection,
) -> None:
    offsets = []
    behind_us = 3_600_000_000
    clock = DatabaseClock(lambda: time.time_ns() // 1000 - behind_us)
    lease = Lease(
        node="one",
        boot=BOOT,
        address=lambda: "a:1",
        lease_seconds=10,
        renew_seconds=3,
        margin_seconds=3,
        clock=clock,
        monotonic=Clock(),
    )
    await begin(lease, connection)
    offsets.append(clock.now_us())
    behind_us *= 2  # the machine's clock was set back
    await lease.renew(connection, dict)
    offsets.append(clock.now_us())
    now_us = time.time_ns() // 1000
    assert all(abs(now_us - each) < 60_000_000 for each in offsets)


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


async def test_a_name_is_refused_after_a_lease_while_its_process_lives_and_free_once_it_is_gone(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    clock = Clock()
    holder, newcomer = lease_of(clock), lease_of(clock, OTHER_BOOT)
    await begin(holder, other)

    async def nothing() -> None:
        pass

    waiting = Waiting(clock, *[nothing] * 200)
    began = clock.now
    with pytest.raises(LeaseLost, match=r"another process runs as node 'one'.* another node_name"):
        await newcomer.begin(connection, waiting.pause, waiting)
    assert 10 <= clock.now - began < 10.2
    assert set(waiting.told) == {"another process runs as this node"}
    row = await connection.fetchrow("SELECT boot::text FROM node")
    assert row["boot"] == BOOT, "the holder keeps its place"
    assert not newcomer.holds()

    waiting = Waiting(clock, other.close, *[lambda: asyncio.sleep(0.01)] * 90)
    assert await newcomer.begin(connection, waiting.pause, waiting)
    assert newcomer.holds()


async def test_a_stop_ends_the_waiting_for_a_name(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    clock = Clock()
    holder, newcomer = lease_of(clock), lease_of(clock, OTHER_BOOT)
    await begin(holder, other)
    waiting = Waiting(clock)
    assert not await newcomer.begin(connection, waiting.pause, waiting)
    assert not newcomer.holds()
    assert waiting.pauses == [INCUMBENT_CHECK_SECONDS]
    # Another node's name it need not wait for.
    await begin(lease_of(clock, OTHER_BOOT, node="two"), connection)


async def test_a_lease_that_was_ended_needs_no_waiting_though_its_process_is_still_there(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    clock = Clock()
    holder = lease_of(clock)
    await begin(holder, other)
    await holder.end(other)
    await begin(lease_of(clock, OTHER_BOOT), connection)


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
