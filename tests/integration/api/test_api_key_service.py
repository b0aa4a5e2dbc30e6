"""ApiKeyService on a real channel and a real database."""

from __future__ import annotations

import datetime
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from tests.support.api import Api, As, running
from tests.support.postgres import Database

from outrider.v1 import api_key_pb2
from outrider.v1 import api_key_service_pb2 as pb
from outrider.v1 import tenant_service_pb2 as tenants_pb
from outrider_server.access.keys import is_well_formed
from outrider_server.api.limits import Limits

Role = api_key_pb2.ApiKey
ACME = "tenants/acme"


@pytest.fixture
async def acme(api: Api) -> As:
    return await api.tenant("acme")


def create(name: str = "", parent: str = ACME, **fields: Any) -> pb.CreateApiKeyRequest:
    fields.setdefault("role", Role.ROLE_PUBLISHER)
    return pb.CreateApiKeyRequest(parent=parent, api_key_id=name, api_key=fields)


def at(seconds_from_now: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromDatetime(
        datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds_from_now)
    )
    return timestamp


async def test_key_works_is_told_once_and_stored_as_a_hash(api: Api, acme: As) -> None:
    made = await acme.call(
        "CreateApiKey", create("ci", role=Role.ROLE_INTEGRATION_ADMIN, display_name="CI")
    )
    assert made.name == "tenants/acme/apiKeys/ci"
    assert is_well_formed(made.key)
    assert await api.caller(made.key).call("GetTenant", tenants_pb.GetTenantRequest(name=ACME))
    read = await acme.call("GetApiKey", pb.GetApiKeyRequest(name=made.name))
    assert (read.key, read.display_name, read.role) == ("", "CI", Role.ROLE_INTEGRATION_ADMIN)
    assert not read.HasField("revoke_time")
    async with api.database.connection() as connection:
        rows = await connection.fetch("SELECT api_key::text AS row FROM api_key")
    assert not any(made.key[-40:] in row["row"] for row in rows)


async def test_deleted_key_ends_at_once_and_stays_listed(api: Api, acme: As) -> None:
    made = await acme.call("CreateApiKey", create("ci", role=Role.ROLE_INTEGRATION_ADMIN))
    holder = api.caller(made.key)
    _ = await holder.call("GetTenant", tenants_pb.GetTenantRequest(name=ACME))
    for _ in range(2):  # a repeated revocation is no error
        _ = await acme.call("DeleteApiKey", pb.DeleteApiKeyRequest(name=made.name))
    refused = await holder.refused("GetTenant", tenants_pb.GetTenantRequest(name=ACME))
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAUTHENTICATED, "REVOKED_API_KEY")
    listed = await acme.call("ListApiKeys", pb.ListApiKeysRequest(parent=ACME))
    (revoked,) = [key for key in listed.api_keys if key.name == made.name]
    assert revoked.HasField("revoke_time")
    missing = await acme.refused("DeleteApiKey", pb.DeleteApiKeyRequest(name=f"{ACME}/apiKeys/x"))
    assert missing.code is grpc.StatusCode.NOT_FOUND


async def test_tenants_do_not_meet_in_names_of_keys(api: Api, acme: As) -> None:
    other = await api.tenant("other")
    mine = await acme.call("CreateApiKey", create("ci"))
    theirs = await other.call("CreateApiKey", create("ci", parent="tenants/other"))
    assert mine.key != theirs.key
    taken = await acme.refused("CreateApiKey", create("ci"))
    assert (taken.code, taken.resource) == (grpc.StatusCode.ALREADY_EXISTS, mine.name)
    _ = await other.call("DeleteApiKey", pb.DeleteApiKeyRequest(name=theirs.name))
    assert not (await acme.call("GetApiKey", pb.GetApiKeyRequest(name=mine.name))).HasField(
        "revoke_time"
    )


