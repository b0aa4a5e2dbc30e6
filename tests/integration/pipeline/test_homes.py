"""Several nodes over one database: who holds what, hand-off, takeover, and calls that land on the wrong node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from tests.support.api import As
from tests.support.node import RunningNode, TestTenant, event, ids_of, running, soon, until
from tests.support.postgres import Database
from tests.support.receiver import Behaviour, Receiver

from outrider.v1 import endpoint_service_pb2, subscription_service_pb2, tenant_service_pb2
from outrider.v1.error_reason_pb2 import (
    ERROR_REASON_FRAME_OUT_OF_SEQUENCE as OUT_OF_SEQUENCE,
)
from outrider.v1.error_reason_pb2 import ERROR_REASON_NOT_READY as NOT_READY
from outrider.v1.error_reason_pb2 import ERROR_REASON_STORAGE_UNAVAILABLE as STORAGE_UNAVAILABLE
from outrider_server.api import tenant_service
from outrider_server.api.portions import PortionRouter
from outrider_server.domain.errors import Unavailable
from outrider_server.storage import shards

QUICK: dict[str, Any] = {
    "lease_seconds": 2,
    "lease_renew_seconds": 0.2,
    "lease_margin_seconds": 0.5,
    "crash_seconds": 0,
}


def held(node: RunningNode) -> set[int]:
    return {shard for shard in range(64) if node.node._admission.holds(shard)}


async def balanced(*nodes: RunningNode) -> None:
    """Until every shard is held, evenly."""
    share = 64 // len(nodes)
    await until(lambda: all(len(held(node)) == share for node in nodes))


@asynccontextmanager
async def two_nodes(
    database: Database, tmp_path: Path, **knobs: Any
) -> AsyncIterator[tuple[RunningNode, RunningNode]]:
    """Two nodes that share the shards evenly, started like the workers of one host."""
    knobs = {**QUICK, "workers": 2, **knobs}
    async with (
        running(database.dsn, tmp_path, admin_socket=tmp_path / "one.sock", **knobs) as one,
        running(
            database.dsn,
            tmp_path,
            node_name="other",
            admin_socket=tmp_path / "other.sock",
            **knobs,
        ) as other,
    ):
        other.admin_key = one.admin_key
        await balanced(one, other)
        yield one, other


async def tenants_of(one: RunningNode, other: RunningNode) -> tuple[TestTenant, TestTenant]:
    """A tenant that lives on `one`, and one that lives on `other`; both are spoken to through `one`."""
    homes: dict[bool, TestTenant] = {}
    number = 0
    while len(homes) < 2:
        number += 1
        tenant = await one.tenant(f"t{number}")
        rows = await one.fetch("SELECT shard FROM tenant WHERE name = $1", tenant.name)
        homes.setdefault(rows[0]["shard"] in held(one), tenant)
    return homes[True], homes[False]


async def test_a_node_that_joins_serves_at_once_and_gets_its_share_one_by_one(
    database: Database, tmp_path: Path, receiver: Receiver
) -> None:
    async with running(database.dsn, tmp_path, **QUICK) as one:
        demo = await one.tenant()
        await demo.subscription(await demo.endpoint("hook", receiver.url("/hook")))
        async with running(database.dsn, tmp_path, node_name="other", **QUICK) as other:
            assert other.node.readiness() == (True, "ready")
            results = await other.publish(demo.publisher, "demo", [event()])
            assert results[0].id
            await until(lambda: len(held(other)) >= 3)
            assert not held(one) & held(other)
            await other.publish(demo.publisher, "demo", [event()])
            await soon(receiver.wait_for_deliveries(2))


async def test_a_frame_of_mixed_tenants_is_stored_at_their_homes_and_answered_once(
    database: Database, tmp_path: Path, receiver: Receiver
) -> None:
    async with two_nodes(database, tmp_path) as (one, other):
        here, there = await tenants_of(one, other)
        for tenant in (here, there):
            await tenant.subscription(await tenant.endpoint("hook", receiver.url("/hook")))
        names = [(here, there, there, here, there)[n % 5].name for n in range(20)]
        async with one.stream(one.admin_key) as stream:
            await stream.open("mixed", 1)
            for number in (1, 2, 3):
                events = [event(data=b"%d" % n, tenant=name) for n, name in enumerate(names)]
                events[7] = event("Wrong", tenant=there.name)
                ack = await stream.publish(number, events, "")
                assert [r.index for r in ack.results] == [7]
                ids = ids_of(ack, names)
                assert len({i for i in ids if i is not None}) == 19
                assert [home.tenant for home in ack.homes] == [there.name]
                assert ack.homes[0].address == other.node._own_address()
        stored = {**await one.stored(here.name), **await one.stored(there.name)}
        assert len(stored) == 57
        await soon(receiver.wait_for_deliveries(57))
        assert set(receiver.delivered().values()) == {1}
        for tenant in (here.name, there.name):
            await one.balance_when(lambda b: b.delivered == b.matched > 0, tenant)


async def test_a_frame_that_comes_again_through_another_node_is_stored_once(
    database: Database, tmp_path: Path
) -> None:
    async with two_nodes(database, tmp_path) as (one, other):
        here, there = await tenants_of(one, other)
        frames = {
            n: [event(data=b"%d" % n, tenant=t.name) for t in (here, there, here)]
            for n in range(1, 5)
        }
        async with one.stream(one.admin_key) as stream:
            await stream.open("p", 3)
            first = {n: await stream.publish(n, events, "") for n, events in frames.items()}
        async with other.stream(one.admin_key) as stream:
            assert (await stream.open("p", 3)).last_frame == 4
            for n, events in frames.items():
                ack = await stream.publish(n, events, "")
                assert ack.duplicate
                assert sorted(map(str, ack.ids)) == sorted(map(str, first[n].ids))
            assert not (await stream.publish(5, [event(tenant=there.name)], "")).duplicate
        assert len(await one.stored(here.name)) == 8
        assert len(await one.stored(there.name)) == 5


async def test_a_call_for_a_tenant_is_answered_at_its_home_wherever_it_lands(
    database: Database, tmp_path: Path, receiver: Receiver
) -> None:
    async with two_nodes(database, tmp_path) as (one, other):
        _, there = await tenants_of(one, other)
        endpoint = await there.endpoint("hook", receiver.url("/hook"))
        await there.subscription(endpoint)
        (lane,) = [
            lane
            for lane in other.tenure.obligations.lanes.values()
            if lane.endpoint.tenant == next(iter(other.node._directory.by_name.values())).id
            or lane.endpoint.name == "hook"
        ]
        assert lane.endpoint.url == receiver.url("/hook")
        got = await there.admin.call(
            "GetEndpoint", endpoint_service_pb2.GetEndpointRequest(name=endpoint)
        )
        assert got.name == endpoint
        # Errors come back as they are.
        refusal = await there.admin.refused(
            "GetEndpoint", endpoint_service_pb2.GetEndpointRequest(name=endpoint + "x")
        )
        assert refusal.reason == "RESOURCE_NOT_FOUND"
        request = subscription_service_pb2.CreateSubscriptionRequest(
            parent=f"tenants/{there.name}",
            subscription={"endpoint": endpoint, "types": ["*"], "filter": "total >"},
        )
        refusal = await there.admin.refused("CreateSubscription", request)
        assert refusal.reason == "INVALID_FILTER"
        # What a key may not do, it may not do through another node.
        publisher = As(one.channel, there.publisher)
        assert (await publisher.refused("CreateSubscription", request)).reason == "ROLE_TOO_LOW"
        # What is published after the answer is matched by it, whoever is asked.
        await there.publish(event(data=b'{"n": 1}'))
        await other.publish(there.publisher, there.name, [event(data=b'{"n": 2}')])
        await soon(receiver.wait_for_deliveries(2))


async def test_tenants_are_made_where_there_are_fewest(database: Database, tmp_path: Path) -> None:
    async with two_nodes(database, tmp_path) as (one, other):
        for number in range(64):
            await one.admin.call(
                "CreateTenant",
                tenant_service_pb2.CreateTenantRequest(tenant_id=f"t{number}", tenant={}),
            )
            # Not only over the shards, but over the nodes as well.
            directories = one.node._directory.by_id, other.node._directory.by_id
            assert abs(len(directories[0]) - len(directories[1])) <= 1
        rows = await one.fetch("SELECT shard, count(*) FROM tenant GROUP BY shard")
        assert {row["count"] for row in rows} == {1}
        assert len(one.node._directory.by_id) == len(other.node._directory.by_id) == 32


async def test_a_node_that_drains_hands_everything_off_and_loses_nothing(
    database: Database, tmp_path: Path, receiver: Receiver
) -> None:
    async with two_nodes(database, tmp_path) as (one, other):
        here, there = await tenants_of(one, other)
        for tenant in (here, there):
            endpoint = await tenant.endpoint("hook", receiver.url(f"/{tenant.name}"))
            await tenant.subscription(endpoint)
        hold = asyncio.Event()
        receiver.always(f"/{here.name}", Behaviour(hold=hold))
        await here.publish(*[event(data=b"%d" % n) for n in range(200)])
        await soon(receiver.wait_for(1))
        one.node.stop()
        await until(lambda: one.node._admission.draining)
        hold.set()
        receiver.always(f"/{here.name}", Behaviour())
        assert await one.ended() is None
        await until(lambda: len(held(other)) == 64)
        await soon(receiver.wait_for_deliveries(200))
        # Handed over in order: nothing came twice.
        assert set(receiver.delivered().values()) == {1}
        await other.balance_when(lambda b: b.delivered == 200, here.name)
        await other.publish(here.publisher, here.name, [event()])
        await soon(receiver.wait_for_deliveries(201))


async def test_the_shards_of_a_node_that_died_are_taken_over_after_its_lease(
    database: Database, tmp_path: Path, receiver: Receiver
) -> None:
    async with two_nodes(database, tmp_path) as (one, other):
        here, _ = await tenants_of(one, other)
        await here.subscription(await here.endpoint("hook", receiver.url("/hook")))
        await here.publish(*[event(data=b"%d" % n) for n in range(20)])
        await one.crash()
        await until(lambda: len(held(other)) == 64)
        assert other.tenure.obligations.windows[min(held(other))].epoch > 0
        await other.publish(here.publisher, here.name, [event()])
        await soon(receiver.wait_for_deliveries(21))
        await one.start()
        await until(lambda: len(held(one)) >= 2)


async def test_an_owner_that_lost_its_shards_sends_nothing_more_and_takes_what_is_left(
    database: Database, tmp_path: Path
) -> None:
    async with two_nodes(database, tmp_path) as (one, other):
        before = one.tenure
        lost = min(held(one))
        await one.fetch("UPDATE shard SET node = 'other', epoch = epoch + 1 WHERE shard = $1", lost)
        await one.next_tenure(before)
        await until(lambda: len(held(one)) >= 31 and lost in held(other))
        assert not held(one) & held(other)


async def test_a_node_that_is_none_of_ours_gets_nothing(database: Database, tmp_path: Path) -> None:
    async with two_nodes(database, tmp_path) as (one, other):
        _, there = await tenants_of(one, other)
        other.node._peers._authenticator._keys = [b"another installation's"]
        one.node._peers._authenticator._keys = [b"something else"]
        async with one.stream(there.publisher) as stream:
            await stream.open()
            await stream.send(1, [event()], there.name)
            assert await stream.refused(1) == "NOT_READY"
        request = endpoint_service_pb2.ListEndpointsRequest(parent=f"tenants/{there.name}")
        assert (await there.admin.refused("ListEndpoints", request)).reason == "NOT_READY"
        assert not await one.stored(there.name)


@pytest.mark.parametrize("through", ["one", "other"])
async def test_a_large_event_is_passed_on_whole(
    database: Database, tmp_path: Path, receiver: Receiver, through: str
) -> None:
    async with two_nodes(database, tmp_path) as (one, other):
        _, there = await tenants_of(one, other)
        await there.subscription(await there.endpoint("hook", receiver.url("/hook")))
        data = b'{"text": "%s"}' % (b"x" * (9 * 1024 * 1024))
        node = one if through == "one" else other
        async with node.stream(there.publisher) as stream:
            await stream.open()
            await stream.grant(len(data) + 100)
            await stream.publish(1, [event(data=data)], there.name)
        await soon(receiver.wait_for_deliveries(1))
        (row,) = (await one.stored(there.name)).values()
        assert row["data"] == data


async def test_a_split_tenant_lives_on_several_nodes_and_keeps_order_by_key(
    database: Database, tmp_path: Path, receiver: Receiver
) -> None:
    async with two_nodes(database, tmp_path) as (one, other):
        demo = await one.tenant("big")
        endpoint = await demo.endpoint("hook", receiver.url("/hook"), concurrency=4)
        await demo.subscription(endpoint)

        def frame(number: int) -> list[Any]:
            return [event(key=f"k{n % 7}", data=b"%d" % (number * 100 + n)) for n in range(40)]

        async with demo.stream() as stream:
            await stream.open("p", 1)
            first = await stream.publish(1, frame(1), "big")
            assert not first.results
        changed = await demo.admin.call(
            "UpdateTenant",
            tenant_service_pb2.UpdateTenantRequest(
                tenant={"name": "tenants/big", "shards": 8}, update_mask={"paths": ["shards"]}
            ),
        )
        assert changed.shards == 8
        async with demo.stream() as stream:
            await stream.open("p", 1)
            # It comes again after its tenant was spread: it is not stored twice.
            await until_taken(stream, 1, frame(1))
            for number in range(2, 12):
                ack = await until_taken(stream, number, frame(number))
                assert len({result.id for result in ack.results}) == 40
        stored = await one.stored("big")
        assert len(stored) == 440
        assert len({row["shard"] for row in stored.values()}) > 3
        await soon(receiver.wait_for_deliveries(440))
        for key in range(7):
            mine = [row for row in stored.values() if row["key"] == f"k{key}"]
            assert len({row["shard"] for row in mine[-10:]}) == 1
            data = [int(row["data"]) for row in mine]
            assert data == sorted(data)
        await one.balance_when(lambda b: b.delivered == 440 == b.matched, "big")
        # A change at the home reaches the other owners.
        await demo.admin.call(
            "DeleteSubscription",
            subscription_service_pb2.DeleteSubscriptionRequest(
                name=(
                    await demo.admin.call(
                        "ListSubscriptions",
                        subscription_service_pb2.ListSubscriptionsRequest(parent="tenants/big"),
                    )
                )
                .subscriptions[0]
                .name
            ),
        )
        versions = [(await one.fetch("SELECT config_version FROM tenant WHERE name = 'big'"))[0][0]]
        await until(
            lambda: all(
                node.node._directory.by_name["big"].version == versions[0] for node in (one, other)
            )
        )


async def until_taken(stream: Any, number: int, events: list[Any], tenant: str = "big") -> Any:
    """Send a frame until it is acknowledged: the owners of its shards may have to take them anew."""
    async with asyncio.timeout(10):
        while True:
            await stream.send(number, events, tenant)
            response = await stream.answer()
            if response.WhichOneof("message") == "ack":
                return response.ack
            assert response.refused.reason in (NOT_READY, OUT_OF_SEQUENCE, STORAGE_UNAVAILABLE)
            await asyncio.sleep(0.05)


async def test_a_tenant_may_be_made_split(
    database: Database, tmp_path: Path, receiver: Receiver
) -> None:
    async with two_nodes(database, tmp_path) as (one, other):
        demo = await one.tenant("big", shards=6)
        (row,) = await one.fetch("SELECT shard, shards FROM tenant")
        assert len(set(row["shards"])) == 6
        assert row["shards"][0] == row["shard"]
        assert set(row["shards"]) & held(one)
        assert set(row["shards"]) & held(other)
        await demo.subscription(await demo.endpoint("hook", receiver.url("/hook")))
        async with demo.stream() as stream:
            await stream.open()
            await until_taken(stream, 1, [event(key=f"k{n}") for n in range(60)])
        await soon(receiver.wait_for_deliveries(60))
        assert len({r["shard"] for r in (await one.stored("big")).values()}) > 3


async def test_a_tenant_that_still_has_deliveries_waiting_is_not_spread_and_goes_on(
    database: Database, tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenant_service, "SPREAD_SECONDS_MAX", 0.5)
    async with running(database.dsn, tmp_path, **QUICK) as node:
        demo = await node.tenant("big")
        await demo.subscription(await demo.endpoint("hook", receiver.url("/hook")))
        hold = asyncio.Event()
        receiver.script("/hook", Behaviour(hold=hold))
        await demo.publish(event())
        request = tenant_service_pb2.UpdateTenantRequest(
            tenant={"name": "tenants/big", "shards": 2}, update_mask={"paths": ["shards"]}
        )
        assert (await demo.admin.refused("UpdateTenant", request)).reason == "WRONG_STATE"
        await demo.publish(event())
        hold.set()
        await soon(receiver.wait_for_deliveries(2))
        assert (await demo.admin.call("UpdateTenant", request)).shards == 2


async def test_what_keeps_crashing_its_owners_is_held_back_until_it_is_let_go(
    database: Database, tmp_path: Path, receiver: Receiver
) -> None:
    knobs = {**QUICK, "crash_seconds": 60}
    async with running(database.dsn, tmp_path, **knobs) as node:
        demo = await node.tenant()
        await demo.subscription(await demo.endpoint("hook", receiver.url("/hook")))
        hold = asyncio.Event()
        receiver.always("/hook", Behaviour(hold=hold))
        await demo.publish(*[event(data=b"%d" % n) for n in range(5)])
        await soon(receiver.wait_for(1))
        for _ in range(2):
            await node.crash()
            await node.start()
        await soon(receiver.wait_for(3))
        arrived = len(receiver.requests)
        await node.crash()
        receiver.always("/hook", Behaviour())
        hold.set()
        await node.start()
        balance = await node.balance_when(lambda b: b.owed == 5)
        assert balance.delivered == 0
        await demo.publish(event(data=b"99"))  # others go on
        await node.balance_when(lambda b: b.delivered == 1)
        assert len(receiver.requests) == arrived + 1
        (row,) = await node.fetch("SELECT shard FROM shard WHERE held_back")
        connection = await asyncpg.connect(database.dsn)
        try:
            assert await shards.let_go(connection) == [row["shard"]]
            assert await shards.let_go(connection) == []
        finally:
            await connection.close()
        await node.balance_when(lambda b: b.delivered == 6)


async def test_behind_a_frame_that_was_refused_nothing_is_acknowledged_though_it_is_stored(
    database: Database, tmp_path: Path
) -> None:
    async with two_nodes(database, tmp_path) as (one, other):
        here, there = await tenants_of(one, other)
        frames = {
            1: event(tenant=there.name),
            2: event(tenant=here.name, data=b"2"),
            3: event(tenant=here.name, data=b"3"),
        }
        async with one.stream(one.admin_key) as stream:
            await stream.open("p", 1)
            other.node._peers._authenticator._keys = [b"of another installation"]
            for number, one_event in frames.items():
                await stream.send(number, [one_event], "")
            assert await stream.refused(1) == "NOT_READY"
            assert await stream.refused(2) == await stream.refused(3) == "FRAME_OUT_OF_SEQUENCE"
            other.node._peers._authenticator._keys = one.node._peers._authenticator._keys
            for number, one_event in frames.items():
                ack = await until_taken(stream, number, [one_event], "")
                assert ack.number == number
        assert [row["data"] for row in (await one.stored(here.name)).values()] == [b"2", b"3"]
        assert len(await one.stored(there.name)) == 1


@pytest.mark.parametrize("shards", [1, 3])
async def test_a_frame_that_was_stored_in_part_before_its_tenant_is_spread_anew_is_whole_after(
    database: Database, tmp_path: Path, shards: int
) -> None:
    async with running(database.dsn, tmp_path, **QUICK) as node:
        demo = await node.tenant("big")

        async def spread(count: int) -> None:
            request = tenant_service_pb2.UpdateTenantRequest(
                tenant={"name": "tenants/big", "shards": count}, update_mask={"paths": ["shards"]}
            )
            assert (await demo.admin.call("UpdateTenant", request)).shards == count

        await spread(2)
        first, second = node.node._directory.by_name["big"].shards
        frames = {
            number: [event(key=f"k{n}", data=b"%d" % (number * 100 + n)) for n in range(10)]
            for number in (1, 2)
        }
        async with demo.stream() as stream:
            await stream.open("p", 1)
            await stream.publish(1, frames[1], "big")
            # One of its shards takes nothing in: the other one stores its part.
            window = node.tenure.obligations.windows[first]
            window.open = False
            router = PortionRouter.submit

            async def in_part(self: PortionRouter, *arguments: Any) -> Any:
                split = arguments[3]
                portion = split.portion
                kept = [n for n, e in enumerate(portion.events) if e.shard == second]
                portion.events = [portion.events[n] for n in kept]
                portion.entries = [portion.entries[n] for n in kept]
                portion.places = [portion.places[n] for n in kept]
                portion.shards &= {second}
                split.homeless.clear()
                await (await router(self, *arguments))
                raise Unavailable("NOT_READY", "the other part", retry_after_seconds=0.0)

            PortionRouter.submit = in_part  # type: ignore[method-assign]
            try:
                await stream.send(2, frames[2], "big")
                assert await stream.refused(2) == "NOT_READY"
            finally:
                PortionRouter.submit = router  # type: ignore[method-assign]
            window.open = True
            assert 10 < len(await node.stored("big")) < 20
            await spread(shards)
            ack = await until_taken(stream, 2, frames[2], "big")
            assert not [r for r in ack.results if r.HasField("error")]
        rows = await node.stored("big")
        assert sorted(int(row["data"]) for row in rows.values()) == [
            number * 100 + n for number in (1, 2) for n in range(10)
        ]
        assert {r.id for r in ack.results} | {
            first + n * step
            for r in ack.ids
            for first, step in [(r.first, r.step)]
            for n in range(r.count)
        } >= {id_ for id_, row in rows.items() if int(row["data"]) >= 200}


async def test_endpoints_that_hang_hold_up_neither_the_balance_nor_a_drain(
    database: Database, tmp_path: Path, receiver: Receiver
) -> None:
    async with running(database.dsn, tmp_path, drain_seconds=1, **QUICK) as one:
        hold = asyncio.Event()
        receiver.always("/hangs", Behaviour(hold=hold))
        for number in range(4):
            tenant = await one.tenant(f"t{number}")
            await tenant.subscription(await tenant.endpoint("hook", receiver.url("/hangs")))
            await tenant.publish(event())
        # The shards that would go first are those that hang.
        busy = one.tenure.obligations.busy_shards
        await until(lambda: len(busy()) == 4)
        async with running(database.dsn, tmp_path, node_name="other", **QUICK) as other:
            await until(lambda: len(held(other)) >= 3)
            assert not held(other) & busy()
            started = asyncio.get_running_loop().time()
            one.node.stop()
            assert await one.ended() is None
            assert asyncio.get_running_loop().time() - started < 5
            await until(lambda: len(held(other)) == 64)
            hold.set()
            await soon(receiver.wait_for_deliveries(4))
