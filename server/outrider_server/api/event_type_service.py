"""EventTypeService: the event types a tenant knows."""

from __future__ import annotations

import orjson
from google.protobuf.empty_pb2 import Empty
from typing_extensions import override

from outrider.v1 import event_type_pb2, event_type_service_pb2_grpc
from outrider.v1 import event_type_service_pb2 as pb
from outrider_server.api import names, paging, validation
from outrider_server.api.conversion import event_type_message, event_type_spec
from outrider_server.api.errors import ServicerContext
from outrider_server.api.limits import Limits, require_room
from outrider_server.api.tenancy import Tenancy, not_found
from outrider_server.api.validation import check, etag, invalid, placed
from outrider_server.domain.errors import AlreadyExists, InvalidArgument
from outrider_server.matching.event_types import validate_event_type
from outrider_server.storage import event_types
from outrider_server.storage.database import Connection
from outrider_server.storage.event_types import StoredEventType

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["EventTypeService"].full_name

CHANGEABLE = ("description", "schema_json", "sample_json", "owning_module")


class EventTypeService(event_type_service_pb2_grpc.EventTypeServiceServicer):
    """Manages event types."""

    def __init__(self, tenancy: Tenancy, limits: Limits) -> None:
        self._tenancy = tenancy
        self._limits = limits

    @override
    async def CreateEventType(
        self, request: pb.CreateEventTypeRequest, context: ServicerContext
    ) -> event_type_pb2.EventType:
        check(request)
        tenant = names.parse_tenant(request.parent, "parent")
        name = request.event_type_id
        try:
            validate_event_type(name)
        except InvalidArgument as error:
            raise placed(error, "event_type_id") from None
        _check_json(request.event_type)
        async with self._tenancy.change(tenant, dry_run=request.validate_only) as change:
            held = await event_types.count(change.connection, change.locked.id)
            require_room(held, self._limits.event_types_max, "event types")
            made = await event_types.create(
                change.connection, change.locked, name, event_type_spec(request.event_type)
            )
            if made is None:
                resource = names.child_name(tenant, "eventTypes", name)
                raise AlreadyExists(
                    "RESOURCE_EXISTS",
                    f"there is an event type {resource} already",
                    metadata={"resource": resource},
                )
        return event_type_message(made, tenant)

    @override
    async def GetEventType(
        self, request: pb.GetEventTypeRequest, context: ServicerContext
    ) -> event_type_pb2.EventType:
        check(request)
        tenant, _ = names.parse_child(request.name, "eventTypes", "name")
        async with self._tenancy.database.connection() as connection:
            owner = await self._tenancy.resolve(connection, tenant)
            return event_type_message(await _get(connection, owner.id, request.name), tenant)

    @override
    async def ListEventTypes(
        self, request: pb.ListEventTypesRequest, context: ServicerContext
    ) -> pb.ListEventTypesResponse:
        check(request)
        tenant = names.parse_tenant(request.parent, "parent")
        query = f"event types of {tenant}"
        after = validation.parse_page_token(query, request.page_token)
        size = validation.page_size(request.page_size)
        async with self._tenancy.database.connection() as connection:
            owner = await self._tenancy.resolve(connection, tenant)
            rows = await event_types.list_page(
                connection, owner.id, after, size + 1, paging.PAGE_BYTES_MAX
            )
        page, token = paging.fill(query, rows, size, lambda row: event_type_message(row, tenant))
        return pb.ListEventTypesResponse(event_types=page, next_page_token=token)

    @override
    async def UpdateEventType(
        self, request: pb.UpdateEventTypeRequest, context: ServicerContext
    ) -> event_type_pb2.EventType:
        if not request.HasField("event_type"):
            raise invalid("event_type", "value is required")
        given = request.event_type
        tenant, _ = names.parse_child(given.name, "eventTypes", "event_type.name")
        async with self._tenancy.change(tenant, dry_run=request.validate_only) as change:
            current = await _get(change.connection, change.locked.id, given.name)
            _require_etag(given.etag, current, given.name)
            message, _ = validation.merged(
                event_type_message(current, tenant),
                given,
                request.update_mask,
                changeable=CHANGEABLE,
            )
            check(message, "event_type")
            _check_json(message)
            updated = await event_types.update(change.connection, current, event_type_spec(message))
        return event_type_message(updated, tenant)

    @override
    async def DeleteEventType(
        self, request: pb.DeleteEventTypeRequest, context: ServicerContext
    ) -> Empty:
        check(request)
        tenant, _ = names.parse_child(request.name, "eventTypes", "name")
        async with self._tenancy.change(tenant) as change:
            current = await _get(change.connection, change.locked.id, request.name)
            _require_etag(request.etag, current, request.name)
            await event_types.delete(change.connection, current)
        return Empty()


async def _get(connection: Connection, tenant: int, name: str) -> StoredEventType:
    found = await event_types.get(connection, tenant, name.rpartition("/")[2])
    if found is None:
        raise not_found(name)
    return found


def _require_etag(given: str, current: StoredEventType, name: str) -> None:
    validation.require_etag(given, etag(current.created_at, current.version), name)


def _check_json(message: event_type_pb2.EventType) -> None:
    for field, text in (("schema_json", message.schema_json), ("sample_json", message.sample_json)):
        if not text:
            continue
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise invalid(f"event_type.{field}", f"is not JSON: {error}") from None
        if field == "schema_json" and not isinstance(value, dict | bool):
            raise invalid(f"event_type.{field}", "a JSON Schema is an object, true or false")
