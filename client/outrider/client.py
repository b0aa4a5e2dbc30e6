"""Management calls: the generated stubs with the key attached and failures as typed errors.

    async with connect("127.0.0.1:4510", key) as client:
        endpoint = await client.endpoints.GetEndpoint(GetEndpointRequest(name="tenants/demo/endpoints/erp"))

Rule: nothing here knows a single method; what the protos say is what the stubs take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
from typing_extensions import override

from outrider.channel import bearer, open_channel
from outrider.errors import from_rpc
from outrider.v1 import (
    api_key_service_pb2_grpc,
    endpoint_service_pb2_grpc,
    event_type_service_pb2_grpc,
    ingest_service_pb2_grpc,
    subscription_service_pb2_grpc,
    tenant_service_pb2_grpc,
)


class Client:
    """One channel and the stubs over it. Unary calls carry the key and raise `outrider.errors`."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.endpoints = endpoint_service_pb2_grpc.EndpointServiceStub(channel)
        self.subscriptions = subscription_service_pb2_grpc.SubscriptionServiceStub(channel)
        self.event_types = event_type_service_pb2_grpc.EventTypeServiceStub(channel)
        self.tenants = tenant_service_pb2_grpc.TenantServiceStub(channel)
        self.api_keys = api_key_service_pb2_grpc.ApiKeyServiceStub(channel)
        self.ingest = ingest_service_pb2_grpc.IngestServiceStub(channel)

    async def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        await self.channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


def connect(
    target: str,
    api_key: str,
    *,
    credentials: grpc.ChannelCredentials | None = None,
    options: Sequence[tuple[str, Any]] = (),
) -> Client:
    """A client of `target`. Without `credentials` (see `outrider.channel.tls`) the key travels unencrypted.

    Reads are retried while the server is unavailable; writes are not. The connection is made by the first call.
    """
    interceptor = _Caller(bearer(api_key))
    return Client(
        open_channel(target, credentials=credentials, options=options, interceptors=[interceptor])
    )


class _Caller(grpc.aio.UnaryUnaryClientInterceptor):
    """Adds the key to a unary call and turns its failure into a typed error."""

    def __init__(self, metadata: tuple[tuple[str, str], ...]) -> None:
        self._metadata = metadata

    @override
    async def intercept_unary_unary(
        self,
        continuation: Callable[[grpc.aio.ClientCallDetails, Any], Any],
        client_call_details: grpc.aio.ClientCallDetails,
        request: Any,
    ) -> Any:
        metadata = client_call_details.metadata
        if metadata is None:
            metadata = client_call_details.metadata = grpc.aio.Metadata()
        for name, value in self._metadata:
            metadata.add(name, value)
        call = await continuation(client_call_details, request)
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from error
