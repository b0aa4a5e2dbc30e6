"""TenantService: whose data there is."""

from __future__ import annotations

import asyncio

from google.protobuf.empty_pb2 import Empty
from typing_extensions import override

from outrider.v1 import tenant_pb2, tenant_service_pb2_grpc
from outrider.v1 import tenant_service_pb2 as pb
from outrider_server.access.keys import KeyRing
from outrider_server.api import names, paging, validation
from outrider_server.api.conversion import tenant_message
from outrider_server.api.errors import ServicerContext
from outrider_server.api.tenancy import Tenancy
from outrider_server.api.validation import check, etag, invalid
from outrider_server.domain.errors import AlreadyExists, FailedPrecondition, Unavailable
from outrider_server.storage import endpoints, tenants
from outrider_server.storage.tenants import StoredTenant

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["TenantService"].full_name

SPREAD_SECONDS_MAX = 10.0
SPREAD_POLL_SECONDS = 0.1
FROZEN_SECONDS = 2 * SPREAD_SECONDS_MAX
CHANGEABLE = ("display_name", "strict_types", "shards")


class TenantService(tenant_service_pb2_grpc.TenantServiceServicer):
    """Manages tenants. `random` gives ids (`os.urandom`); `keys` forget a deleted tenant's at once."""

    def __init__(self, tenancy: Tenancy, keys: KeyRing, random: names.RandomBytes) -> None:
        self._tenancy = tenancy
        self._keys = keys
        self._random = random

    @override
    async def CreateTenant(
        self, request: pb.CreateTenantRequest, context: ServicerContext
    ) -> tenant_pb2.Tenant:
        check(request)
        name = names.given_or_chosen(request.tenant_id, "tenant_id", self._random)
        async with self._tenancy.work(dry_run=request.validate_only) as work:
            held = self._tenancy.held()
            if not held:
                raise Unavailable(
                    "NOT_READY", "this node holds no shard yet", retry_after_seconds=1.0
                )
            made = await tenants.create(
                work.connection,
                name,
                request.tenant.display_name,
                strict_types=request.tenant.strict_types,
                shards=held,
            )
            if made is None:
                resource = names.tenant_name(name)
                raise AlreadyExists(
                    "RESOURCE_EXISTS",
                    f"{resource} is taken; the name of a deleted tenant is not given again",
                    metadata={"resource": resource},
                )
            await work.changes(made.tenant)
            if request.tenant.shards > 1:
                made = await tenants.place(work.connection, made, request.tenant.shards)
        return tenant_message(made)

    @override
    async def GetTenant(
        self, request: pb.GetTenantRequest, context: ServicerContext
    ) -> tenant_pb2.Tenant:
        check(request)
        name = names.parse_tenant(request.name, "name")
        async with self._tenancy.database.connection() as connection:
            return tenant_message(await self._tenancy.resolve(connection, name))

    @override
    async def ListTenants(
        self, request: pb.ListTenantsRequest, context: ServicerContext
    ) -> pb.ListTenantsResponse:
        check(request)
        after = validation.parse_page_token("tenants", request.page_token)
        size = validation.page_size(request.page_size)
        async with self._tenancy.database.connection() as connection:
            rows = await tenants.list_page(connection, after, size + 1)
        page, token = paging.fill("tenants", rows, size, tenant_message)
        return pb.ListTenantsResponse(tenants=page, next_page_token=token)

    @override
    async def UpdateTenant(
        self, request: pb.UpdateTenantRequest, context: ServicerContext
    ) -> tenant_pb2.Tenant:
        if not request.HasField("tenant"):
            raise invalid("tenant", "value is required")
        given = request.tenant
        name = names.parse_tenant(given.name, "tenant.name")
        async with self._tenancy.change(name, dry_run=request.validate_only) as change:
            _require_etag(given.etag, change.tenant)
            message, _ = validation.merged(
                tenant_message(change.tenant), given, request.update_mask, changeable=CHANGEABLE
            )
            check(message, "tenant")
            updated = await tenants.update(
                change.connection,
                change.locked.id,
                message.display_name,
                strict_types=message.strict_types,
            )
        shards = message.shards or 1
        if shards != len(updated.tenant.spread) and not request.validate_only:
            updated = await self._spread(name, shards)
        return tenant_message(updated)

    async def _spread(self, name: str, shards: int) -> StoredTenant:
        """Spread a tenant over so many shards, once nothing of it waits; meanwhile nothing of it is taken in."""
        async with self._tenancy.change(name) as change:
            # For so long at most, whatever becomes of this node.
            await tenants.freeze(change.connection, change.locked.id, FROZEN_SECONDS)
        try:
            async with asyncio.timeout(SPREAD_SECONDS_MAX):
                while True:
                    async with self._tenancy.change(name) as change:
                        spread = await tenants.spread(
                            change.connection, change.locked, shards, self._tenancy.held()
                        )
                    if spread is not None:
                        return spread
                    await asyncio.sleep(SPREAD_POLL_SECONDS)
        except BaseException as error:
            async with self._tenancy.change(name) as change:
                await tenants.freeze(change.connection, change.locked.id, 0)
            if isinstance(error, TimeoutError):
                raise FailedPrecondition(
                    "WRONG_STATE",
                    f"{names.tenant_name(name)} still has deliveries waiting after {SPREAD_SECONDS_MAX:g} s; pause the "
                    "endpoints that do not take them, then try again",
                ) from None
            raise

    @override
    async def DeleteTenant(
        self, request: pb.DeleteTenantRequest, context: ServicerContext
    ) -> Empty:
        check(request)
        name = names.parse_tenant(request.name, "name")
        async with self._tenancy.change(name) as change:
            _require_etag(request.etag, change.tenant)
            if await endpoints.count(change.connection, change.locked.id):
                raise FailedPrecondition(
                    "RESOURCE_IN_USE",
                    f"{request.name} still has endpoints; delete them first",
                    metadata={"resource": request.name},
                )
            await tenants.delete(change.connection, change.locked)
        _ = await self._keys.revalidate()
        return Empty()


def _require_etag(given: str, current: StoredTenant) -> None:
    validation.require_etag(
        given, etag(current.created_at, current.version), names.tenant_name(current.name)
    )
