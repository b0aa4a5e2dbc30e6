"""ApiKeyService: who may call. A key's text is in the answer that made it, and nowhere else."""

from __future__ import annotations

from google.protobuf.empty_pb2 import Empty
from typing_extensions import override

from outrider.v1 import api_key_pb2, api_key_service_pb2_grpc
from outrider.v1 import api_key_service_pb2 as pb
from outrider_server.access.keys import KeyRing, create_key
from outrider_server.access.policy import authorize
from outrider_server.api import names, paging, validation
from outrider_server.api.conversion import ROLES, api_key_message, datetime_of
from outrider_server.api.errors import ServicerContext
from outrider_server.api.interceptors import current_caller
from outrider_server.api.limits import Limits, require_room
from outrider_server.api.tenancy import Tenancy, not_found
from outrider_server.api.validation import check, invalid
from outrider_server.domain.access import Role
from outrider_server.domain.errors import AlreadyExists
from outrider_server.storage import api_keys, tenants
from outrider_server.storage.database import Connection

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["ApiKeyService"].full_name


class ApiKeyService(api_key_service_pb2_grpc.ApiKeyServiceServicer):
    """Manages API keys. `random` gives ids and keys (`os.urandom`)."""

    def __init__(
        self, tenancy: Tenancy, keys: KeyRing, limits: Limits, random: names.RandomBytes
    ) -> None:
        self._tenancy = tenancy
        self._keys = keys
        self._limits = limits
        self._random = random

    @override
    async def CreateApiKey(
        self, request: pb.CreateApiKeyRequest, context: ServicerContext
    ) -> api_key_pb2.ApiKey:
        check(request)
        tenant = _parent(request.parent)
        name = names.given_or_chosen(request.api_key_id, "api_key_id", self._random)
        given = request.api_key
        role = ROLES[given.role]
        if (role is Role.SYSTEM_ADMIN) != (tenant == ""):
            raise invalid(
                "api_key.role", "a system admin's key has no parent, and every other key has one"
            )
        expires_at = (
            datetime_of(given.expire_time, "api_key.expire_time")
            if given.HasField("expire_time")
            else None
        )
        database = self._tenancy.database
        async with database.transaction(dry_run=request.validate_only) as connection:
            owner = await self._owner(connection, tenant, "CreateApiKey")
            # Held while the keys are counted and the new one is made, so that neither the limit is passed nor a tenant
            # is deleted in between.
            if owner is None:
                await api_keys.lock_installation(connection)
            elif not await tenants.hold(connection, owner):
                raise not_found(names.tenant_name(tenant))
            held = await api_keys.count(connection, owner)
            require_room(held, self._limits.api_keys_max, "API keys")
            made = await create_key(
                connection,
                self._random,
                tenant=owner,
                name=name,
                role=role,
                display_name=given.display_name,
                expires_at=expires_at,
            )
            if made is None:
                resource = names.child_name(tenant, "apiKeys", name)
                raise AlreadyExists(
                    "RESOURCE_EXISTS",
                    f"there is an API key {resource} already",
                    metadata={"resource": resource},
                )
            if expires_at is not None and expires_at <= made.stored.created_at:
                raise invalid("api_key.expire_time", "must lie in the future")
        return api_key_message(made.stored, tenant, text="" if request.validate_only else made.text)

    @override
    async def GetApiKey(
        self, request: pb.GetApiKeyRequest, context: ServicerContext
    ) -> api_key_pb2.ApiKey:
        check(request)
        tenant, name = names.parse_api_key(request.name, "name")
        async with self._tenancy.database.connection() as connection:
            owner = await self._owner(connection, tenant, "GetApiKey")
            found = await api_keys.get(connection, owner, name)
        if found is None:
            raise not_found(request.name)
        return api_key_message(found, tenant)

    @override
    async def ListApiKeys(
        self, request: pb.ListApiKeysRequest, context: ServicerContext
    ) -> pb.ListApiKeysResponse:
        check(request)
        tenant = _parent(request.parent)
        query = f"keys of {tenant}"
        after = validation.parse_page_token(query, request.page_token)
        size = validation.page_size(request.page_size)
        async with self._tenancy.database.connection() as connection:
            owner = await self._owner(connection, tenant, "ListApiKeys")
            rows = await api_keys.list_page(connection, owner, after, size + 1)
        page, token = paging.fill(query, rows, size, lambda row: api_key_message(row, tenant))
        return pb.ListApiKeysResponse(api_keys=page, next_page_token=token)

    @override
    async def DeleteApiKey(
        self, request: pb.DeleteApiKeyRequest, context: ServicerContext
    ) -> Empty:
        check(request)
        tenant, name = names.parse_api_key(request.name, "name")
        async with self._tenancy.database.transaction() as connection:
            owner = await self._owner(connection, tenant, "DeleteApiKey")
            # Revoking a revoked key is no error: a retried call must not look like a failed one.
            if await api_keys.revoke(connection, owner, name) is None:
                found = await api_keys.get(connection, owner, name)
                if found is None:
                    raise not_found(request.name)
        self._keys.end(api_keys.key_id(owner, name))
        return Empty()

    async def _owner(self, connection: Connection, tenant: str, method: str) -> int | None:
        """The id of the tenant the keys belong to, None for those of no tenant, if the current caller may reach them."""
        caller = current_caller()
        if not tenant:
            authorize(caller, f"/{SERVICE_NAME}/{method}", None)
            return None
        return (await self._tenancy.resolve(connection, tenant)).id


def _parent(parent: str) -> str:
    return names.parse_tenant(parent, "parent") if parent else ""
