"""EndpointService on a real channel and a real database."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from tests.support.api import Api, As, endpoint_request, running, subscription_request
from tests.support.postgres import Database

from outrider.v1 import endpoint_pb2
from outrider.v1 import endpoint_service_pb2 as pb
from outrider_server.api.limits import Limits
from outrider_server.policy.signing import format_secret, parse_secret
from outrider_server.storage.configuration import load_tenant

Endpoint = endpoint_pb2.Endpoint


@pytest.fixture
async def acme(api: Api) -> As:
    return await api.tenant("acme")


def update(name: str, *mask: str, **fields: Any) -> pb.UpdateEndpointRequest:
    return pb.UpdateEndpointRequest(
        endpoint={"name": name, **fields}, update_mask=FieldMask(paths=mask)
    )


async def test_created_endpoint_shows_what_is_in_force_and_its_secret_once(acme: As) -> None:
    made = await acme.call("CreateEndpoint", endpoint_request("acme", "orders"))
    assert made.name == "tenants/acme/endpoints/orders"
    assert (made.mode, made.concurrency, made.attempt_timeout.seconds) == (
        Endpoint.MODE_SINGLE,
        8,
        30,
    )
    assert (made.retry.factor, made.retry.attempts_max, made.retry.jitter) == (3, 20, 0.2)
    assert made.state == Endpoint.STATE_ACTIVE
    assert not made.HasField("batch")
    assert len(parse_secret(made.secret)) == 32
    read = await acme.call("GetEndpoint", pb.GetEndpointRequest(name=made.name))
    assert read.secret == ""
    made.secret = ""
    assert read == made


async def test_given_values_are_kept(api: Api, acme: As) -> None:
    secret = format_secret(b"k" * 24)
    made = await acme.call(
        "CreateEndpoint",
        endpoint_request(
            "acme",
            "orders",
            display_name="Orders",
            url="http://10.0.0.1:8080/x?y=1",
            headers={"X-B": "2", "X-A": "1"},
            mode=Endpoint.MODE_BATCH,
            batch={"events_max": 7, "linger": {"seconds": 1, "nanos": 500_000_000}},
            retry={"base": {"seconds": 1}, "factor": 2, "jitter": 0.0, "window": {"seconds": 60}},
            concurrency=3,
            attempt_timeout={"seconds": 5},
            secret=secret,
        ),
    )
    assert made.secret == secret
    assert made.batch.bytes_max == 1024 * 1024
    async with api.database.connection() as connection:
        configuration = await load_tenant(connection, api.sealer, api.changed[0])
    assert configuration is not None
    (loaded,) = configuration.endpoints
    assert loaded.secrets == (b"k" * 24,)
    assert loaded.headers == (("X-A", "1"), ("X-B", "2"))
    assert (loaded.batch.events_max, loaded.batch.linger_ms) == (7, 1500.0)
    assert (loaded.retry.base_seconds, loaded.retry.jitter, loaded.retry.window_seconds) == (
        1,
        0,
        60,
    )
    assert (loaded.concurrency, loaded.attempt_timeout_seconds) == (3, 5.0)


async def test_server_chooses_ids(acme: As) -> None:
    first = await acme.call("CreateEndpoint", endpoint_request("acme"))
    second = await acme.call("CreateEndpoint", endpoint_request("acme"))
    assert first.name != second.name


@pytest.mark.parametrize(
    ("fields", "reason", "field"),
    [
        ({"url": ""}, "INVALID_ARGUMENT", "endpoint.url"),
        ({"url": "ftp://example.com"}, "INVALID_ENDPOINT_URL", "endpoint.url"),
        ({"url": "https://u:p@example.com"}, "INVALID_ENDPOINT_URL", "endpoint.url"),
        ({"url": "https://example.com/" + "x" * 2048}, "INVALID_ARGUMENT", "endpoint.url"),
        ({"headers": {"Host": "x"}}, "INVALID_HEADER", "endpoint.headers[0]"),
        ({"headers": {f"x-{i}": "" for i in range(33)}}, "INVALID_ARGUMENT", "endpoint.headers"),
        ({"secret": "whsec_AAAA"}, "INVALID_SECRET", "endpoint.secret"),
        ({"concurrency": 1001}, "INVALID_ARGUMENT", "endpoint.concurrency"),
        ({"batch": {"events_max": 5}}, "INVALID_ARGUMENT", "endpoint.batch"),
        ({"mode": 7}, "INVALID_ARGUMENT", "endpoint.mode"),
        ({"retry": {"factor": 0.5}}, "INVALID_ARGUMENT", "endpoint.retry.factor"),
        ({"retry": {"factor": float("nan")}}, "INVALID_ARGUMENT", "endpoint.retry.factor"),
        (
            {"retry": {"base": {"seconds": 9}, "maximum": {"seconds": 3}}},
            "INVALID_ARGUMENT",
            "endpoint.retry.base",
        ),
        ({"attempt_timeout": {"seconds": 301}}, "INVALID_ARGUMENT", "endpoint.attempt_timeout"),
        ({"rate_limit": {}}, "INVALID_ARGUMENT", "endpoint.rate_limit.requests"),
        (
            {"rate_limit": {"requests": 1, "period": {"nanos": 999_999_999}}},
            "INVALID_ARGUMENT",
            "endpoint.rate_limit.period",
        ),
        (
            {"rate_limit": {"requests": 2, "burst": 3}},
            "INVALID_ARGUMENT",
            "endpoint.rate_limit.burst",
        ),
        ({"display_name": "a\0b"}, "INVALID_TEXT", "endpoint.display_name"),
        ({"headers": {"x": "\0"}}, "INVALID_TEXT", "endpoint.headers"),
    ],
)
async def test_wrong_field_is_named_with_its_reason(
    acme: As, fields: dict[str, Any], reason: str, field: str
) -> None:
    refused = await acme.refused("CreateEndpoint", endpoint_request("acme", "x", **fields))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.reason == reason
    assert list(refused.violations) == [field]


@pytest.mark.parametrize("name", ["Orders", "a_b", "x" * 64, "a/b", "ä"])
async def test_malformed_id_is_refused(acme: As, name: str) -> None:
    refused = await acme.refused("CreateEndpoint", endpoint_request("acme", name))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert list(refused.violations) == ["endpoint_id"]


@pytest.mark.parametrize(
    "name", ["x", "tenants/acme", "tenants/acme/subscriptions/x", "tenants/acme/endpoints/X", "/"]
)
async def test_malformed_name_is_refused(acme: As, name: str) -> None:
    refused = await acme.refused("GetEndpoint", pb.GetEndpointRequest(name=name))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert list(refused.violations) == ["name"]


async def test_taken_name_is_told_and_nothing_changes(api: Api, acme: As) -> None:
    _ = await acme.call("CreateEndpoint", endpoint_request("acme", "orders"))
    told = len(api.changed)
    refused = await acme.refused("CreateEndpoint", endpoint_request("acme", "orders"))
    assert (refused.code, refused.reason) == (grpc.StatusCode.ALREADY_EXISTS, "RESOURCE_EXISTS")
    assert refused.resource == "tenants/acme/endpoints/orders"
    assert len(api.changed) == told


async def test_missing_endpoint_is_not_found(acme: As) -> None:
    name = "tenants/acme/endpoints/none"
    for method, request in (
        ("GetEndpoint", pb.GetEndpointRequest(name=name)),
        ("UpdateEndpoint", update(name, url="https://example.com")),
        ("DeleteEndpoint", pb.DeleteEndpointRequest(name=name)),
        ("PauseEndpoint", pb.PauseEndpointRequest(name=name)),
        ("ResumeEndpoint", pb.ResumeEndpointRequest(name=name)),
        ("EnableEndpoint", pb.EnableEndpointRequest(name=name)),
        ("RotateEndpointSecret", pb.RotateEndpointSecretRequest(name=name)),
    ):
        refused = await acme.refused(method, request)
        assert refused.code is grpc.StatusCode.NOT_FOUND, method
        assert refused.reason == "RESOURCE_NOT_FOUND"
        assert refused.resource == name


async def test_pages_hold_everything_once_in_order(acme: As) -> None:
    names = [f"e{index:02}" for index in range(7)]
    for name in reversed(names):
        _ = await acme.call("CreateEndpoint", endpoint_request("acme", name))
    seen: list[str] = []
    token, pages = "", 0
    while True:
        page = await acme.call(
            "ListEndpoints",
            pb.ListEndpointsRequest(parent="tenants/acme", page_size=3, page_token=token),
        )
        seen += [endpoint.name.rpartition("/")[2] for endpoint in page.endpoints]
        pages += 1
        token = page.next_page_token
        if not token:
            break
    assert (seen, pages) == (names, 3)
    assert all(endpoint.secret == "" for endpoint in page.endpoints)


async def test_page_token_of_another_query_is_refused(api: Api, acme: As) -> None:
    other = await api.tenant("other")
    for caller, tenant in ((acme, "acme"), (other, "other")):
        for name in ("a", "b"):
            _ = await caller.call("CreateEndpoint", endpoint_request(tenant, name))
    page = await acme.call(
        "ListEndpoints", pb.ListEndpointsRequest(parent="tenants/acme", page_size=1)
    )
    for token in (page.next_page_token, "x", "AAAA", "é", page.next_page_token + "A"):
        refused = await other.refused(
            "ListEndpoints", pb.ListEndpointsRequest(parent="tenants/other", page_token=token)
        )
        assert (refused.code, refused.reason) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_PAGE_TOKEN",
        )


async def test_large_pages_fit_what_clients_take(acme: As) -> None:
    headers = {f"x-{i}": "v" * 400 for i in range(15)}
    for index in range(3):
        _ = await acme.call(
            "CreateEndpoint",
            endpoint_request(
                "acme", f"e{index}", url="https://example.com/" + "x" * 2000, headers=headers
            ),
        )
    page = await acme.call("ListEndpoints", pb.ListEndpointsRequest(parent="tenants/acme"))
    assert len(page.endpoints) == 3


async def test_page_size_out_of_range_is_refused(acme: As) -> None:
    for size in (-1, 1001):
        refused = await acme.refused(
            "ListEndpoints", pb.ListEndpointsRequest(parent="tenants/acme", page_size=size)
        )
        assert list(refused.violations) == ["page_size"]


async def test_update_changes_what_the_mask_names_alone(acme: As) -> None:
    made = await acme.call(
        "CreateEndpoint", endpoint_request("acme", "orders", headers={"a": "1"}, display_name="old")
    )
    updated = await acme.call(
        "UpdateEndpoint",
        update(
            made.name,
            "display_name",
            display_name="new",
            url="https://other.example",
            concurrency=5,
        ),
    )
    assert (updated.display_name, updated.url, updated.concurrency) == ("new", made.url, 8)
    assert updated.etag != made.etag
    assert updated.secret == ""
    nested = await acme.call(
        "UpdateEndpoint",
        update(
            made.name,
            "retry.factor",
            "headers",
            retry={"factor": 4, "attempts_max": 2},
            headers={"b": "2"},
        ),
    )
    assert (nested.retry.factor, nested.retry.attempts_max) == (4, 20)
    assert dict(nested.headers) == {"b": "2"}
    cleared = await acme.call(
        "UpdateEndpoint", update(made.name, "headers", "display_name", "retry")
    )
    assert (dict(cleared.headers), cleared.display_name, cleared.retry.factor) == ({}, "", 3)


async def test_update_without_mask_changes_what_is_set(acme: As) -> None:
    made = await acme.call("CreateEndpoint", endpoint_request("acme", "orders", display_name="old"))
    made.url = "https://new.example/x"
    made.secret = ""
    updated = await acme.call("UpdateEndpoint", pb.UpdateEndpointRequest(endpoint=made))
    assert (updated.url, updated.display_name) == ("https://new.example/x", "old")
    whole = await acme.call("UpdateEndpoint", update(made.name, "*", url="https://whole.example"))
    assert (whole.url, whole.display_name) == ("https://whole.example", "")


async def test_rate_limit_is_set_changed_in_part_and_cleared(acme: As) -> None:
    made = await acme.call(
        "CreateEndpoint", endpoint_request("acme", "orders", rate_limit={"requests": 100})
    )
    limit = made.rate_limit
    assert (limit.requests, limit.period.seconds, limit.burst) == (100, 60, 1)
    read = await acme.call("GetEndpoint", pb.GetEndpointRequest(name=made.name))
    assert read.rate_limit == limit
    burst = await acme.call(
        "UpdateEndpoint",
        update(made.name, "rate_limit.burst", rate_limit={"requests": 7, "burst": 20}),
    )
    assert (burst.rate_limit.requests, burst.rate_limit.burst) == (100, 20)
    refused = await acme.refused(
        "UpdateEndpoint", update(made.name, "rate_limit.requests", rate_limit={"requests": 19})
    )
    assert list(refused.violations) == ["endpoint.rate_limit.burst"]
    whole = await acme.call(
        "UpdateEndpoint",
        update(made.name, rate_limit={"requests": 3, "period": {"seconds": 1}}),
    )
    limit = whole.rate_limit
    assert (limit.requests, limit.period.seconds, limit.burst) == (3, 1, 1)
    other = await acme.call("UpdateEndpoint", update(made.name, display_name="new"))
    assert other.rate_limit == limit
    cleared = await acme.call("UpdateEndpoint", update(made.name, "rate_limit"))
    assert not cleared.HasField("rate_limit")
    refused = await acme.refused(
        "UpdateEndpoint", update(made.name, "rate_limit.burst", rate_limit={"burst": 2})
    )
    assert list(refused.violations) == ["endpoint.rate_limit.requests"]
    assert not (await acme.call("GetEndpoint", pb.GetEndpointRequest(name=made.name))).HasField(
        "rate_limit"
    )


async def test_leaving_batch_mode_drops_the_batch_policy(acme: As) -> None:
    made = await acme.call(
        "CreateEndpoint",
        endpoint_request("acme", "orders", mode=Endpoint.MODE_BATCH, batch={"events_max": 9}),
    )
    updated = await acme.call(
        "UpdateEndpoint", update(made.name, "mode", mode=Endpoint.MODE_SINGLE)
    )
    assert not updated.HasField("batch")
    refused = await acme.refused(
        "UpdateEndpoint", update(made.name, "batch", batch={"events_max": 9})
    )
    assert list(refused.violations) == ["endpoint.batch"]


@pytest.mark.parametrize(
    ("mask", "fields", "field"),
    [
        (("nothing",), {}, "update_mask"),
        (("state",), {}, "update_mask"),
        (("name",), {}, "update_mask"),
        (("headers.x",), {}, "update_mask"),
        (("retry.nothing",), {}, "update_mask"),
        (("url.x",), {}, "update_mask"),
        (("url",), {"url": ""}, "endpoint.url"),
        (("url",), {"url": "ftp://x"}, "endpoint.url"),
        ((), {"secret": "whsec_x"}, "endpoint.secret"),
    ],
)
async def test_wrong_update_is_refused(
    acme: As, mask: tuple[str, ...], fields: dict[str, Any], field: str
) -> None:
    made = await acme.call("CreateEndpoint", endpoint_request("acme", "orders"))
    refused = await acme.refused("UpdateEndpoint", update(made.name, *mask, **fields))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert list(refused.violations) == [field]


async def test_etag_of_an_earlier_state_is_refused(acme: As) -> None:
    made = await acme.call("CreateEndpoint", endpoint_request("acme", "orders"))
    current = await acme.call(
        "UpdateEndpoint", update(made.name, "concurrency", concurrency=2, etag=made.etag)
    )
    for method, request in (
        ("UpdateEndpoint", update(made.name, "concurrency", concurrency=3, etag=made.etag)),
        ("DeleteEndpoint", pb.DeleteEndpointRequest(name=made.name, etag=made.etag)),
    ):
        refused = await acme.refused(method, request)
        assert (refused.code, refused.reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    _ = await acme.call(
        "DeleteEndpoint", pb.DeleteEndpointRequest(name=made.name, etag=current.etag)
    )
    again = await acme.call("CreateEndpoint", endpoint_request("acme", "orders"))
    assert again.etag != made.etag


async def test_validate_only_checks_everything_and_changes_nothing(api: Api, acme: As) -> None:
    request = endpoint_request("acme", "orders")
    request.validate_only = True
    tried = await acme.call("CreateEndpoint", request)
    assert (tried.name, tried.secret) == ("tenants/acme/endpoints/orders", "")
    missing = await acme.refused("GetEndpoint", pb.GetEndpointRequest(name=tried.name))
    assert missing.code is grpc.StatusCode.NOT_FOUND
    told = len(api.changed)
    made = await acme.call("CreateEndpoint", endpoint_request("acme", "orders"))
    assert (await acme.refused("CreateEndpoint", request)).reason == "RESOURCE_EXISTS"
    change = update(made.name, "concurrency", concurrency=2)
    change.validate_only = True
    assert (await acme.call("UpdateEndpoint", change)).concurrency == 2
    read = await acme.call("GetEndpoint", pb.GetEndpointRequest(name=made.name))
    assert (read.concurrency, read.etag) == (8, made.etag)
    assert len(api.changed) == told + 1


async def test_states_follow_each_other(api: Api, acme: As) -> None:
    made = await acme.call("CreateEndpoint", endpoint_request("acme", "orders"))
    name = made.name
    refused = await acme.refused("ResumeEndpoint", pb.ResumeEndpointRequest(name=name))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_STATE")
    paused = await acme.call("PauseEndpoint", pb.PauseEndpointRequest(name=name))
    assert paused.state == Endpoint.STATE_PAUSED
    assert (await acme.refused("PauseEndpoint", pb.PauseEndpointRequest(name=name))).metadata[
        "state"
    ] == "PAUSED"
    assert (
        await acme.refused("EnableEndpoint", pb.EnableEndpointRequest(name=name))
    ).reason == "WRONG_STATE"
    resumed = await acme.call("ResumeEndpoint", pb.ResumeEndpointRequest(name=name))
    assert resumed.state == Endpoint.STATE_ACTIVE
    async with api.database.connection() as connection:
        _ = await connection.execute("UPDATE endpoint SET state = 3")
    enabled = await acme.call("EnableEndpoint", pb.EnableEndpointRequest(name=name))
    assert enabled.state == Endpoint.STATE_ACTIVE


async def test_rotation_lets_both_secrets_sign_for_the_overlap(api: Api, acme: As) -> None:
    made = await acme.call("CreateEndpoint", endpoint_request("acme", "orders"))
    first = parse_secret(made.secret)

    async def loaded() -> tuple[bytes, ...]:
        async with api.database.connection() as connection:
            configuration = await load_tenant(connection, api.sealer, api.changed[0])
        assert configuration is not None
        return configuration.endpoints[0].secrets

    rotate = pb.RotateEndpointSecretRequest(name=made.name)
    rotated = await acme.call("RotateEndpointSecret", rotate)
    second = parse_secret(rotated.secret)
    assert await loaded() == (second, first)
    at_once = pb.RotateEndpointSecretRequest(
        name=made.name, secret=format_secret(b"3" * 32), overlap={"seconds": 0}
    )
    _ = await acme.call("RotateEndpointSecret", at_once)
    assert await loaded() == (b"3" * 32,)
    for _ in range(4):
        _ = await acme.call("RotateEndpointSecret", rotate)
    assert len(await loaded()) == 5
    refused = await acme.refused("RotateEndpointSecret", rotate)
    assert (refused.code, refused.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "LIMIT_REACHED",
    )


async def test_endpoint_in_use_is_not_deleted(acme: As) -> None:
    made = await acme.call("CreateEndpoint", endpoint_request("acme", "orders"))
    _ = await acme.call("CreateSubscription", subscription_request("acme", "orders", "s"))
    refused = await acme.refused("DeleteEndpoint", pb.DeleteEndpointRequest(name=made.name))
    assert (refused.code, refused.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "RESOURCE_IN_USE",
    )


async def test_deleted_endpoint_leaves_its_revisions(api: Api, acme: As) -> None:
    made = await acme.call("CreateEndpoint", endpoint_request("acme", "orders"))
    _ = await acme.call("DeleteEndpoint", pb.DeleteEndpointRequest(name=made.name))
    assert (
        await acme.refused("GetEndpoint", pb.GetEndpointRequest(name=made.name))
    ).reason == "RESOURCE_NOT_FOUND"
    async with api.database.connection() as connection:
        rows = await connection.fetch(
            "SELECT version, state, config_version FROM endpoint_revision ORDER BY version"
        )
    assert [(row["version"], row["state"]) for row in rows] == [(1, 1), (2, 4)]
    assert rows[0]["config_version"] < rows[1]["config_version"]


async def test_nothing_that_may_be_a_credential_is_stored_in_the_clear(api: Api, acme: As) -> None:
    made = await acme.call(
        "CreateEndpoint",
        endpoint_request(
            "acme", "orders", url="https://example.com/tok-123", headers={"x": "hdr-456"}
        ),
    )
    async with api.database.connection() as connection:
        rows = await connection.fetch(
            "SELECT endpoint::text AS row FROM endpoint UNION ALL SELECT endpoint_revision::text FROM endpoint_revision"
        )
    for row in rows:
        for secret in (b"tok-123", b"hdr-456", parse_secret(made.secret)):
            assert secret.hex() not in row["row"]
            assert secret.decode("latin-1") not in row["row"]


async def test_limit_of_endpoints_is_kept(database: Database) -> None:
    async with running(database.dsn, limits=Limits(endpoints_max=1)) as api:
        acme = await api.tenant("acme")
        _ = await acme.call("CreateEndpoint", endpoint_request("acme", "a"))
        refused = await acme.refused("CreateEndpoint", endpoint_request("acme", "b"))
        assert (refused.code, refused.reason) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "LIMIT_REACHED",
        )
