"""The API on a real channel and a real database, and its errors as values."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from outrider.v1 import (
    api_key_pb2,
    api_key_service_pb2_grpc,
    endpoint_service_pb2_grpc,
    event_type_service_pb2_grpc,
    subscription_service_pb2_grpc,
    tenant_service_pb2_grpc,
)
from outrider.v1 import api_key_service_pb2 as api_keys_pb
from outrider.v1 import endpoint_service_pb2 as endpoints_pb
from outrider.v1 import subscription_service_pb2 as subscriptions_pb
from outrider.v1 import tenant_service_pb2 as tenants_pb
from outrider_server.access.keys import KeyRing, create_admin_key
from outrider_server.api import (
    api_key_service,
    endpoint_service,
    event_type_service,
    subscription_service,
    tenant_service,
)
from outrider_server.api.interceptors import CallInterceptor
from outrider_server.api.limits import Limits
from outrider_server.api.server import ApiServer, Service, build_server
from outrider_server.api.tenancy import Tenancy
from outrider_server.secrets.keys import KEY_BYTES, KeyEncryptionKey
from outrider_server.secrets.keys import KeyRing as SealingKeys
from outrider_server.secrets.sealing import Sealer
from outrider_server.storage.database import Database

REASON_DOMAIN = "outrider"


def new_sealer() -> Sealer:
    return Sealer(SealingKeys((KeyEncryptionKey.of(bytes(range(KEY_BYTES))),)), os.urandom)


@dataclass(frozen=True)
class Refusal:
    """An error of a call, taken apart."""

    code: grpc.StatusCode
    message: str
    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    violations: dict[str, str] = field(default_factory=dict)
    retry_seconds: float | None = None
    resource: str = ""


def taken_apart(error: grpc.aio.AioRpcError) -> Refusal:
    details: dict[str, Any] = {}
    for key, value in error.trailing_metadata() or ():
        if key != "grpc-status-details-bin":
            continue
        status = status_pb2.Status.FromString(value)
        assert status.code == error.code().value[0]
        assert status.message == error.details()
        for any_detail in status.details:
            info = error_details_pb2.ErrorInfo()
            bad = error_details_pb2.BadRequest()
            retry = error_details_pb2.RetryInfo()
            resource = error_details_pb2.ResourceInfo()
            if any_detail.Unpack(info):
                assert info.domain == REASON_DOMAIN
                details["reason"] = info.reason
                details["metadata"] = dict(info.metadata)
            elif any_detail.Unpack(bad):
                details["violations"] = {v.field: v.description for v in bad.field_violations}
            elif any_detail.Unpack(retry):
                details["retry_seconds"] = retry.retry_delay.ToNanoseconds() / 1e9
            elif any_detail.Unpack(resource):
                details["resource"] = resource.resource_name
    return Refusal(error.code(), error.details() or "", **details)


async def refusal(call: Awaitable[Any]) -> Refusal:
    """The error that a call ends with; it must end with one."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as error:
        return taken_apart(error)
    raise AssertionError(f"the call succeeded: {answer}")


class As:
    """All management services, called with one key."""

    def __init__(self, channel: grpc.aio.Channel, key: str | None) -> None:
        self._metadata = () if key is None else (("authorization", f"Bearer {key}"),)
        self.stubs: tuple[Any, ...] = (
            endpoint_service_pb2_grpc.EndpointServiceStub(channel),
            subscription_service_pb2_grpc.SubscriptionServiceStub(channel),
            event_type_service_pb2_grpc.EventTypeServiceStub(channel),
            tenant_service_pb2_grpc.TenantServiceStub(channel),
            api_key_service_pb2_grpc.ApiKeyServiceStub(channel),
        )

    async def call(self, method: str, request: Any, **options: Any) -> Any:
        stub = next(stub for stub in self.stubs if hasattr(stub, method))
        return await getattr(stub, method)(request, metadata=self._metadata, timeout=20, **options)

    async def refused(self, method: str, request: Any) -> Refusal:
        return await refusal(self.call(method, request))


