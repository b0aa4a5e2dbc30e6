"""The server around the services: keys, errors, limits, reflection, health."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.support.api import Api, refusal, running
from tests.support.node import until
from tests.support.postgres import Database

from outrider.v1 import tenant_service_pb2 as pb
from outrider.v1 import tenant_service_pb2_grpc
from outrider_server.api.interceptors import CallInterceptor
from outrider_server.api.server import MESSAGE_BYTES_MAX, ListenError, build_server

GRPCURL = Path(sys.executable).with_name("grpcurl")
GET = pb.GetTenantRequest(name="tenants/acme")
Status = health_pb2.HealthCheckResponse


async def test_calls_without_a_usable_key_are_refused(api: Api) -> None:
    good = api.admin_key
    for text, reason in (
        (None, "MISSING_API_KEY"),
        ("", "INVALID_API_KEY"),
        ("ork_x", "INVALID_API_KEY"),
        (good[:-1] + ("a" if good[-1] != "a" else "b"), "INVALID_API_KEY"),
    ):
        refused = await api.caller(text).refused("GetTenant", GET)
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAUTHENTICATED, reason)
    for metadata, reason in (
        ((("authorization", f"Basic {good}"),), "MISSING_API_KEY"),
        (
            (("authorization", f"Bearer {good}"), ("authorization", f"Bearer {good}")),
            "INVALID_API_KEY",
        ),
    ):
        call = tenant_service_pb2_grpc.TenantServiceStub(api.channel).GetTenant(
            GET, metadata=metadata
        )
        assert (await refusal(call)).reason == reason


async def test_scheme_is_taken_in_any_case(api: Api) -> None:
    channel_call = api.channel.unary_unary(
        "/outrider.v1.TenantService/ListTenants",
        request_serializer=pb.ListTenantsRequest.SerializeToString,
        response_deserializer=pb.ListTenantsResponse.FromString,
    )
    metadata = (("authorization", f"bearer {api.admin_key}"),)
    assert await channel_call(pb.ListTenantsRequest(), metadata=metadata) is not None


async def test_calls_are_counted_with_their_outcome(api: Api) -> None:
    _ = await api.admin.refused("GetTenant", GET)
    _ = await api.admin.call("ListTenants", pb.ListTenantsRequest())
    _ = await api.caller(None).refused("GetTenant", GET)
    await until(lambda: len(api.observed) == 3)  # counted once the caller has been told
    assert [(method, code) for method, code, _ in api.observed] == [
        ("/outrider.v1.TenantService/GetTenant", "NOT_FOUND"),
        ("/outrider.v1.TenantService/ListTenants", "OK"),
        ("/outrider.v1.TenantService/GetTenant", "UNAUTHENTICATED"),
    ]
    assert all(0 < seconds < 20 for _, _, seconds in api.observed)


async def test_unexpected_error_is_logged_and_not_told(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    async with api.database.connection() as connection:
        _ = await connection.execute("ALTER TABLE tenant RENAME COLUMN display_name TO hidden")
    with caplog.at_level(logging.ERROR):
        refused = await api.admin.refused("GetTenant", GET)
    assert (refused.code, refused.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "display_name" not in refused.message
    assert "display_name" in caplog.text
    assert refused.metadata["reference"] in caplog.text


async def test_lost_database_is_a_passing_error(database: Database) -> None:
    async with running(database.dsn) as api:
        _ = await api.admin.call("ListTenants", pb.ListTenantsRequest())
        await api.database.close()
        refused = await api.admin.refused("ListTenants", pb.ListTenantsRequest())
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "STORAGE_UNAVAILABLE")
    assert refused.retry_seconds == 1.0


async def test_message_beyond_the_limit_is_refused(api: Api) -> None:
    request = pb.CreateTenantRequest(tenant={"display_name": "x" * MESSAGE_BYTES_MAX})
    refused = await api.admin.refused("CreateTenant", request)
    assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    fits = pb.CreateTenantRequest(tenant={"display_name": "x" * (10 * 1024 * 1024)})
    assert (await api.admin.refused("CreateTenant", fits)).code is grpc.StatusCode.INVALID_ARGUMENT


async def test_unknown_method_is_unimplemented(api: Api) -> None:
    call = api.channel.unary_unary("/outrider.v1.TenantService/Nothing")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = await call(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_taken_port_is_told_in_a_sentence(api: Api) -> None:
    for address, text in (
        (f"127.0.0.1:{api.server.ports[0]}", "another process uses that port"),
        ("192.0.2.1:0", "cannot assign"),
        ("nowhere.invalid:1", "no such host"),
        ("127.0.0.1:x", "not host:port"),
    ):
        with pytest.raises(ListenError, match=text) as caught:
            _ = build_server([], [address], interceptor=_interceptor(api))
        assert "\n" not in str(caught.value)


async def test_ports_may_be_shared_where_asked_for(api: Api) -> None:
    first = build_server([], ["127.0.0.1:0"], interceptor=_interceptor(api), reuse_port=True)
    second = build_server(
        [], [f"127.0.0.1:{first.ports[0]}"], interceptor=_interceptor(api), reuse_port=True
    )
    assert first.ports == second.ports
    for server in (first, second):
        await server.start()
        await server.stop(0)


async def grpcurl(*arguments: str) -> str:
    if not GRPCURL.exists():
        pytest.skip("grpcurl is not installed beside this Python")
    process = await asyncio.create_subprocess_exec(
        GRPCURL,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    return output.decode()


async def test_grpcurl_lists_and_describes_and_calls(api: Api) -> None:
    address = f"127.0.0.1:{api.server.ports[0]}"
    listed = await grpcurl("-plaintext", address, "list")
    assert {
        "outrider.v1.EndpointService",
        "outrider.v1.ApiKeyService",
        "grpc.health.v1.Health",
    } <= set(listed.split())
    methods = await grpcurl("-plaintext", address, "list", "outrider.v1.EndpointService")
    assert "outrider.v1.EndpointService.RotateEndpointSecret" in methods
    for symbol, text in (
        ("outrider.v1.EndpointService.CreateEndpoint", "rpc CreateEndpoint"),
        ("outrider.v1.EndpointService", "service EndpointService"),
        ("outrider.v1.Endpoint", "string url = 3"),
        ("grpc.health.v1.Health.Watch", "rpc Watch"),
    ):
        assert text in await grpcurl("-plaintext", address, "describe", symbol), symbol
    assert "not found" in await grpcurl("-plaintext", address, "describe", "outrider.v1.None")
    called = await grpcurl(
        "-plaintext", "-H", f"authorization: Bearer {api.admin_key}",
        "-d", '{"tenant_id": "acme", "tenant": {}}',
        address, "outrider.v1.TenantService/CreateTenant",
    )  # fmt: skip
    assert "tenants/acme" in called
    refused = await grpcurl("-plaintext", address, "outrider.v1.TenantService/ListTenants")
    assert "MISSING_API_KEY" in refused


async def test_reflection_answers_in_its_newer_version_too(api: Api) -> None:
    from grpc_reflection.v1alpha import reflection_pb2

    call = api.channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    requests = [
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
        for symbol in (
            "outrider.v1.EndpointService.GetEndpoint",
            "outrider.v1.Endpoint.url",
            "outrider.v1.EndpointService.None",
        )
    ]
    answers = [answer async for answer in call(iter(requests))]
    found = [answer.WhichOneof("message_response") for answer in answers]
    assert found == ["file_descriptor_response", "file_descriptor_response", "error_response"]


async def test_services_beside_ours_need_a_key_where_they_are_not_open(database: Database) -> None:
    async with running(database.dsn, open_services=()) as api:
        health = health_pb2_grpc.HealthStub(api.channel)
        refused = await refusal(health.Check(health_pb2.HealthCheckRequest()))
        assert refused.reason == "MISSING_API_KEY"
        metadata = (("authorization", f"Bearer {api.admin_key}"),)
        assert await health.Check(health_pb2.HealthCheckRequest(), metadata=metadata) is not None


async def test_health_tells_of_each_service_and_watchers_see_changes(api: Api) -> None:
    health = health_pb2_grpc.HealthStub(api.channel)
    service = "outrider.v1.EndpointService"
    watch = health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=20)
    unknown = health.Watch(health_pb2.HealthCheckRequest(service="none"), timeout=20)
    assert (await watch.read()).status == Status.NOT_SERVING
    assert (await unknown.read()).status == Status.SERVICE_UNKNOWN
    api.server.health.set_serving(True)
    assert (await watch.read()).status == Status.SERVING
    api.server.health.set_serving(False, service)
    assert (await watch.read()).status == Status.NOT_SERVING
    checked = await health.Check(health_pb2.HealthCheckRequest())
    assert checked.status == Status.SERVING
    listed = await health.List(health_pb2.HealthListRequest())
    assert listed.statuses[service].status == Status.NOT_SERVING
    refused = await refusal(health.Check(health_pb2.HealthCheckRequest(service="none")))
    assert refused.code is grpc.StatusCode.NOT_FOUND


async def test_stop_ends_watchers_after_telling_them(database: Database) -> None:
    async with running(database.dsn) as api:
        api.server.health.set_serving(True)
        health = health_pb2_grpc.HealthStub(api.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=20)
        assert (await watch.read()).status == Status.SERVING
        # With a grace far beyond the test's own limit: a watcher must not hold the stop up.
        await api.server.stop(3600)
        assert (await watch.read()).status == Status.NOT_SERVING
        assert await watch.read() is grpc.aio.EOF
        assert await watch.code() is grpc.StatusCode.OK


def _interceptor(api: Api) -> CallInterceptor:
    return CallInterceptor(
        api.keys, observe=lambda *_: None, clock=lambda: 0.0, random=lambda count: b"\0" * count
    )
