"""The event_type table. Every write happens under the tenant's lock (`tenants.lock`)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import asyncpg

from outrider_server.storage.database import Connection
from outrider_server.storage.queries import load
from outrider_server.storage.tenants import LockedTenant


@dataclass(frozen=True, slots=True)
class EventTypeSpec:
    """What a caller decides about an event type. The two JSON texts may be empty."""

    description: str = ""
    schema_json: str = ""
    sample_json: str = ""
    owning_module: str = ""


@dataclass(frozen=True, slots=True)
class StoredEventType:
    """An event type's row."""

    tenant: int
    name: str
    version: int
    spec: EventTypeSpec
    created_at: datetime
    updated_at: datetime


async def create(
    connection: Connection, locked: LockedTenant, name: str, spec: EventTypeSpec
) -> StoredEventType | None:
    """Make an event type; None where it exists."""
    row = await connection.fetchrow(load("insert_event_type"), locked.id, name, *_columns(spec))
    return None if row is None else _stored(row)


async def get(connection: Connection, tenant: int, name: str) -> StoredEventType | None:
    """The event type of this name."""
    row = await connection.fetchrow(load("get_event_type"), tenant, name)
    return None if row is None else _stored(row)


async def list_page(
    connection: Connection, tenant: int, after: str, count: int, bytes_max: int
) -> list[StoredEventType]:
    """At most `count` event types whose names follow `after`, ending with the one that goes beyond `bytes_max`."""
    rows = await connection.fetch(load("list_event_types"), tenant, after, count, bytes_max)
    return [_stored(row) for row in rows]


async def count(connection: Connection, tenant: int) -> int:
    """How many event types a tenant knows."""
    return int(await connection.fetchval(load("count_event_types"), tenant))


async def update(
    connection: Connection, event_type: StoredEventType, spec: EventTypeSpec
) -> StoredEventType:
    """Change an event type."""
    row = await connection.fetchrow(
        load("update_event_type"), event_type.tenant, event_type.name, *_columns(spec)
    )
    if row is None:
        raise LookupError(f"event type {event_type.name} is gone")
    return _stored(row)


async def delete(connection: Connection, event_type: StoredEventType) -> None:
    """Delete an event type."""
    await connection.execute(load("delete_event_type"), event_type.tenant, event_type.name)


def _columns(spec: EventTypeSpec) -> tuple[str, str, str, str]:
    return spec.description, spec.schema_json, spec.sample_json, spec.owning_module


def _stored(row: asyncpg.Record) -> StoredEventType:
    return StoredEventType(
        tenant=row["tenant"],
        name=row["name"],
        version=row["version"],
        spec=EventTypeSpec(
            description=row["description"],
            schema_json=row["schema_json"],
            sample_json=row["sample_json"],
            owning_module=row["owning_module"],
        ),
        created_at=row["created_at"],
        updated_at=row["updated_at"],
    )