@dataclass
class Api:
    """A running API, and what it told the node."""

    database: Database
    sealer: Sealer
    keys: KeyRing
    server: ApiServer
    channel: grpc.aio.Channel
    admin_key: str
    changed: list[int]
    observed: list[tuple[str, str, float]]

    def caller(self, key: str | None) -> As:
        return As(self.channel, key)

    @property
    def admin(self) -> As:
        return self.caller(self.admin_key)

    async def tenant(self, name: str, **fields: Any) -> As:
        """Make a tenant, and an integration admin of it."""
        _ = await self.admin.call(
            "CreateTenant", tenants_pb.CreateTenantRequest(tenant_id=name, tenant=fields)
        )
        return self.caller(await self.key(name, api_key_pb2.ApiKey.ROLE_INTEGRATION_ADMIN))

    async def key(self, tenant: str, role: Any, name: str = "") -> str:
        made = await self.admin.call(
            "CreateApiKey",
            api_keys_pb.CreateApiKeyRequest(
                parent=f"tenants/{tenant}", api_key_id=name, api_key={"role": role}
            ),
        )
        return str(made.key)


@asynccontextmanager
async def running(dsn: str, *, limits: Limits | None = None, **options: Any) -> AsyncIterator[Api]:
    """Serve every management service on a free port of the loopback address."""
    changed: list[int] = []
    observed: list[tuple[str, str, float]] = []
    limits = limits or Limits()
    sealer = new_sealer()

    async def note(tenant: int) -> None:
        changed.append(tenant)

    async with Database(dsn, node="test", boot="0" * 32, connections_max=4) as database:
        keys = KeyRing(database)
        tenancy = Tenancy(database, options.pop("changed", note), options.pop("epoch", lambda _: 0))
        servicers = [
            (
                endpoint_service.SERVICE_NAME,
                endpoint_service.EndpointService(tenancy, sealer, limits, os.urandom),
                endpoint_service_pb2_grpc.add_EndpointServiceServicer_to_server,
            ),
            (
                subscription_service.SERVICE_NAME,
                subscription_service.SubscriptionService(tenancy, sealer, limits, os.urandom),
                subscription_service_pb2_grpc.add_SubscriptionServiceServicer_to_server,
            ),
            (
                event_type_service.SERVICE_NAME,
                event_type_service.EventTypeService(tenancy, limits),
                event_type_service_pb2_grpc.add_EventTypeServiceServicer_to_server,
            ),
            (
                tenant_service.SERVICE_NAME,
                tenant_service.TenantService(tenancy, keys, os.urandom),
                tenant_service_pb2_grpc.add_TenantServiceServicer_to_server,
            ),
            (
                api_key_service.SERVICE_NAME,
                api_key_service.ApiKeyService(tenancy, keys, limits, os.urandom),
                api_key_service_pb2_grpc.add_ApiKeyServiceServicer_to_server,
            ),
        ]
        interceptor = CallInterceptor(
            keys,
            observe=lambda method, code, seconds: observed.append((method, code, seconds)),
            clock=time.monotonic,
            random=os.urandom,
            **options,
        )
        server = build_server(
            [Service(*servicer) for servicer in servicers], ["127.0.0.1:0"], interceptor=interceptor
        )
        await server.start()
        async with database.transaction() as connection:
            admin_key = await create_admin_key(connection, os.urandom)
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.ports[0]}") as channel:
                yield Api(database, sealer, keys, server, channel, admin_key, changed, observed)
        finally:
            await server.stop(0)


def endpoint_request(tenant: str, name: str = "", **fields: Any) -> Any:
    return endpoints_pb.CreateEndpointRequest(
        parent=f"tenants/{tenant}",
        endpoint_id=name,
        endpoint={"url": "https://example.com/hook", **fields},
    )


def subscription_request(tenant: str, endpoint: str, name: str = "", /, **fields: Any) -> Any:
    return subscriptions_pb.CreateSubscriptionRequest(
        parent=f"tenants/{tenant}",
        subscription_id=name,
        subscription={
            "endpoint": f"tenants/{tenant}/endpoints/{endpoint}",
            "types": ["sales.*"],
            **fields,
        },
    )
