"""What has no room in memory comes back from owed rows: all of it, once, and in order where the endpoint is healthy."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

from tests.support.node import RunningNode, TestTenant, event, running, soon, until
from tests.support.postgres import Database
from tests.support.receiver import Behaviour, Receiver

from outrider.v1 import subscription_service_pb2 as pb
from outrider_server.policy.lane import Lane


async def publish(tenant: TestTenant, count: int, size: int = 0) -> None:
    padding = b"x" * size
    async with tenant.stream() as stream:
        await stream.open("p", 1)
        frames = range(0, count, 200)
        for number, first in enumerate(frames, 1):
            events = [
                event(data=b'{"n": %d, "x": "%b"}' % (n, padding))
                for n in range(first, min(count, first + 200))
            ]
            await stream.send(number, events)
        for number in range(1, len(frames) + 1):
            await stream.ack(number)


def numbers(receiver: Receiver, path: str) -> list[int]:
    """The numbers of the events that a path took, in order of arrival."""
    return [
        delivery["data"]["n"]
        for request in receiver.on(path)
        if 200 <= request.answered <= 299
        for delivery in request.deliveries
    ]


async def test_lanes_of_ten_deliver_a_thousand_events_in_order(
    small_lanes: RunningNode, receiver: Receiver
) -> None:
    demo = await small_lanes.tenant()
    for name, fields in (
        ("single", {"concurrency": 1}),
        ("batch", {"concurrency": 1, "mode": "MODE_BATCH", "batch": {"eventsMax": 7}}),
    ):
        await demo.subscription(await demo.endpoint(name, receiver.url(f"/{name}"), **fields))
    await publish(demo, 1000)
    await soon(receiver.wait_until(lambda: len(receiver.delivered()) == 2000))
    balance = await small_lanes.balance_when(lambda b: b.delivered == 2000)
    assert (balance.matched, balance.owed, balance.window) == (2000, 0, 0)
    for path in ("/single", "/batch"):
        assert numbers(receiver, path) == list(range(1000))
    assert small_lanes.tenure.obligations.held_bytes == 0
    assert not await small_lanes.fetch("SELECT FROM owed")


async def test_failures_are_tried_again_until_the_receiver_recovers(
    small_lanes: RunningNode, receiver: Receiver
) -> None:
    demo = await small_lanes.tenant()
    await demo.subscription(await demo.endpoint("down", receiver.url("/down")))
    await demo.subscription(await demo.endpoint("up", receiver.url("/up"), concurrency=1))
    receiver.always("/down", Behaviour(status=503))
    await publish(demo, 300)
    # While one is down the other gets everything.
    await soon(receiver.wait_for_deliveries(300, "/up"))
    assert numbers(receiver, "/up") == list(range(300))
    await soon(receiver.wait_for(400, "/down"))
    receiver.always("/down", Behaviour())
    await soon(receiver.wait_for_deliveries(300, "/down"))
    balance = await small_lanes.balance_when(lambda b: b.delivered == 600)
    assert (balance.matched, balance.dead) == (600, 0)
    assert set(receiver.delivered("/down").values()) == {1}


async def test_many_retries_due_at_once_do_not_stop_the_loop(
    small_lanes: RunningNode, receiver: Receiver
) -> None:
    """More retries are due than the lane has room for, and it is full of ones that wait for an answer."""
    demo = await small_lanes.tenant()
    hold = asyncio.Event()
    endpoint = await demo.endpoint(
        "hook", receiver.url("/hook"), concurrency=3, mode="MODE_BATCH", batch={"eventsMax": 10}
    )
    await demo.subscription(endpoint)
    receiver.script("/hook", Behaviour(status=500), times=30)
    receiver.always("/hook", Behaviour(hold=hold))
    await publish(demo, 300)
    await soon(receiver.wait_for(33, "/hook"))
    catch_up, clock = small_lanes.tenure.catch_up, small_lanes.tenure.parts.clock
    await until(
        lambda: not any(row.retry and row.dirty for row in lane_of(small_lanes).rows.values())
    )
    rows = await small_lanes.fetch("SELECT max(due_us) AS last FROM owed")
    await until(lambda: clock.now_us() > rows[0]["last"])
    await until(lambda: not catch_up._retries)
    lane = lane_of(small_lanes)
    # Due retries wait, claimed or not: that depends on how much of the backlog came first.
    assert lane.wants_retries(clock.now_us()) or any(row.retry for row in lane.waiting_rows)
    await demo.publish(event(data=b'{"n": 300}'))
    hold.set()
    await soon(receiver.wait_for_deliveries(301, "/hook"))


def lane_of(node: RunningNode) -> Lane:
    """The one lane of a node."""
    (lane,) = node.tenure.obligations.lanes.values()
    return lane


async def test_a_policy_that_ends_leaves_dead_letters(
    node: RunningNode, receiver: Receiver
) -> None:
    demo = await node.tenant()
    retry = {"base": "0.01s", "factor": 1, "attemptsMax": 3, "jitter": 0}
    await demo.subscription(await demo.endpoint("hook", receiver.url("/hook"), retry=retry))
    receiver.always("/hook", Behaviour(status=500, body=b"\x00\xff broken"))
    await demo.publish(event(), event())
    balance = await node.balance_when(lambda b: b.dead == 2)
    assert (balance.matched, balance.delivered) == (2, 0)
    assert len(receiver.requests) == 6
    assert Counter(request.message_id for request in receiver.requests).most_common()[0][1] == 3
    dead = await node.fetch("SELECT reason, attempts, status FROM dead_letter")
    assert {tuple(row) for row in dead} == {("retry policy ended", 3, 500)}
    rows = await node.fetch("SELECT number, response FROM attempt ORDER BY number")
    assert [row["number"] for row in rows] == [1, 1, 2, 2, 3, 3]
    assert {row["response"] for row in rows} == {b"\x00\xff broken"}


async def test_hostile_answers_are_recorded_and_end_nothing(
    node: RunningNode, receiver: Receiver
) -> None:
    demo = await node.tenant()
    await demo.subscription(await demo.endpoint("hook", receiver.url("/hook")))
    tenure = node.tenure
    hostile = (
        b"HTTP/1.1 999 \x00\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 70000 x\r\nContent-Length: 0\r\n\r\n",
        b"\x00\xff\xfe garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA\x00: \xff\r\n\r\n",
        b"HTTP/1.1 500 \xed\xa0\x80\r\nContent-Length: 3\r\n\r\n\x00\x01\x02",
    )
    receiver.script("/hook", *(Behaviour(raw=raw) for raw in hostile))
    await demo.publish(event())
    await soon(receiver.wait_for_deliveries(1))
    await node.balance_when(lambda b: b.delivered == 1)
    assert node.tenure is tenure
    assert len(await node.fetch("SELECT FROM attempt")) >= len(hostile)


async def test_what_is_owed_and_what_is_open_survives_a_crash(
    small_lanes: RunningNode, receiver: Receiver
) -> None:
    demo = await small_lanes.tenant()
    hold = asyncio.Event()
    await demo.subscription(await demo.endpoint("hook", receiver.url("/hook"), concurrency=2))
    receiver.always("/hook", Behaviour(hold=hold))
    await publish(demo, 200)
    await soon(receiver.wait_for(2))
    await small_lanes.balance_when(lambda b: b.owed > 0)
    await small_lanes.crash()
    receiver.always("/hook", Behaviour())
    await small_lanes.start()
    await soon(receiver.wait_for_deliveries(200))
    balance = await small_lanes.balance_when(lambda b: b.delivered == 200)
    assert balance.matched == 200
    # Twice came at most what was in flight.
    assert sum(receiver.delivered().values()) <= 202


async def test_the_byte_budget_holds_and_a_lane_that_waited_for_it_gets_its_turn(
    database: Database, tmp_path: Path, receiver: Receiver
) -> None:
    mib = 1024 * 1024
    async with running(
        database.dsn,
        tmp_path,
        node_payload_bytes_max=32 * mib,
        lane_bytes_max=32 * mib,
        window_seconds_max=0.5,
    ) as node:
        demo = await node.tenant()
        hold = asyncio.Event()
        slow = await demo.endpoint("slow", receiver.url("/slow"), concurrency=100)
        fast = await demo.endpoint("fast", receiver.url("/fast"), concurrency=1)
        await demo.subscription(slow, types=["slow.*"])
        name = await demo.subscription(fast, types=["fast.*"])
        await demo.admin.call("PauseSubscription", pb.PauseSubscriptionRequest(name=name))
        receiver.always("/slow", Behaviour(hold=hold))
        data = b'"%b"' % (b"x" * 500_000)
        await demo.publish(event("fast.a", b"1"))
        for _ in range(59):
            await demo.publish(event("slow.a", data))
        obligations = node.tenure.obligations
        most = obligations.limits.held_bytes_max
        await until(lambda: obligations.held_bytes >= most)  # all of it in flight
        turns: list[int] = []
        catch_up = node.tenure.catch_up
        serve = catch_up._serve

        async def counted(lane: Lane) -> None:
            await serve(lane)
            if lane.endpoint.name == "fast":
                turns.append(obligations.held_bytes)

        catch_up._serve = counted  # type: ignore[method-assign]
        await demo.admin.call("ResumeSubscription", pb.ResumeSubscriptionRequest(name=name))
        await demo.publish(event("fast.a", b"2"))
        # It asks again and again, though nothing of it happens.
        await until(lambda: len(turns) > 6)
        assert max(turns) < 2 * most
        assert not receiver.on("/fast")
        hold.set()
        await soon(receiver.wait_for_deliveries(59, "/slow"))
        await soon(receiver.wait_for_deliveries(2, "/fast"))
        assert [r.deliveries[0]["data"] for r in receiver.on("/fast")] == [1, 2]
        await node.balance_when(lambda b: b.delivered == 61)
        assert obligations.held_bytes == 0
