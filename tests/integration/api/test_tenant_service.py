"""TenantService, and what keys of one tenant see of another."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from google.protobuf.field_mask_pb2 import FieldMask
from tests.support.api import Api, endpoint_request, subscription_request

from outrider.v1 import (
    api_key_pb2,
    api_key_service_pb2,
    endpoint_service_pb2,
    event_type_service_pb2,
    subscription_service_pb2,
)
from outrider.v1 import tenant_service_pb2 as pb
from outrider_server.domain.sequence import SHARD_COUNT

Role = api_key_pb2.ApiKey


def create(name: str = "", **fields: Any) -> pb.CreateTenantRequest:
    return pb.CreateTenantRequest(tenant_id=name, tenant=fields)


async def test_tenant_is_made_read_changed_and_deleted(api: Api) -> None:
    made = await api.admin.call("CreateTenant", create("acme", display_name="A", strict_types=True))
    assert (made.name, made.display_name, made.strict_types) == ("tenants/acme", "A", True)
    assert await api.admin.call("GetTenant", pb.GetTenantRequest(name=made.name)) == made
    updated = await api.admin.call(
        "UpdateTenant",
        pb.UpdateTenantRequest(
            tenant={"name": made.name, "etag": made.etag},
            update_mask=FieldMask(paths=["strict_types"]),
        ),
    )
    assert (updated.strict_types, updated.display_name) == (False, "A")
    stale = pb.DeleteTenantRequest(name=made.name, etag=made.etag)
    assert (await api.admin.refused("DeleteTenant", stale)).reason == "ETAG_MISMATCH"
    _ = await api.admin.call("DeleteTenant", pb.DeleteTenantRequest(name=made.name))
    missing = await api.admin.refused("GetTenant", pb.GetTenantRequest(name=made.name))
    assert (missing.code, missing.resource) == (grpc.StatusCode.NOT_FOUND, "tenants/acme")
    taken = await api.admin.refused("CreateTenant", create("acme"))
    assert taken.reason == "RESOURCE_EXISTS"
    assert len(api.changed) == 3


async def test_tenant_with_endpoints_is_not_deleted(api: Api) -> None:
    acme = await api.tenant("acme")
    _ = await acme.call("CreateEndpoint", endpoint_request("acme", "e"))
    refused = await api.admin.refused("DeleteTenant", pb.DeleteTenantRequest(name="tenants/acme"))
    assert refused.reason == "RESOURCE_IN_USE"


async def test_keys_end_with_their_tenant(api: Api) -> None:
    acme = await api.tenant("acme")
    _ = await api.admin.call("DeleteTenant", pb.DeleteTenantRequest(name="tenants/acme"))
    refused = await acme.refused("GetTenant", pb.GetTenantRequest(name="tenants/acme"))
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAUTHENTICATED, "REVOKED_API_KEY")


async def test_tenants_made_at_once_spread_over_the_shards(api: Api) -> None:
    made = await asyncio.gather(*(api.admin.call("CreateTenant", create()) for _ in range(12)))
    assert sorted(tenant.shard for tenant in made) == list(range(12))
    async with api.database.connection() as connection:
        _ = await connection.execute(
            "INSERT INTO tenant (name, shard, shards)"
            " SELECT 'x' || n, n, ARRAY[n]::smallint[] FROM generate_series(12, $1) AS n",
            SHARD_COUNT - 1,
        )
        _ = await connection.execute("UPDATE tenant SET deleted_at = now() WHERE shard = 40")
    next_one = await api.admin.call("CreateTenant", create())
    assert next_one.shard == 40


async def test_list_pages_through_every_tenant(api: Api) -> None:
    for name in ("b", "c", "a"):
        _ = await api.admin.call("CreateTenant", create(name))
    first = await api.admin.call("ListTenants", pb.ListTenantsRequest(page_size=2))
    second = await api.admin.call(
        "ListTenants", pb.ListTenantsRequest(page_token=first.next_page_token)
    )
    found = [tenant.name for tenant in (*first.tenants, *second.tenants)]
    assert (found, second.next_page_token) == (["tenants/a", "tenants/b", "tenants/c"], "")


async def test_wrong_tenant_requests_are_refused(api: Api) -> None:
    _ = await api.admin.call("CreateTenant", create("acme"))
    for method, request, field in (
        ("CreateTenant", create("A"), "tenant_id"),
        ("CreateTenant", create("a", display_name="x" * 257), "tenant.display_name"),
        ("CreateTenant", pb.CreateTenantRequest(tenant_id="a"), "tenant"),
        ("GetTenant", pb.GetTenantRequest(name="acme"), "name"),
        ("GetTenant", pb.GetTenantRequest(), "name"),
        ("UpdateTenant", pb.UpdateTenantRequest(), "tenant"),
        (
            "UpdateTenant",
            pb.UpdateTenantRequest(
                tenant={"name": "tenants/acme"}, update_mask=FieldMask(paths=["shard"])
            ),
            "update_mask",
        ),
        ("DeleteTenant", pb.DeleteTenantRequest(name="tenants/"), "name"),
    ):
        refused = await api.admin.refused(method, request)
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT, method
        assert list(refused.violations) == [field]


async def test_dry_run_of_a_tenant_makes_none(api: Api) -> None:
    request = create("acme")
    request.validate_only = True
    _ = await api.admin.call("CreateTenant", request)
    assert api.changed == []
    _ = await api.admin.call("CreateTenant", create("acme"))


async def test_nothing_of_a_tenant_is_visible_to_a_key_of_another(api: Api) -> None:
    """Every call about another tenant gets one answer, whether that tenant, or what is asked for, exists or not."""
    acme, other = await api.tenant("acme"), await api.tenant("other")
    _ = await acme.call("CreateEndpoint", endpoint_request("acme", "e"))
    _ = await acme.call("CreateSubscription", subscription_request("acme", "e", "s"))
    answers = set()
    for tenant in ("acme", "none"):
        parent = f"tenants/{tenant}"
        endpoint, subscription = f"{parent}/endpoints/e", f"{parent}/subscriptions/s"
        event_type, key = f"{parent}/eventTypes/t", f"{parent}/apiKeys/k"
        subscription_fields = {"endpoint": endpoint, "types": ["a"]}
        e, s, t, k = (
            endpoint_service_pb2,
            subscription_service_pb2,
            event_type_service_pb2,
            api_key_service_pb2,
        )
        for method, request in (
            ("CreateEndpoint", endpoint_request(tenant, "x")),
            ("GetEndpoint", e.GetEndpointRequest(name=endpoint)),
            ("ListEndpoints", e.ListEndpointsRequest(parent=parent)),
            ("UpdateEndpoint", e.UpdateEndpointRequest(endpoint={"name": endpoint})),
            ("DeleteEndpoint", e.DeleteEndpointRequest(name=endpoint)),
            ("PauseEndpoint", e.PauseEndpointRequest(name=endpoint)),
            ("ResumeEndpoint", e.ResumeEndpointRequest(name=endpoint)),
            ("EnableEndpoint", e.EnableEndpointRequest(name=endpoint)),
            ("RotateEndpointSecret", e.RotateEndpointSecretRequest(name=endpoint)),
            ("CreateSubscription", subscription_request(tenant, "e", "x")),
            ("GetSubscription", s.GetSubscriptionRequest(name=subscription)),
            ("ListSubscriptions", s.ListSubscriptionsRequest(parent=parent)),
            (
                "UpdateSubscription",
                s.UpdateSubscriptionRequest(
                    subscription={"name": subscription, **subscription_fields}
                ),
            ),
            ("DeleteSubscription", s.DeleteSubscriptionRequest(name=subscription)),
            ("PauseSubscription", s.PauseSubscriptionRequest(name=subscription)),
            ("ResumeSubscription", s.ResumeSubscriptionRequest(name=subscription)),
            (
                "CreateEventType",
                t.CreateEventTypeRequest(parent=parent, event_type_id="t", event_type={}),
            ),
            ("GetEventType", t.GetEventTypeRequest(name=event_type)),
            ("ListEventTypes", t.ListEventTypesRequest(parent=parent)),
            ("UpdateEventType", t.UpdateEventTypeRequest(event_type={"name": event_type})),
            ("DeleteEventType", t.DeleteEventTypeRequest(name=event_type)),
            ("GetTenant", pb.GetTenantRequest(name=parent)),
            ("UpdateTenant", pb.UpdateTenantRequest(tenant={"name": parent})),
            (
                "CreateApiKey",
                k.CreateApiKeyRequest(parent=parent, api_key={"role": Role.ROLE_PUBLISHER}),
            ),
            ("GetApiKey", k.GetApiKeyRequest(name=key)),
            ("ListApiKeys", k.ListApiKeysRequest(parent=parent)),
            ("DeleteApiKey", k.DeleteApiKeyRequest(name=key)),
        ):
            refused = await other.refused(method, request)
            assert refused.code is grpc.StatusCode.PERMISSION_DENIED, method
            answers.add((refused.reason, refused.message, str(refused.metadata)))
    assert len(answers) == 1
    assert answers.pop()[0] == "TENANT_OUT_OF_SCOPE"


async def test_roles_allow_what_the_table_says(api: Api) -> None:
    acme = await api.tenant("acme")
    publisher = api.caller(await api.key("acme", Role.ROLE_PUBLISHER))
    for caller, method, request in (
        (publisher, "GetTenant", pb.GetTenantRequest(name="tenants/acme")),
        (publisher, "CreateEndpoint", endpoint_request("acme")),
        (acme, "CreateTenant", create("b")),
        (acme, "ListTenants", pb.ListTenantsRequest()),
        (acme, "DeleteTenant", pb.DeleteTenantRequest(name="tenants/acme")),
    ):
        refused = await caller.refused(method, request)
        assert (refused.code, refused.reason) == (
            grpc.StatusCode.PERMISSION_DENIED,
            "ROLE_TOO_LOW",
        ), method
    assert (await acme.call("GetTenant", pb.GetTenantRequest(name="tenants/acme"))).shard == 0
