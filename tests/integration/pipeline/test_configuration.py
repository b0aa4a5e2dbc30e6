"""A change of configuration holds from its answer on, and nothing that was owed vanishes uncounted."""

from __future__ import annotations

import asyncio
from base64 import b64decode
from typing import Any

import pytest
from google.protobuf import field_mask_pb2
from tests.support.node import RunningNode, errors_of, event, soon, until
from tests.support.receiver import Behaviour, Receiver

from outrider.v1 import (
    endpoint_service_pb2,
    event_type_service_pb2,
    subscription_service_pb2,
    tenant_service_pb2,
)
from outrider_server.app import Node
from outrider_server.domain.errors import Unavailable


def arrived(receiver: Receiver, path: str) -> list[Any]:
    return [d["data"] for request in receiver.on(path) for d in request.deliveries]


async def test_the_next_event_after_a_change_is_matched_by_it(
    node: RunningNode, receiver: Receiver
) -> None:
    demo = await node.tenant(strict_types=False)
    async with demo.stream() as stream:
        await stream.open()
        await stream.publish(1, [event(data=b"0")])
        endpoint = await demo.endpoint("hook", receiver.url("/hook"))
        subscription = await demo.subscription(endpoint, "s", filter_="data > 10")
        await stream.publish(2, [event(data=b"11"), event(data=b"9")])
        await demo.admin.call(
            "UpdateSubscription",
            subscription_service_pb2.UpdateSubscriptionRequest(
                subscription={"name": subscription, "filter": "data < 10"},
                update_mask=field_mask_pb2.FieldMask(paths=["filter"]),
            ),
        )
        await stream.publish(3, [event(data=b"12"), event(data=b"8")])
        await soon(receiver.wait_for_deliveries(2))
        await demo.admin.call(
            "DeleteSubscription",
            subscription_service_pb2.DeleteSubscriptionRequest(name=subscription),
        )
        await stream.publish(4, [event(data=b"7")])
        await demo.admin.call(
            "UpdateTenant",
            tenant_service_pb2.UpdateTenantRequest(
                tenant={"name": "tenants/demo", "strict_types": True},
                update_mask=field_mask_pb2.FieldMask(paths=["strict_types"]),
            ),
        )
        assert errors_of((await stream.publish(5, [event()])).results) == {0: "UNKNOWN_EVENT_TYPE"}
        await demo.admin.call(
            "CreateEventType",
            event_type_service_pb2.CreateEventTypeRequest(
                parent="tenants/demo", event_type_id="sales.made", event_type={"description": ""}
            ),
        )
        assert not (await stream.publish(6, [event()])).results
    await node.balance_when(lambda b: b.delivered == 2 == b.matched)
    versions = [row["config_version"] for row in (await node.stored()).values()]
    assert versions == sorted(versions)
    assert len(set(versions)) == 5
    assert sorted(arrived(receiver, "/hook")) == [8, 11]
    targets = [len(row["targets"]) for row in (await node.stored()).values()]
    assert targets == [0, 1, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("what", ["Subscription", "Endpoint"])
async def test_what_is_paused_is_owed_and_delivered_in_order_after_it_is_resumed(
    node: RunningNode, receiver: Receiver, what: str
) -> None:
    demo = await node.tenant()
    endpoint = await demo.endpoint("hook", receiver.url("/hook"), concurrency=1)
    subscription = await demo.subscription(endpoint, "s")
    name = endpoint if what == "Endpoint" else subscription
    module: Any = endpoint_service_pb2 if what == "Endpoint" else subscription_service_pb2
    hold = asyncio.Event()
    receiver.script("/hook", Behaviour(hold=hold))
    await demo.publish(*[event(data=b"%d" % n) for n in range(20)])
    await soon(receiver.wait_for(1))
    await demo.admin.call(f"Pause{what}", getattr(module, f"Pause{what}Request")(name=name))
    await demo.publish(*[event(data=b"%d" % n) for n in range(20, 40)])
    hold.set()  # the request in flight ends
    await node.balance_when(lambda b: (b.owed, b.delivered, b.window) == (39, 1, 0))
    await node.restart()
    balance = await node.balance_when(lambda b: b.owed == 39)
    assert balance.delivered == 1
    await demo.admin.call(f"Resume{what}", getattr(module, f"Resume{what}Request")(name=name))
    await demo.publish(event(data=b"40"))
    await soon(receiver.wait_for_deliveries(41))
    assert arrived(receiver, "/hook") == list(range(41))
    await node.balance_when(lambda b: b.delivered == 41 == b.matched)


async def test_what_a_deleted_subscription_is_owed_is_cancelled_and_counted(
    small_lanes: RunningNode, receiver: Receiver
) -> None:
    demo = await small_lanes.tenant()
    endpoint = await demo.endpoint("hook", receiver.url("/hook"), concurrency=1)
    doomed = await demo.subscription(endpoint, "doomed")
    await demo.subscription(endpoint, "kept", types=["kept.*"])
    hold = asyncio.Event()
    receiver.script("/hook", Behaviour(hold=hold))
    await demo.publish(*[event(data=b"%d" % n) for n in range(300)])
    await soon(receiver.wait_for(1))
    await small_lanes.balance_when(lambda b: b.owed > 0)
    await demo.publish(event("kept.a"))
    await demo.admin.call(
        "DeleteSubscription", subscription_service_pb2.DeleteSubscriptionRequest(name=doomed)
    )
    hold.set()
    balance = await small_lanes.balance_when(lambda b: b.delivered + b.cancelled == 302)
    assert balance.delivered >= 2
    assert balance.cancelled >= 290
    assert not await small_lanes.fetch("SELECT FROM owed")
    reasons = await small_lanes.fetch("SELECT DISTINCT verdict, reason FROM dead_letter")
    assert [tuple(row) for row in reasons] == [(4, "subscription deleted")]


async def test_a_deleted_subscription_is_cancelled_after_a_crash_too(
    small_lanes: RunningNode, receiver: Receiver
) -> None:
    demo = await small_lanes.tenant()
    endpoint = await demo.endpoint("hook", receiver.url("/hook"), concurrency=1)
    doomed = await demo.subscription(endpoint, "doomed")
    receiver.always("/hook", Behaviour(hold=asyncio.Event()))
    await demo.publish(*[event() for _ in range(50)])
    await small_lanes.balance_when(lambda b: b.owed > 0)
    await small_lanes.crash()
    await small_lanes.fetch("UPDATE subscription SET state = 3, deleted_at = now()")
    await small_lanes.start()
    assert doomed
    balance = await small_lanes.balance_when(lambda b: b.cancelled == 50)
    assert balance.matched == 50


async def test_deliveries_of_a_tenant_that_is_deleted_are_cancelled_not_forgotten(
    node: RunningNode, receiver: Receiver
) -> None:
    demo = await node.tenant()
    await demo.subscription(await demo.endpoint("hook", receiver.url("/hook")))
    receiver.always("/hook", Behaviour(hold=asyncio.Event()))
    await demo.publish(*[event() for _ in range(5)])
    await soon(receiver.wait_for(5))
    await node.crash()
    await node.fetch("UPDATE subscription SET state = 3, deleted_at = now()")
    await node.fetch("UPDATE endpoint SET state = 4, deleted_at = now()")
    await node.fetch("UPDATE tenant SET deleted_at = now()")
    await node.start()
    balance = await node.balance_when(lambda b: b.cancelled == 5)
    assert (balance.matched, balance.owed, balance.window) == (5, 0, 0)


async def test_events_of_a_deleted_tenant_are_refused(
    node: RunningNode, receiver: Receiver
) -> None:
    await node.tenant("demo")
    async with node.stream(node.admin_key) as stream:
        await stream.open()
        await stream.publish(1, [event()])
        await node.admin.call(
            "DeleteTenant", tenant_service_pb2.DeleteTenantRequest(name="tenants/demo")
        )
        assert errors_of((await stream.publish(2, [event()])).results) == {0: "UNKNOWN_TENANT"}


async def test_both_secrets_sign_while_a_rotation_overlaps(
    node: RunningNode, receiver: Receiver
) -> None:
    demo = await node.tenant()
    old = "whsec_" + "b2xk" * 8
    endpoint = await demo.endpoint("hook", receiver.url("/hook"), secret=old)
    await demo.subscription(endpoint)
    rotated = await demo.admin.call(
        "RotateEndpointSecret",
        endpoint_service_pb2.RotateEndpointSecretRequest(name=endpoint, overlap={"seconds": 60}),
    )
    keys = [b64decode(text.removeprefix("whsec_")) for text in (old, rotated.secret)]
    for key in keys:
        receiver.secrets("/hook", key)
        await demo.publish(event())
        await soon(receiver.wait_for(keys.index(key) + 1))
        assert receiver.requests[-1].signed
    assert len(receiver.requests[-1].headers["webhook-signature"].split()) == 2


async def test_a_change_that_could_not_be_read_at_once_is_read_later(
    node: RunningNode, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = await node.tenant()
    endpoint = await demo.endpoint("hook", receiver.url("/hook"))
    read, failed = Node._changed_in, asyncio.Event()

    async def fails_once(self: Node, *arguments: Any) -> None:
        if not failed.is_set():
            failed.set()
            raise Unavailable("STORAGE_UNAVAILABLE", "not now")
        await read(self, *arguments)

    monkeypatch.setattr(Node, "_changed_in", fails_once)
    request = subscription_service_pb2.CreateSubscriptionRequest(
        parent="tenants/demo", subscription={"endpoint": endpoint, "types": ["*"]}
    )
    assert (await demo.admin.refused("CreateSubscription", request)).reason == "STORAGE_UNAVAILABLE"
    entry = node.node._directory.by_name["demo"]
    await until(lambda: node.node._directory.by_name["demo"].version > entry.version)
    await demo.publish(event())
    await soon(receiver.wait_for_deliveries(1))
