"""Large events are checked and matched in a child process, by the configuration of the moment, beside small ones."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import grpc
import pytest
from tests.support.node import RunningNode, errors_of, event, soon, until
from tests.support.processes import is_gone
from tests.support.receiver import Receiver

from outrider.v1 import subscription_service_pb2
from outrider_server.domain.errors import Unavailable
from outrider_server.domain.event import Event
from outrider_server.domain.subscription import Subscription
from outrider_server.domain.tenant import Tenant, TenantConfiguration
from outrider_server.pipeline.ingest import IngestLimits, Refused
from outrider_server.pipeline.large import LargeEvents
from outrider_server.pipeline.match import TenantEntry
from outrider_server.telemetry.counters import MatchCounters


def payload(total: int, size: int = 300_000) -> bytes:
    return b'{"total": %d, "x": "%b"}' % (total, b"x" * size)


def child_of(large: LargeEvents) -> int:
    assert large.pid is not None
    return large.pid


def entry(version: int, *types: str, tenant: int = 1) -> TenantEntry:
    subscriptions = tuple(
        Subscription(id=number, tenant=tenant, name=f"s{number}", endpoint=1, types=(type_,))
        for number, type_ in enumerate(types, 1)
    )
    configuration = TenantConfiguration(
        Tenant(tenant, f"t{tenant}", 0, config_version=version), (), subscriptions, frozenset()
    )
    return TenantEntry(configuration, None)


@pytest.fixture
async def large() -> AsyncIterator[LargeEvents]:
    large = LargeEvents(IngestLimits(), MatchCounters())
    yield large
    await large.close()


def made(data: bytes = b"1", type_: str = "a.b", tenant: int = 1) -> Event:
    return Event(tenant, type_, data, 0)


async def test_an_event_is_matched_by_the_version_it_came_with(large: LargeEvents) -> None:
    old, new = entry(1, "a.*"), entry(2, "b.*", "a.*", "*")
    other = entry(9, "*", tenant=2)
    for current, expected in (
        (old, (1,)),
        (new, (2, 3)),
        (old, (1,)),
        (new, (2, 3)),
    ):
        e = made()
        await large.check_and_match(e, current)
        assert (e.targets, e.config_version) == (expected, current.version)
        e = made(tenant=2)
        await large.check_and_match(e, other)
        assert (e.targets, e.config_version) == ((1,), 9)


async def test_a_call_that_was_given_up_before_it_began_changes_nothing(
    large: LargeEvents,
) -> None:
    old, new = entry(1, "a.*"), entry(2, "*", "a.*")
    await large.check_and_match(made(), old)
    pid = child_of(large)
    os.kill(pid, signal.SIGSTOP)
    loop = asyncio.get_running_loop()
    first = [loop.create_task(large.check_and_match(made(), old)) for _ in range(3)]
    given_up = loop.create_task(large.check_and_match(made(), new))
    await asyncio.sleep(0)
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    os.kill(pid, signal.SIGCONT)
    for task in first:
        await soon(task)
    e = made()
    await large.check_and_match(e, new)
    assert (e.targets, e.config_version) == ((1, 2), 2)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"{", "PAYLOAD_NOT_JSON"),
        (b'"\xff"', "PAYLOAD_NOT_UTF8"),
        (b"[" * 10_000 + b"]" * 10_000, "PAYLOAD_TOO_DEEP"),
        (b"[" * 129 + b"]" * 129, "PAYLOAD_TOO_DEEP"),
        (b"", "EMPTY_PAYLOAD"),
        (b"1" * (10 * 1024 * 1024 + 1), "PAYLOAD_TOO_LARGE"),
    ],
    ids=["json", "utf8", "deep", "one too deep", "empty", "large"],
)
async def test_a_bad_event_is_refused_with_its_reason(
    large: LargeEvents, data: bytes, reason: str
) -> None:
    with pytest.raises(Refused) as caught:
        await large.check_and_match(made(data), entry(1))
    assert caught.value.reason == reason


async def test_a_killed_child_fails_what_it_had_and_nothing_after_it(large: LargeEvents) -> None:
    current = entry(1, "*")
    await large.check_and_match(made(), current)
    pid = child_of(large)
    os.kill(pid, signal.SIGSTOP)
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(large.check_and_match(made(), current)) for _ in range(4)]
    await until(lambda: large.waiting == 4)
    os.kill(pid, signal.SIGKILL)
    results = await soon(asyncio.gather(*tasks, return_exceptions=True))
    # The first was with the child that died; the others go to the next one.
    assert isinstance(results[0], Unavailable)
    assert results[1:] == [None, None, None]
    e = made()
    await large.check_and_match(e, current)
    assert e.targets == (1,)
    assert child_of(large) != pid


async def test_ctrl_c_does_not_end_the_child_and_its_close_does(large: LargeEvents) -> None:
    await large.check_and_match(made(), entry(1))
    pid = child_of(large)
    os.kill(pid, signal.SIGINT)
    await large.check_and_match(made(), entry(1))
    assert child_of(large) == pid
    await large.close()
    assert is_gone(pid)


async def test_large_events_are_matched_by_each_change_and_stored_in_order(
    node: RunningNode, receiver: Receiver
) -> None:
    demo = await node.tenant()
    endpoint = await demo.endpoint("hook", receiver.url("/hook"))
    one = await demo.subscription(endpoint, "one", filter_="total > 10")
    async with demo.stream() as stream:
        await stream.open()
        await stream.send(1, [event(data=b'{"total": 1}')])
        await stream.send(2, [event(data=payload(11)), event(data=payload(9))])
        await stream.send(3, [event(data=b'{"total": 12}')])
        for number in (1, 2, 3):
            await stream.ack(number)
        await demo.admin.call(
            "UpdateSubscription",
            subscription_service_pb2.UpdateSubscriptionRequest(
                subscription={"name": one, "filter": "total < 10"},
                update_mask={"paths": ["filter"]},
            ),
        )
        await stream.publish(4, [event(data=payload(11)), event(data=payload(9))])
        ack = await stream.publish(5, [event(data=payload(1)[:-1]), event(data=payload(1))])
        assert errors_of(ack.results) == {0: "PAYLOAD_NOT_JSON"}
    rows = list((await node.stored()).values())
    assert [len(row["targets"]) for row in rows] == [0, 1, 0, 1, 0, 1, 1]
    await soon(receiver.wait_for_deliveries(4))
    await node.balance_when(lambda b: b.delivered == 4 == b.matched)


async def test_a_killed_child_refuses_the_frame_for_a_passing_reason(node: RunningNode) -> None:
    demo = await node.tenant()
    large = node.node._admission._large
    async with demo.stream() as stream:
        await stream.open()
        await stream.publish(1, [event(data=payload(1))])
        pid = child_of(large)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: is_gone(pid))
        await stream.send(2, [event(data=payload(2))])
        response = await stream.answer()
        if response.WhichOneof("message") == "refused":
            await stream.publish(2, [event(data=payload(2))])
        pid = child_of(large)
        os.kill(pid, signal.SIGSTOP)
        publishing = asyncio.ensure_future(demo.publish(event(data=payload(3))))
        await until(lambda: large.waiting > 0)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await publishing
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await stream.publish(3, [event(data=payload(4))])
    assert len(await node.stored()) == 3


async def test_small_events_do_not_wait_for_a_large_one(node: RunningNode) -> None:
    demo = await node.tenant()
    large = node.node._admission._large
    await demo.publish(event(data=payload(1)))
    os.kill(child_of(large), signal.SIGSTOP)
    publishing = asyncio.ensure_future(demo.publish(event(data=payload(2))))
    async with demo.stream() as stream:
        await stream.open()
        for number in range(1, 20):
            await stream.publish(number, [event()])
    assert not publishing.done()
    os.kill(child_of(large), signal.SIGCONT)
    assert len(await publishing) == 1
    assert len(await node.stored()) == 21
