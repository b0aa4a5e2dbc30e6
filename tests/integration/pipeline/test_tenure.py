"""One period of holding shards after another: start, restart, a second process of the same name, the end of one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.support.node import RunningNode, event, running, soon, until
from tests.support.postgres import Database
from tests.support.receiver import Behaviour, Receiver

from outrider.v1 import tenant_service_pb2
from outrider_server.__main__ import _sentence
from outrider_server.pipeline.admission import Admission
from outrider_server.pipeline.tenure import Adoption


async def test_every_backend_of_the_node_may_end_and_nothing_is_lost(
    node: RunningNode, receiver: Receiver
) -> None:
    demo = await node.tenant()
    await demo.subscription(await demo.endpoint("hook", receiver.url("/hook")))
    count = 0
    for role in ("ingest", "record", "catch_up", "read", "lease", "jobs", "prune", "ingest_large"):
        before = node.tenure
        async with demo.stream() as stream:
            await stream.open(role)
            await stream.publish(1, [event()])
            ended = await node.fetch(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name LIKE 'outrider/test/%/' || $1",
                role,
            )
            assert len(ended) == 1
            await node.next_tenure(before)
            await stream.publish(2, [event()])
        count += 2
    await soon(receiver.wait_for_deliveries(count))
    await node.balance_when(lambda b: b.delivered == count == b.matched)
    assert len(receiver.delivered()) == count


async def test_a_clean_end_records_everything_and_leaves_at_once(
    node: RunningNode, receiver: Receiver
) -> None:
    demo = await node.tenant()
    await demo.subscription(await demo.endpoint("hook", receiver.url("/hook")))
    hold = asyncio.Event()
    receiver.script("/hook", Behaviour(hold=hold))
    await demo.publish(event(), event())
    await soon(receiver.wait_for(1))
    node.node.stop()
    await until(lambda: node.node._admission.draining)
    hold.set()  # what is in flight ends, and is recorded
    assert await node.ended() is None
    balance = await node.balance_when(lambda _: True)
    assert balance.delivered + balance.window + balance.owed == 2
    assert balance.delivered >= 1
    leases = await node.fetch("SELECT expires_at <= now() AS over FROM node")
    assert [row["over"] for row in leases] == [True]
    assert not await node.fetch(
        "SELECT FROM pg_stat_activity WHERE application_name LIKE 'outrider/test/%'"
    )
    await node.start()
    await soon(receiver.wait_for_deliveries(2))
    assert sum(receiver.delivered().values()) == 2


SHORT_LEASE: dict[str, Any] = {
    "lease_seconds": 2,
    "lease_renew_seconds": 0.2,
    "lease_margin_seconds": 0.5,
}


async def test_a_second_process_of_the_same_name_is_refused_and_the_first_goes_on(
    database: Database, tmp_path: Path
) -> None:
    async with running(database.dsn, tmp_path, **SHORT_LEASE) as first:
        demo = await first.tenant()
        tenure = first.tenure
        async with running(database.dsn, tmp_path, serving=False, **SHORT_LEASE) as second:
            await until(lambda: "another process runs" in second.node.readiness()[1])
            assert not second.node.readiness()[0]
            error = await second.ended()
            assert error is not None
            sentence = _sentence(error, second.settings)
            assert sentence is not None
            assert "another process runs as node 'test'" in sentence
            assert "node_name" in sentence
        await demo.publish(event())
        assert first.tenure is tenure


async def test_a_process_of_the_same_name_follows_one_that_goes(
    database: Database, tmp_path: Path
) -> None:
    async with running(database.dsn, tmp_path, lease_seconds=60) as first:
        demo = await first.tenant()
        async with running(database.dsn, tmp_path, serving=False, lease_seconds=60) as second:
            await until(lambda: "another process runs" in second.node.readiness()[1])
            await first.stop()
            await second.serves()
            assert len(second.tenure.obligations.windows) == 64
            await second.publish(demo.publisher, "demo", [event()])


async def test_a_node_whose_name_was_taken_ends(database: Database, tmp_path: Path) -> None:
    async with running(database.dsn, tmp_path, **SHORT_LEASE) as node:
        await node.fetch("UPDATE node SET boot = gen_random_uuid()")
        error = await node.ended()
        assert error is not None
        assert "another process runs as node 'test'" in (_sentence(error, node.settings) or "")


async def test_a_restart_after_a_crash_does_not_wait_for_its_own_lease(
    database: Database, tmp_path: Path
) -> None:
    async with running(database.dsn, tmp_path, lease_seconds=300) as node:
        await node.crash()
        leases = await node.fetch("SELECT expires_at > now() + interval '1 min' AS live FROM node")
        assert [row["live"] for row in leases] == [True]
        async with asyncio.timeout(5):
            await node.start()


async def test_no_change_is_taken_under_a_lease_that_is_not_trusted(node: RunningNode) -> None:
    await node.tenant()
    lease = node.node._lease
    deadline, lease._deadline = lease._deadline, 0.0
    request = tenant_service_pb2.CreateTenantRequest(tenant_id="late", tenant={})
    assert (await node.admin.refused("CreateTenant", request)).reason == "NOT_READY"
    lease._deadline = deadline
    await node.admin.call("CreateTenant", request)


async def test_no_change_is_taken_while_a_tenure_begins_and_one_under_way_is_seen(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    await node.tenant("demo")
    configure, made = Adoption.configure, asyncio.Event()

    async def slow(self: Adoption, *arguments: Any) -> None:
        request = tenant_service_pb2.CreateTenantRequest(tenant_id="late", tenant={})
        refusal = await node.admin.refused("CreateTenant", request)
        assert refusal.reason == "NOT_READY"
        await configure(self, *arguments)
        made.set()

    monkeypatch.setattr(Adoption, "configure", slow)
    before = node.tenure
    await node.fetch("UPDATE shard SET epoch = epoch + 1")
    async with node.stream(node.admin_key) as stream:
        await stream.open()
        await stream.send(1, [event()])
        await stream.refused(1)
        await soon(made.wait())
        await node.next_tenure(before)
        assert not (await stream.publish(1, [event()], "demo")).results


async def test_frames_under_check_while_a_tenure_ends_are_answered(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = await node.tenant()
    checking, go_on = asyncio.Event(), asyncio.Event()
    check = Admission._check

    async def slow(self: Admission, *arguments: Any, **options: Any) -> Any:
        checking.set()
        await go_on.wait()
        return await check(self, *arguments, **options)

    monkeypatch.setattr(Admission, "_check", slow)
    before = node.tenure
    async with demo.stream() as stream:
        await stream.open()
        await stream.send(1, [event()])
        await soon(checking.wait())
        await node.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name LIKE 'outrider/test/%/record'"
        )
        await node.next_tenure(before)
        go_on.set()
        assert await stream.refused(1) == "NOT_READY"
        await stream.publish(1, [event()])
    assert len(await node.stored()) == 1


async def test_what_was_delivered_before_a_crash_and_recorded_does_not_come_again(
    node: RunningNode, receiver: Receiver
) -> None:
    demo = await node.tenant()
    endpoint = await demo.endpoint("hook", receiver.url("/hook"), concurrency=1)
    await demo.subscription(endpoint)
    await demo.subscription(endpoint, types=["sales.*"])
    hold = asyncio.Event()
    receiver.script("/hook", *[Behaviour() for _ in range(5)])
    receiver.always("/hook", Behaviour(hold=hold))
    await demo.publish(*[event(data=b"%d" % n) for n in range(10)])
    await soon(receiver.wait_for(6))
    await node.balance_when(lambda b: b.delivered == 5)
    await node.crash()
    receiver.always("/hook", Behaviour())
    await node.start()
    await soon(receiver.wait_for_deliveries(20))
    assert set(receiver.delivered().values()) == {1}
    arrivals = [d["id"] for r in receiver.requests for d in r.deliveries]
    assert len(arrivals) == 21  # the one in flight came twice
    balance = await node.balance_when(lambda b: b.delivered == 20)
    assert balance.matched == 20
