"""Management calls: the generated stubs with the key attached and failures as typed errors.

    async with connect("127.0.0.1:4510", key) as client:
        endpoint = await client.endpoints.GetEndpoint(GetEndpointRequest(name="tenants/demo/endpoints/erp"))

Rule: nothing here knows a single method; what the protos say is what the stubs take.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, cast

import grpc

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

Metadata = tuple[tuple[str, str], ...]


class Client:
    """One channel and the stubs over it. Calls carry the key; unary ones raise `outrider.errors`.

    Streams raise gRPC's own errors, which `outrider.errors.from_rpc` translates.
    """

    def __init__(self, channel: grpc.aio.Channel, metadata: Metadata) -> None:
        self.channel = channel
        keyed = cast("grpc.aio.Channel", _KeyedChannel(channel, metadata))
        self.endpoints = endpoint_service_pb2_grpc.EndpointServiceStub(keyed)
        self.subscriptions = subscription_service_pb2_grpc.SubscriptionServiceStub(keyed)
        self.event_types = event_type_service_pb2_grpc.EventTypeServiceStub(keyed)
        self.tenants = tenant_service_pb2_grpc.TenantServiceStub(keyed)
        self.api_keys = api_key_service_pb2_grpc.ApiKeyServiceStub(keyed)
        self.ingest = ingest_service_pb2_grpc.IngestServiceStub(keyed)

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
    metadata = bearer(api_key)
    return Client(open_channel(target, credentials=credentials, options=options), metadata)


class _KeyedChannel:
    """The part of a channel that stubs use; adds the key to each call and makes failed unary ones typed errors.

    Not an interceptor: gRPC's intercepted calls complain when they are collected after one raised anything else than its
    own error.
    """

    def __init__(self, channel: grpc.aio.Channel, metadata: Metadata) -> None:
        self._channel = channel
        self._metadata = metadata

    def unary_unary(self, *arguments: Any, **options: Any) -> Callable[..., Awaitable[Any]]:
        make: Any = self._channel.unary_unary(*arguments, **options)
        mine = self._metadata

        async def call(
            request: Any, *, metadata: Iterable[tuple[str, Any]] = (), **how: Any
        ) -> Any:
            try:
                return await make(request, metadata=(*metadata, *mine), **how)
            except grpc.aio.AioRpcError as error:
                raise from_rpc(error) from error

        return call

    def unary_stream(self, *arguments: Any, **options: Any) -> Callable[..., Any]:
        return self._streaming(self._channel.unary_stream(*arguments, **options))

    def stream_unary(self, *arguments: Any, **options: Any) -> Callable[..., Any]:
        return self._streaming(self._channel.stream_unary(*arguments, **options))

    def stream_stream(self, *arguments: Any, **options: Any) -> Callable[..., Any]:
        return self._streaming(self._channel.stream_stream(*arguments, **options))

    def _streaming(self, make: Any) -> Callable[..., Any]:
        mine = self._metadata

        def call(
            request: Any = None, *, metadata: Iterable[tuple[str, Any]] = (), **how: Any
        ) -> Any:
            return make(request, metadata=(*metadata, *mine), **how)

        return call