async def test_keys_of_no_tenant_are_for_system_admins_alone(api: Api, acme: As) -> None:
    made = await api.admin.call(
        "CreateApiKey", create("root", parent="", role=Role.ROLE_SYSTEM_ADMIN)
    )
    assert made.name == "apiKeys/root"
    assert await api.caller(made.key).call("ListTenants", tenants_pb.ListTenantsRequest())
    listed = await api.admin.call("ListApiKeys", pb.ListApiKeysRequest(page_size=1))
    assert listed.next_page_token
    for method, request in (
        ("CreateApiKey", create("x", parent="", role=Role.ROLE_SYSTEM_ADMIN)),
        ("GetApiKey", pb.GetApiKeyRequest(name=made.name)),
        ("ListApiKeys", pb.ListApiKeysRequest()),
        ("DeleteApiKey", pb.DeleteApiKeyRequest(name=made.name)),
    ):
        refused = await acme.refused(method, request)
        assert refused.code is grpc.StatusCode.PERMISSION_DENIED, method


async def test_key_of_a_tenant_cannot_become_a_system_admin(api: Api, acme: As) -> None:
    for caller, request in (
        (acme, create(role=Role.ROLE_SYSTEM_ADMIN)),
        (api.admin, create(role=Role.ROLE_SYSTEM_ADMIN)),
        (api.admin, create(parent="", role=Role.ROLE_PUBLISHER)),
        (acme, create(role=Role.ROLE_UNSPECIFIED)),
        (acme, create(role=9)),
    ):
        refused = await caller.refused("CreateApiKey", request)
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        assert list(refused.violations) == ["api_key.role"]


async def test_expiry_must_lie_ahead_and_ends_the_key(api: Api, acme: As) -> None:
    for wrong in (at(-1), Timestamp(seconds=10**15)):
        refused = await acme.refused("CreateApiKey", create("x", expire_time=wrong))
        assert list(refused.violations) == ["api_key.expire_time"]
    made = await acme.call(
        "CreateApiKey", create("x", role=Role.ROLE_INTEGRATION_ADMIN, expire_time=at(3600))
    )
    assert made.HasField("expire_time")
    holder = api.caller(made.key)
    _ = await holder.call("GetTenant", tenants_pb.GetTenantRequest(name=ACME))
    async with api.database.connection() as connection:
        _ = await connection.execute("UPDATE api_key SET expires_at = now() WHERE id LIKE '%/x'")
    assert len(await api.keys.revalidate()) == 1
    refused = await holder.refused("GetTenant", tenants_pb.GetTenantRequest(name=ACME))
    assert refused.reason == "INVALID_API_KEY"


async def test_dry_run_makes_no_key(acme: As) -> None:
    request = create("x")
    request.validate_only = True
    assert (await acme.call("CreateApiKey", request)).key == ""
    missing = await acme.refused("GetApiKey", pb.GetApiKeyRequest(name=f"{ACME}/apiKeys/x"))
    assert missing.code is grpc.StatusCode.NOT_FOUND


async def test_list_pages_through_a_tenants_keys(api: Api, acme: As) -> None:
    for name in ("zb", "za", "zc"):
        _ = await acme.call("CreateApiKey", create(name))
    names: list[str] = []
    token = ""
    while True:
        page = await acme.call(
            "ListApiKeys", pb.ListApiKeysRequest(parent=ACME, page_size=2, page_token=token)
        )
        names += [key.name.rpartition("/")[2] for key in page.api_keys]
        token = page.next_page_token
        if not token:
            break
    assert len(names) == 4
    assert [name for name in names if name.startswith("z") and len(name) == 2] == ["za", "zb", "zc"]


async def test_limit_of_keys_counts_those_that_hold(database: Database) -> None:
    async with running(database.dsn, limits=Limits(api_keys_max=2)) as api:
        acme = await api.tenant("acme")
        _ = await acme.call("CreateApiKey", create("a"))
        assert (await acme.refused("CreateApiKey", create("b"))).reason == "LIMIT_REACHED"
        _ = await acme.call("DeleteApiKey", pb.DeleteApiKeyRequest(name=f"{ACME}/apiKeys/a"))
        _ = await acme.call("CreateApiKey", create("b"))
