"""EndpointService: where requests go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask
from typing_extensions import override

from outrider.v1 import endpoint_pb2, endpoint_service_pb2_grpc
from outrider.v1 import endpoint_service_pb2 as pb
from outrider_server.api import names, paging, validation
from outrider_server.api.conversion import endpoint_message, endpoint_spec, seconds_of
from outrider_server.api.errors import ServicerContext
from outrider_server.api.limits import Limits, require_room
from outrider_server.api.tenancy import Change, Tenancy, not_found
from outrider_server.api.validation import check, etag, invalid, placed
from outrider_server.domain.endpoint import EndpointState
from outrider_server.domain.errors import AlreadyExists, FailedPrecondition, InvalidArgument
from outrider_server.policy.signing import SECRETS_MAX, format_secret, parse_secret
from outrider_server.secrets.sealing import Sealer
from outrider_server.storage import endpoints
from outrider_server.storage.database import Connection
from outrider_server.storage.endpoints import EndpointSpec, SigningSecret, StoredEndpoint

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["EndpointService"].full_name
SECRET_BYTES = 32
OVERLAP_SECONDS_DEFAULT = 86_400.0

CHANGEABLE = (
    "display_name",
    "url",
    "headers",
    "mode",
    "batch",
    "retry",
    "concurrency",
    "attempt_timeout",
    "rate_limit",
)

TRANSITIONS: Mapping[str, tuple[EndpointState, EndpointState]] = {
    "pause": (EndpointState.ACTIVE, EndpointState.PAUSED),
    "resume": (EndpointState.PAUSED, EndpointState.ACTIVE),
    "enable": (EndpointState.DISABLED, EndpointState.ACTIVE),
}
"""What each verb needs, and what it makes."""


class EndpointService(endpoint_service_pb2_grpc.EndpointServiceServicer):
    """Manages endpoints. `random` gives ids and secrets (`os.urandom`)."""

    def __init__(
        self, tenancy: Tenancy, sealer: Sealer, limits: Limits, random: names.RandomBytes
    ) -> None:
        self._tenancy = tenancy
        self._sealer = sealer
        self._limits = limits
        self._random = random

    @override
    async def CreateEndpoint(
        self, request: pb.CreateEndpointRequest, context: ServicerContext
    ) -> endpoint_pb2.Endpoint:
        check(request)
        tenant = names.parse_tenant(request.parent, "parent")
        name = names.given_or_chosen(request.endpoint_id, "endpoint_id", self._random)
        secret = self._secret(request.endpoint.secret, "endpoint.secret")
        spec = self._spec(request.endpoint, (SigningSecret(secret),))
        async with self._tenancy.change(tenant, dry_run=request.validate_only) as change:
            held = await endpoints.count(change.connection, change.locked.id)
            require_room(held, self._limits.endpoints_max, "endpoints")
            made = await endpoints.create(
                change.connection, self._sealer, change.locked, name, spec
            )
            if made is None:
                resource = names.child_name(tenant, "endpoints", name)
                raise AlreadyExists(
                    "RESOURCE_EXISTS",
                    f"there is an endpoint {resource} already",
                    metadata={"resource": resource},
                )
        if request.validate_only:
            return endpoint_message(made, tenant)
        return endpoint_message(made, tenant, secret=format_secret(secret))

    @override
    async def GetEndpoint(
        self, request: pb.GetEndpointRequest, context: ServicerContext
    ) -> endpoint_pb2.Endpoint:
        check(request)
        tenant, _ = names.parse_child(request.name, "endpoints", "name")
        async with self._tenancy.database.connection() as connection:
            owner = await self._tenancy.resolve(connection, tenant)
            return endpoint_message(await self._get(connection, owner.id, request.name), tenant)

    @override
    async def ListEndpoints(
        self, request: pb.ListEndpointsRequest, context: ServicerContext
    ) -> pb.ListEndpointsResponse:
        check(request)
        tenant = names.parse_tenant(request.parent, "parent")
        query = f"endpoints of {tenant}"
        after = validation.parse_page_token(query, request.page_token)
        size = validation.page_size(request.page_size)
        async with self._tenancy.database.connection() as connection:
            owner = await self._tenancy.resolve(connection, tenant)
            rows = await endpoints.list_page(connection, self._sealer, owner.id, after, size + 1)
        page, token = paging.fill(query, rows, size, lambda row: endpoint_message(row, tenant))
        return pb.ListEndpointsResponse(endpoints=page, next_page_token=token)

    @override
    async def UpdateEndpoint(
        self, request: pb.UpdateEndpointRequest, context: ServicerContext
    ) -> endpoint_pb2.Endpoint:
        if not request.HasField("endpoint"):
            raise invalid("endpoint", "value is required")
        given = request.endpoint
        tenant, _ = names.parse_child(given.name, "endpoints", "endpoint.name")
        if given.secret:
            raise invalid("endpoint.secret", "is changed by RotateEndpointSecret only")
        async with self._tenancy.change(tenant, dry_run=request.validate_only) as change:
            current = await self._get(change.connection, change.locked.id, given.name)
            _require_etag(given.etag, current, given.name)
            message = _merge(endpoint_message(current, tenant), given, request.update_mask)
            check(message, "endpoint")
            spec = self._spec(message, current.spec.secrets)
            updated = await self._update(change, current, current.state, spec)
        return endpoint_message(updated, tenant)

    @override
    async def DeleteEndpoint(
        self, request: pb.DeleteEndpointRequest, context: ServicerContext
    ) -> Empty:
        check(request)
        tenant, _ = names.parse_child(request.name, "endpoints", "name")
        async with self._tenancy.change(tenant) as change:
            current = await self._get(change.connection, change.locked.id, request.name)
            _require_etag(request.etag, current, request.name)
            if await endpoints.is_used(change.connection, current.id):
                raise FailedPrecondition(
                    "RESOURCE_IN_USE",
                    f"a subscription still uses {request.name}; delete it first",
                    metadata={"resource": request.name},
                )
            _ = await self._update(change, current, EndpointState.DELETED, current.spec)
        return Empty()

    @override
    async def PauseEndpoint(
        self, request: pb.PauseEndpointRequest, context: ServicerContext
    ) -> endpoint_pb2.Endpoint:
        check(request)
        return await self._turn(request.name, "pause")

    @override
    async def ResumeEndpoint(
        self, request: pb.ResumeEndpointRequest, context: ServicerContext
    ) -> endpoint_pb2.Endpoint:
        check(request)
        return await self._turn(request.name, "resume")

    @override
    async def EnableEndpoint(
        self, request: pb.EnableEndpointRequest, context: ServicerContext
    ) -> endpoint_pb2.Endpoint:
        check(request)
        return await self._turn(request.name, "enable")

    @override
    async def RotateEndpointSecret(
        self, request: pb.RotateEndpointSecretRequest, context: ServicerContext
    ) -> endpoint_pb2.Endpoint:
        check(request)
        tenant, _ = names.parse_child(request.name, "endpoints", "name")
        secret = self._secret(request.secret, "secret")
        overlap = (
            seconds_of(request.overlap) if request.HasField("overlap") else OVERLAP_SECONDS_DEFAULT
        )
        async with self._tenancy.change(tenant) as change:
            current = await self._get(change.connection, change.locked.id, request.name)
            secrets = _rotated(current.spec.secrets, secret, change.locked.now_us, overlap)
            spec = replace(current.spec, secrets=secrets)
            updated = await self._update(change, current, current.state, spec)
        return endpoint_message(updated, tenant, secret=format_secret(secret))

    async def _turn(self, name: str, verb: str) -> endpoint_pb2.Endpoint:
        tenant, _ = names.parse_child(name, "endpoints", "name")
        needed, made = TRANSITIONS[verb]
        async with self._tenancy.change(tenant) as change:
            current = await self._get(change.connection, change.locked.id, name)
            if current.state is not needed:
                raise FailedPrecondition(
                    "WRONG_STATE",
                    f"{name} is {current.state.name.lower()}; only what is {needed.name.lower()} can {verb}",
                    metadata={"resource": name, "state": current.state.name},
                )
            updated = await self._update(change, current, made, current.spec)
        return endpoint_message(updated, tenant)

    async def _get(self, connection: Connection, tenant: int, name: str) -> StoredEndpoint:
        found = await endpoints.get(connection, self._sealer, tenant, name.rpartition("/")[2])
        if found is None:
            raise not_found(name)
        return found

    async def _update(
        self, change: Change, current: StoredEndpoint, state: EndpointState, spec: EndpointSpec
    ) -> StoredEndpoint:
        return await endpoints.update(
            change.connection, self._sealer, change.locked, current, state, spec
        )

    def _secret(self, given: str, field: str) -> bytes:
        if not given:
            return self._random(SECRET_BYTES)
        try:
            return parse_secret(given)
        except InvalidArgument as error:
            raise placed(error, field.removesuffix("secret").rstrip(".")) from None

    def _spec(
        self, message: endpoint_pb2.Endpoint, secrets: tuple[SigningSecret, ...]
    ) -> EndpointSpec:
        try:
            return endpoint_spec(
                message, secrets, retry_window_seconds_max=self._limits.retry_window_seconds_max
            )
        except InvalidArgument as error:
            raise placed(error, "endpoint") from None


def _merge(
    current: endpoint_pb2.Endpoint, given: endpoint_pb2.Endpoint, mask: FieldMask
) -> endpoint_pb2.Endpoint:
    message, touched = validation.merged(current, given, mask, changeable=CHANGEABLE)
    # The batch policy of an endpoint that was one for batches goes with the mode; one given with a wrong mode is an error.
    given_anew = "batch" in touched and given.HasField("batch")
    if message.mode != endpoint_pb2.Endpoint.MODE_BATCH and not given_anew:
        message.ClearField("batch")
    return message


def _require_etag(given: str, current: StoredEndpoint, name: str) -> None:
    validation.require_etag(given, etag(current.created_at, current.version), name)


def _rotated(
    secrets: tuple[SigningSecret, ...], new: bytes, now_us: int, overlap_seconds: float
) -> tuple[SigningSecret, ...]:
    """The new secret, then those before it that go on for the overlap, none of them longer than it had already."""
    ends_us = now_us + int(overlap_seconds * 1_000_000)
    kept = [
        replace(secret, ends_us=ends_us if secret.ends_us is None else min(secret.ends_us, ends_us))
        for secret in secrets
        if secret.holds(now_us)
    ]
    kept = [secret for secret in kept if secret.holds(now_us)]
    if len(kept) >= SECRETS_MAX:
        # Dropping one before its time would break a receiver that was promised it.
        raise FailedPrecondition(
            "LIMIT_REACHED",
            f"{len(kept)} secrets sign already; rotate when one has ended, or with an overlap of 0",
            metadata={"limit": str(SECRETS_MAX)},
        )
    return (SigningSecret(new), *kept)
