"""What retention ends is counted before it is dropped, and nothing above the checkpoint is dropped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from tests.support.node import RunningNode, event, soon
from tests.support.postgres import Database
from tests.support.receiver import Behaviour, Receiver

from outrider.v1 import subscription_service_pb2
from outrider_server.domain.sequence import microseconds_of, shard_of
from outrider_server.pipeline.clock import DatabaseClock
from outrider_server.policy.checkpoint import Window
from outrider_server.policy.obligations import Limits, Obligations
from outrider_server.storage import partitions
from outrider_server.storage.partitions import HOUR_US
from outrider_server.upkeep.prune import LEADER, WINDOW_SECONDS, WINDOWS_KEPT, Pruner, Retention


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver() as receiver:
        yield receiver


class Later:
    """A pruner that lives some hours after now."""

    def __init__(self, node: RunningNode, connection: Any, hours: float, **retention: Any) -> None:
        clock = DatabaseClock(lambda: node.tenure.parts.clock.now_us() + int(hours * HOUR_US))
        self.node = node
        self.pruner = Pruner(
            connection=connection,
            clock=clock,
            retention=Retention(**retention),
            counters=node.tenure.parts.metrics.prune,
        )

    async def prune(self) -> None:
        tenure = self.node.tenure
        await self.pruner.make_ahead()
        await self.pruner.drop_ended(tenure.obligations, tenure.recorder)


@pytest.fixture
async def connection(database: Database) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database.dsn)
    yield connection
    await connection.close()


async def test_what_is_still_owed_when_retention_ends_is_a_dead_letter(
    node: RunningNode, receiver: Receiver, connection: asyncpg.Connection
) -> None:
    demo = await node.tenant()
    endpoint = await demo.endpoint("hook", receiver.url("/hook"))
    await demo.subscription(endpoint, "paused")
    await demo.admin.call(
        "PauseSubscription",
        subscription_service_pb2.PauseSubscriptionRequest(name="tenants/demo/subscriptions/paused"),
    )
    down = await demo.endpoint("down", receiver.url("/down"), retry={"base": "3600s"})
    await demo.subscription(down)
    receiver.always("/down", Behaviour(status=500))
    await demo.publish(*[event() for _ in range(300)])
    await soon(receiver.wait_for(300, "/down"))
    await node.balance_when(lambda b: b.owed == 600)
    early = Later(node, connection, 47, days=2)
    await early.prune()
    assert (await node.balance_when(lambda _: True)).owed == 600
    assert len(await node.stored()) == 300
    late = Later(node, connection, 24 * 4, days=2)
    await late.prune()
    balance = await node.balance_when(lambda b: b.owed == 0)
    assert (balance.matched, balance.dead) == (600, 600)
    assert await node.stored() == {}
    letters = await node.fetch("SELECT DISTINCT reason, verdict FROM dead_letter")
    # The letters themselves went with their day, or stand; the sum stays.
    assert [tuple(row) for row in letters] in ([], [("expired", 3)])
    await node.restart()
    await demo.publish(event())
    balance = await node.balance_when(lambda b: b.matched == 602)
    assert balance.dead == 600


async def test_events_above_the_checkpoint_are_kept(
    node: RunningNode, receiver: Receiver, connection: asyncpg.Connection
) -> None:
    demo = await node.tenant()
    await demo.subscription(await demo.endpoint("hook", receiver.url("/hook")))
    hold = asyncio.Event()
    receiver.always("/hook", Behaviour(hold=hold))
    await demo.publish(event())
    await soon(receiver.wait_for(1))
    assert (await node.balance_when(lambda b: b.window == 1)).owed == 0
    await Later(node, connection, 24 * 9, days=2).prune()
    assert len(await node.stored()) == 1
    hold.set()
    await node.balance_when(lambda b: b.delivered == 1)
    await Later(node, connection, 24 * 9, days=2).prune()
    assert await node.stored() == {}
    await node.balance_when(lambda b: b.delivered == 1 == b.matched)


async def test_the_oldest_days_go_when_the_bytes_are_too_many(
    node: RunningNode, connection: asyncpg.Connection
) -> None:
    demo = await node.tenant()
    await demo.publish(event(data=b'"%b"' % (b"x" * 200_000)))
    (sequence,) = await node.stored()

    def of_days(found: list[partitions.Partition]) -> list[bool]:
        return [p.first <= sequence < p.end for p in found]

    await Later(node, connection, 0, bytes_max=10_000_000).prune()
    assert any(of_days(await partitions.existing(connection, "event")))
    # Today's is never dropped, however large; on another day it goes.
    await Later(node, connection, 0, bytes_max=100_000).prune()
    assert any(of_days(await partitions.existing(connection, "event")))
    await Later(node, connection, 25, bytes_max=100_000).prune()
    assert not any(of_days(await partitions.existing(connection, "event")))
    assert await node.stored() == {}


async def test_a_partition_that_just_ended_is_kept_for_the_windows_of_other_nodes(
    node: RunningNode, receiver: Receiver, connection: asyncpg.Connection
) -> None:
    """The leader sees no window but its own, and an open event of another's needs its row to be sent."""
    await node.tenant("first")  # lives on the leader's shard
    demo = await node.tenant()
    await demo.subscription(await demo.endpoint("hook", receiver.url("/hook")))
    hold = asyncio.Event()
    receiver.always("/hook", Behaviour(hold=hold))
    await demo.publish(event())
    await soon(receiver.wait_for(1))
    await node.balance_when(lambda b: b.window == 1)
    (sequence,) = await node.stored()
    assert shard_of(sequence) != LEADER
    leader = Obligations(Limits())
    leader.windows[LEADER] = Window(LEADER, 1, 0, 0, 0)
    (partition,) = (
        p for p in await partitions.existing(connection, "event") if p.first <= sequence < p.end
    )
    now_us = node.tenure.parts.clock.now_us()

    async def kept(seconds: float, **retention: float) -> bool:
        hours = (microseconds_of(partition.end) - now_us) / HOUR_US + seconds / 3600
        pruner = Later(node, connection, hours, **retention).pruner
        await pruner.make_ahead()
        await pruner.drop_ended(leader, node.tenure.recorder)
        return partition in await partitions.existing(connection, "event")

    assert await kept(1, bytes_max=1)
    assert await kept(1, days=0.0)
    assert await kept(WINDOWS_KEPT * WINDOW_SECONDS - 20, bytes_max=1)
    assert len(await node.stored()) == 1
    assert not await kept(WINDOWS_KEPT * WINDOW_SECONDS + 1, bytes_max=1)
    hold.set()


async def test_keys_are_kept_for_their_hours_and_answers_for_a_day(
    node: RunningNode, connection: asyncpg.Connection
) -> None:
    demo = await node.tenant()
    async with demo.stream() as stream:
        await stream.open()
        await stream.publish(1, [event(idempotency_key="k")])

        async def kept() -> tuple[int, int]:
            row = await connection.fetchrow(
                "SELECT (SELECT count(*) FROM idempotency), (SELECT count(*) FROM producer_frame)"
            )
            return tuple(row)

        await Later(node, connection, 23, idempotency_hours=48).prune()
        assert await kept() == (1, 1)
        await Later(node, connection, 29, idempotency_hours=48).prune()
        assert await kept() == (1, 0)
        await Later(node, connection, 53, idempotency_hours=48).prune()
        assert await kept() == (0, 0)
    async with demo.stream() as stream:
        # A frame of so long ago is known, though its ids are not any more.
        await stream.open()
        ack = await stream.publish(1, [event(idempotency_key="k")])
        assert ack.duplicate
        assert not ack.ids
    assert len(await node.stored()) == 1
