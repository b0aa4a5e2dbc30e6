"""The tenant table. `lock` begins every change of a tenant's configuration, whatever table the change is in."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

import asyncpg

from outrider_server.domain.sequence import SHARD_COUNT
from outrider_server.domain.tenant import Tenant
from outrider_server.storage.database import Connection
from outrider_server.storage.queries import load

SPREAD_LOCK_MS_MAX = 200
"""Less than the database takes to find a deadlock."""


@dataclass(frozen=True, slots=True)
class StoredTenant:
    """A tenant's row."""

    tenant: Tenant
    version: int
    created_at: datetime
    updated_at: datetime

    @property
    def id(self) -> int:
        """The internal id."""
        return self.tenant.id

    @property
    def name(self) -> str:
        """The last part of its resource name."""
        return self.tenant.name


@dataclass(frozen=True, slots=True)
class LockedTenant:
    """A tenant whose row this transaction holds, its configuration's version raised already.

    `now_us` is the database's clock, the one that secrets end by.
    """

    stored: StoredTenant
    now_us: int

    @property
    def id(self) -> int:
        """The internal id."""
        return self.stored.id

    @property
    def config_version(self) -> int:
        """The version that this transaction makes."""
        return self.stored.tenant.config_version


async def create(
    connection: Connection,
    name: str,
    display_name: str,
    *,
    strict_types: bool,
    shards: Collection[int] = range(SHARD_COUNT),
) -> StoredTenant | None:
    """Make a tenant on the least used of these shards; None where the name is taken. In a transaction."""
    await connection.execute(load("lock_installation"))
    row = await connection.fetchrow(
        load("insert_tenant"), name, display_name, strict_types, sorted(shards)
    )
    return None if row is None else _stored(row)


async def get(connection: Connection, name: str) -> StoredTenant | None:
    """The tenant of this name."""
    row = await connection.fetchrow(load("get_tenant"), name)
    return None if row is None else _stored(row)


async def least_used_shards(connection: Connection) -> list[tuple[int, int]]:
    """All shards with the number of their tenants, those with the fewest first."""
    return [(row[0], row[1]) for row in await connection.fetch(load("least_used_shards"))]


async def find_homes(
    connection: Connection, names: Collection[str], ids: Collection[int]
) -> list[tuple[int, str, tuple[int, ...]]]:
    """(id, name, shards) of the tenants of these names or ids; those that do not exist are left out."""
    rows = await connection.fetch(load("find_homes"), list(names), list(ids))
    return [(row["id"], row["name"], tuple(row["shards"])) for row in rows]


async def list_page(connection: Connection, after: str, count: int) -> list[StoredTenant]:
    """At most `count` tenants whose names follow `after`."""
    return [_stored(row) for row in await connection.fetch(load("list_tenants"), after, count)]


async def lock(connection: Connection, tenant: int) -> LockedTenant | None:
    """Raise the version of a tenant's configuration and hold its row until the transaction ends; None if it is gone."""
    row = await connection.fetchrow(load("lock_tenant"), tenant)
    return None if row is None else LockedTenant(_stored(row), microseconds(row["now"]))


async def hold(connection: Connection, tenant: int) -> bool:
    """Hold a tenant's row without a change of configuration; false if the tenant is gone."""
    return await connection.fetchval(load("hold_tenant"), tenant) is not None


async def update(
    connection: Connection, tenant: int, display_name: str, *, strict_types: bool
) -> StoredTenant:
    """Change a tenant that this transaction has locked."""
    row = await connection.fetchrow(load("update_tenant"), tenant, display_name, strict_types)
    return _stored(_present(row))


async def freeze(connection: Connection, tenant: int, seconds: float) -> None:
    """Take nothing in for a tenant that this transaction has locked, for so long at most; 0: take it in again."""
    await connection.execute(load("freeze_tenant"), tenant, seconds)


async def spread(
    connection: Connection, locked: LockedTenant, count: int, held: Collection[int]
) -> StoredTenant | None:
    """Spread a locked, frozen tenant over `count` shards; None while deliveries of it still wait for their turn.

    Those shards that it is in stay, the least used join. Whoever else owns one of its shards than this node, which holds
    `held`, takes it anew: nobody can go on taking events in as they were spread before. Their exclusive locks are waited
    for only shortly: who spreads two tenants at once, or takes over, holds some of them and waits for others.
    """
    tenant = locked.stored.tenant
    before = list(tenant.spread)
    chosen = await _chosen(connection, before, count)
    touched = sorted({*before, *chosen, *tenant.former_shards})
    await connection.execute(f"SET LOCAL lock_timeout = {SPREAD_LOCK_MS_MAX}")
    try:
        async with connection.transaction():
            await connection.execute(load("lock_shards"), touched)
            if await connection.fetchval(load("waiting_deliveries"), tenant.id, touched):
                return None
            row = await connection.fetchrow(load("spread_tenant"), tenant.id, chosen)
            if row is None:
                return None
            await connection.execute(
                load("raise_epochs"), [shard for shard in touched if shard not in held]
            )
            return _stored(row)
    except asyncpg.LockNotAvailableError:
        return None


async def place(connection: Connection, made: StoredTenant, count: int) -> StoredTenant:
    """Spread a tenant that this transaction made over `count` shards: its home, and the least used others."""
    chosen = await _chosen(connection, [made.tenant.shard], count)
    row = await connection.fetchrow(load("place_tenant"), made.id, chosen)
    return _stored(_present(row))


async def _chosen(connection: Connection, before: list[int], count: int) -> list[int]:
    """`count` shards: of those it is in, then the least used others."""
    chosen = before[:count]
    for shard, _ in await least_used_shards(connection):
        if len(chosen) < count and shard not in chosen:
            chosen.append(shard)
    return chosen


async def find_split(connection: Connection, shards: Collection[int]) -> dict[int, int]:
    """The configuration's version of tenants that have something in several shards, of which these are some."""
    rows = await connection.fetch(load("find_split_tenants"), sorted(shards))
    return {row["id"]: row["config_version"] for row in rows}


async def delete(connection: Connection, locked: LockedTenant) -> None:
    """Delete a locked tenant softly, and revoke its keys."""
    await connection.execute(load("delete_tenant"), locked.id)
    await connection.execute(load("revoke_tenant_api_keys"), locked.id)


def microseconds(at: datetime) -> int:
    """A time as microseconds since 1970 UTC, exactly."""
    return int(at.timestamp()) * 1_000_000 + at.microsecond


def _present(row: asyncpg.Record | None) -> asyncpg.Record:
    if row is None:
        raise LookupError("a locked row is gone")
    return row


def _stored(row: asyncpg.Record) -> StoredTenant:
    return StoredTenant(
        tenant=Tenant(
            id=row["id"],
            name=row["name"],
            shard=row["shard"],
            shards=tuple(row["shards"]),
            former_shards=tuple(row["former_shards"]),
            frozen_until_us=microseconds(row["frozen_until"]) if row["frozen_until"] else 0,
            strict_types=row["strict_types"],
            config_version=row["config_version"],
            display_name=row["display_name"],
        ),
        version=row["version"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
    )
