"""SubscriptionService on a real channel and a real database."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from tests.support.api import Api, As, endpoint_request, running, subscription_request
from tests.support.postgres import Database

from outrider.v1 import subscription_pb2
from outrider.v1 import subscription_service_pb2 as pb
from outrider_server.api.limits import Limits
from outrider_server.storage.configuration import load_tenant

Subscription = subscription_pb2.Subscription


@pytest.fixture
async def acme(api: Api) -> As:
    caller = await api.tenant("acme")
    _ = await caller.call("CreateEndpoint", endpoint_request("acme", "orders"))
    return caller


def update(name: str, *mask: str, **fields: Any) -> pb.UpdateSubscriptionRequest:
    return pb.UpdateSubscriptionRequest(
        subscription={"name": name, **fields}, update_mask=FieldMask(paths=mask)
    )


async def test_created_subscription_reads_back_and_is_told_before_the_answer(
    api: Api, acme: As
) -> None:
    told = len(api.changed)
    made = await acme.call(
        "CreateSubscription",
        subscription_request(
            "acme",
            "orders",
            "large",
            types=["sales.*", "x"],
            filter="order.total > 100",
            display_name="L",
        ),
    )
    assert len(api.changed) == told + 1
    assert made.name == "tenants/acme/subscriptions/large"
    assert made.endpoint == "tenants/acme/endpoints/orders"
    assert (list(made.types), made.filter) == (["sales.*", "x"], "order.total > 100")
    assert made.state == Subscription.STATE_ACTIVE
    assert await acme.call("GetSubscription", pb.GetSubscriptionRequest(name=made.name)) == made
    async with api.database.connection() as connection:
        configuration = await load_tenant(connection, api.sealer, api.changed[-1])
    assert configuration is not None
    (loaded,) = configuration.subscriptions
    assert loaded.filter_ast
    assert loaded.endpoint == configuration.endpoints[0].id


@pytest.mark.parametrize(
    ("fields", "reason", "field"),
    [
        ({"types": []}, "INVALID_ARGUMENT", "subscription.types"),
        ({"types": ["Sales"]}, "INVALID_TYPE_PATTERN", "subscription.types[0]"),
        ({"types": ["a", "*.b"]}, "INVALID_TYPE_PATTERN", "subscription.types[1]"),
        ({"types": ["a", "a"]}, "INVALID_ARGUMENT", "subscription.types[1]"),
        ({"types": ["a"] * 101}, "INVALID_ARGUMENT", "subscription.types"),
        ({"filter": "x" * 4097}, "INVALID_ARGUMENT", "subscription.filter"),
        ({"filter": "a\0"}, "INVALID_TEXT", "subscription.filter"),
        ({"endpoint": ""}, "INVALID_ARGUMENT", "subscription.endpoint"),
        ({"endpoint": "orders"}, "INVALID_ARGUMENT", "subscription.endpoint"),
        ({"endpoint": "tenants/b/endpoints/orders"}, "INVALID_ARGUMENT", "subscription.endpoint"),
    ],
)
async def test_wrong_field_is_named_with_its_reason(
    acme: As, fields: dict[str, Any], reason: str, field: str
) -> None:
    refused = await acme.refused(
        "CreateSubscription", subscription_request("acme", "orders", "x", **fields)
    )
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.reason == reason
    assert list(refused.violations) == [field]


@pytest.mark.parametrize("filter_text", ["order.total >\n  &&", "1 + 1", "nofunction(order)"])
async def test_wrong_filter_is_told_with_line_and_column(acme: As, filter_text: str) -> None:
    made = await acme.call("CreateSubscription", subscription_request("acme", "orders", "ok"))
    for method, request in (
        (
            "CreateSubscription",
            subscription_request("acme", "orders", "x", filter=filter_text),
        ),
        ("UpdateSubscription", update(made.name, "filter", filter=filter_text)),
        ("UpdateSubscription", update(made.name, filter=filter_text)),
    ):
        refused = await acme.refused(method, request)
        assert (refused.code, refused.reason) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_FILTER",
        )
        assert list(refused.violations) == ["subscription.filter"]
        assert int(refused.metadata["line"]) == (2 if "\n" in filter_text else 1)
        assert int(refused.metadata["column"]) >= 1


async def test_endpoint_must_exist(acme: As) -> None:
    refused = await acme.refused("CreateSubscription", subscription_request("acme", "none", "x"))
    assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND")
    assert refused.resource == "tenants/acme/endpoints/none"


async def test_update_changes_filter_and_keeps_every_revision(api: Api, acme: As) -> None:
    made = await acme.call(
        "CreateSubscription", subscription_request("acme", "orders", "s", filter="a > 1")
    )
    renamed = await acme.call("UpdateSubscription", update(made.name, display_name="name"))
    assert (renamed.display_name, renamed.filter) == ("name", "a > 1")
    changed = await acme.call("UpdateSubscription", update(made.name, "filter", filter="a > 2"))
    assert changed.filter == "a > 2"
    cleared = await acme.call("UpdateSubscription", update(made.name, "filter"))
    assert cleared.filter == ""
    async with api.database.connection() as connection:
        rows = await connection.fetch(
            "SELECT filter, filter_ast, config_version FROM subscription_revision ORDER BY version"
        )
    assert [row["filter"] for row in rows] == ["a > 1", "a > 1", "a > 2", ""]
    assert rows[0]["filter_ast"] == rows[1]["filter_ast"] != rows[2]["filter_ast"]
    assert rows[3]["filter_ast"] is None
    versions = [row["config_version"] for row in rows]
    assert versions == sorted(set(versions))


async def test_filter_outside_the_mask_is_not_looked_at(acme: As) -> None:
    made = await acme.call("CreateSubscription", subscription_request("acme", "orders", "s"))
    updated = await acme.call(
        "UpdateSubscription", update(made.name, "types", types=["b"], filter="not a filter (")
    )
    assert (list(updated.types), updated.filter) == (["b"], "")


async def test_endpoint_of_a_subscription_cannot_change(acme: As) -> None:
    _ = await acme.call("CreateEndpoint", endpoint_request("acme", "other"))
    made = await acme.call("CreateSubscription", subscription_request("acme", "orders", "s"))
    same = await acme.call("UpdateSubscription", pb.UpdateSubscriptionRequest(subscription=made))
    assert same.endpoint == made.endpoint
    for mask in ((), ("endpoint",)):
        refused = await acme.refused(
            "UpdateSubscription", update(made.name, *mask, endpoint="tenants/acme/endpoints/other")
        )
        assert list(refused.violations) == ["update_mask"]


async def test_states_follow_each_other(acme: As) -> None:
    made = await acme.call("CreateSubscription", subscription_request("acme", "orders", "s"))
    pause, resume = (
        pb.PauseSubscriptionRequest(name=made.name),
        pb.ResumeSubscriptionRequest(name=made.name),
    )
    assert (await acme.refused("ResumeSubscription", resume)).reason == "WRONG_STATE"
    assert (await acme.call("PauseSubscription", pause)).state == Subscription.STATE_PAUSED
    assert (await acme.refused("PauseSubscription", pause)).reason == "WRONG_STATE"
    assert (await acme.call("ResumeSubscription", resume)).state == Subscription.STATE_ACTIVE


async def test_pages_etags_and_dry_runs(acme: As) -> None:
    for name in ("c", "a", "b"):
        _ = await acme.call("CreateSubscription", subscription_request("acme", "orders", name))
    first = await acme.call(
        "ListSubscriptions", pb.ListSubscriptionsRequest(parent="tenants/acme", page_size=2)
    )
    second = await acme.call(
        "ListSubscriptions",
        pb.ListSubscriptionsRequest(parent="tenants/acme", page_token=first.next_page_token),
    )
    found = [s.name[-1] for s in (*first.subscriptions, *second.subscriptions)]
    assert (found, second.next_page_token) == (["a", "b", "c"], "")
    dry = subscription_request("acme", "orders", "d")
    dry.validate_only = True
    _ = await acme.call("CreateSubscription", dry)
    name = "tenants/acme/subscriptions/d"
    assert (
        await acme.refused("GetSubscription", pb.GetSubscriptionRequest(name=name))
    ).reason == "RESOURCE_NOT_FOUND"
    stale = pb.DeleteSubscriptionRequest(name="tenants/acme/subscriptions/a", etag="x")
    assert (await acme.refused("DeleteSubscription", stale)).reason == "ETAG_MISMATCH"
    taken = await acme.refused("CreateSubscription", subscription_request("acme", "orders", "a"))
    assert taken.reason == "RESOURCE_EXISTS"


async def test_deleted_subscription_frees_its_name_and_its_endpoint(api: Api, acme: As) -> None:
    made = await acme.call("CreateSubscription", subscription_request("acme", "orders", "s"))
    _ = await acme.call("DeleteSubscription", pb.DeleteSubscriptionRequest(name=made.name))
    again = await acme.call("CreateSubscription", subscription_request("acme", "orders", "s"))
    assert again.etag != made.etag
    async with api.database.connection() as connection:
        configuration = await load_tenant(connection, api.sealer, api.changed[-1])
        ids = await connection.fetch("SELECT id FROM subscription ORDER BY id")
    assert configuration is not None
    assert [s.id for s in configuration.subscriptions] == [ids[-1]["id"]]
    assert len(ids) == 2


async def test_limit_of_subscriptions_is_kept(database: Database) -> None:
    async with running(database.dsn, limits=Limits(subscriptions_max=1)) as api:
        acme = await api.tenant("acme")
        _ = await acme.call("CreateEndpoint", endpoint_request("acme", "e"))
        _ = await acme.call("CreateSubscription", subscription_request("acme", "e", "a"))
        refused = await acme.refused("CreateSubscription", subscription_request("acme", "e", "b"))
        assert refused.reason == "LIMIT_REACHED"
