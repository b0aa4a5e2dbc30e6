from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from outrider import errors
from outrider.channel import bearer, tls
from outrider.client import connect
from outrider.v1.endpoint_pb2 import Endpoint
from outrider.v1.endpoint_service_pb2 import CreateEndpointRequest, GetEndpointRequest


class Endpoints:
    """Answers two methods, as told: failures first, then the endpoint."""

    def __init__(self) -> None:
        self.failures: list[tuple[grpc.StatusCode, str]] = []
        self.keys: list[str] = []

    async def answer(self, request: Any, context: Any) -> Endpoint:
        self.keys.append(dict(context.invocation_metadata())["authorization"])
        if self.failures:
            code, reason = self.failures.pop(0)
            detail = any_pb2.Any()
            detail.Pack(error_details_pb2.ErrorInfo(reason=reason, domain="outrider"))
            status = status_pb2.Status(code=code.value[0], message="told", details=[detail])
            trailing = (("grpc-status-details-bin", status.SerializeToString()),)
            await context.abort(code, "told", trailing_metadata=trailing)
        return Endpoint(name="tenants/demo/endpoints/erp")


@pytest.fixture
async def server() -> AsyncIterator[tuple[str, Endpoints]]:
    endpoints = Endpoints()
    running = grpc.aio.server()
    handlers = {
        method: grpc.unary_unary_rpc_method_handler(
            endpoints.answer,
            request_deserializer=kind.FromString,
            response_serializer=Endpoint.SerializeToString,
        )
        for method, kind in (
            ("GetEndpoint", GetEndpointRequest),
            ("CreateEndpoint", CreateEndpointRequest),
        )
    }
    running.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("outrider.v1.EndpointService", handlers)]
    )
    port = running.add_insecure_port("127.0.0.1:0")
    await running.start()
    yield f"127.0.0.1:{port}", endpoints
    await running.stop(0)


async def test_calls_carry_the_key_and_return_what_the_stub_returns(
    server: tuple[str, Endpoints],
) -> None:
    target, endpoints = server
    async with connect(target, "or_key") as client:
        got = await client.endpoints.GetEndpoint(GetEndpointRequest(name="x"))
        await client.endpoints.CreateEndpoint(CreateEndpointRequest(), metadata=(("a", "b"),))
    assert got.name == "tenants/demo/endpoints/erp"
    assert endpoints.keys == ["Bearer or_key"] * 2


async def test_a_failed_call_raises_its_typed_error(server: tuple[str, Endpoints]) -> None:
    target, endpoints = server
    endpoints.failures = [(grpc.StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND")]
    async with connect(target, "or_key") as client:
        with pytest.raises(errors.NotFound) as caught:
            await client.endpoints.GetEndpoint(GetEndpointRequest(name="x"))
    assert (caught.value.reason, caught.value.message) == ("RESOURCE_NOT_FOUND", "told")


async def test_reads_are_retried_while_the_server_is_unavailable(
    server: tuple[str, Endpoints],
) -> None:
    target, endpoints = server
    endpoints.failures = [(grpc.StatusCode.UNAVAILABLE, "NOT_READY")] * 2
    async with connect(target, "or_key") as client:
        await client.endpoints.GetEndpoint(GetEndpointRequest(name="x"))
    assert len(endpoints.keys) == 3


async def test_writes_are_not_retried(server: tuple[str, Endpoints]) -> None:
    target, endpoints = server
    endpoints.failures = [(grpc.StatusCode.UNAVAILABLE, "NOT_READY")]
    async with connect(target, "or_key") as client:
        with pytest.raises(errors.Unavailable):
            await client.endpoints.CreateEndpoint(CreateEndpointRequest())
    assert len(endpoints.keys) == 1


@pytest.mark.parametrize("key", ["", "with\nnewline", "geheim\u00e4"])
def test_a_key_that_no_header_can_carry_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="API key"):
        bearer(key)


def test_a_certificate_needs_its_key(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="go together"):
        tls(certificate=tmp_path / "cert.pem")
