"""The subscription table.

Rule: a subscription's row and its revision are written by one statement, under its tenant's lock (`tenants.lock`).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import asyncpg

from outrider_server.domain.subscription import Subscription, SubscriptionState
from outrider_server.storage.database import Connection
from outrider_server.storage.queries import load
from outrider_server.storage.tenants import LockedTenant


@dataclass(frozen=True, slots=True)
class SubscriptionSpec:
    """What a caller decides about a subscription; `filter_ast` is the checked form of `filter_text`."""

    types: tuple[str, ...]
    filter_text: str = ""
    filter_ast: bytes | None = None
    display_name: str = ""


@dataclass(frozen=True, slots=True)
class StoredSubscription:
    """A subscription's row, with its endpoint's name."""

    id: int
    tenant: int
    name: str
    endpoint_name: str
    version: int
    state: SubscriptionState
    spec: SubscriptionSpec
    created_at: datetime
    updated_at: datetime


async def create(
    connection: Connection, locked: LockedTenant, name: str, endpoint: int, spec: SubscriptionSpec
) -> StoredSubscription | None:
    """Make a subscription; None where the name is taken."""
    row = await connection.fetchrow(
        load("insert_subscription"),
        locked.id,
        name,
        endpoint,
        spec.display_name,
        spec.types,
        spec.filter_text,
        spec.filter_ast,
        locked.config_version,
    )
    return None if row is None else _stored(row)


async def get(connection: Connection, tenant: int, name: str) -> StoredSubscription | None:
    """The subscription of this name."""
    row = await connection.fetchrow(load("get_subscription"), tenant, name)
    return None if row is None else _stored(row)


async def list_page(
    connection: Connection, tenant: int, after: str, count: int
) -> list[StoredSubscription]:
    """At most `count` subscriptions whose names follow `after`."""
    rows = await connection.fetch(load("list_subscriptions"), tenant, after, count)
    return [_stored(row) for row in rows]


async def count(connection: Connection, tenant: int) -> int:
    """How many subscriptions a tenant has."""
    return int(await connection.fetchval(load("count_subscriptions"), tenant))


async def update(
    connection: Connection,
    locked: LockedTenant,
    subscription: StoredSubscription,
    state: SubscriptionState,
    spec: SubscriptionSpec,
) -> StoredSubscription:
    """Change a subscription; state DELETED deletes it softly."""
    row = await connection.fetchrow(
        load("update_subscription"),
        subscription.id,
        state,
        spec.display_name,
        spec.types,
        spec.filter_text,
        spec.filter_ast,
        locked.config_version,
    )
    if row is None:
        raise LookupError(f"subscription {subscription.id} is gone")
    return _stored(row)


def loaded(row: asyncpg.Record) -> Subscription:
    """The subscription as matching uses it."""
    return Subscription(
        id=row["id"],
        tenant=row["tenant"],
        name=row["name"],
        endpoint=row["endpoint"],
        types=tuple(row["types"]),
        filter_text=row["filter"],
        filter_ast=row["filter_ast"],
        state=SubscriptionState(row["state"]),
        version=row["version"],
    )


def _stored(row: asyncpg.Record) -> StoredSubscription:
    return StoredSubscription(
        id=row["id"],
        tenant=row["tenant"],
        name=row["name"],
        endpoint_name=row["endpoint_name"],
        version=row["version"],
        state=SubscriptionState(row["state"]),
        spec=SubscriptionSpec(
            types=tuple(row["types"]),
            filter_text=row["filter"],
            filter_ast=row["filter_ast"],
            display_name=row["display_name"],
        ),
        created_at=row["created_at"],
        updated_at=row["updated_at"],
    )
