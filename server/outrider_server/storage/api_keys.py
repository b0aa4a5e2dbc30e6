"""The api_key table. It holds hashes alone: a key's text is nowhere.

Rule: an id is `<tenant's number>/<name>`, or `/<name>` without a tenant, so that tenants do not meet in each other's
names. A revoked key's row stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import asyncpg

from outrider_server.domain.access import Role
from outrider_server.storage.database import Connection
from outrider_server.storage.queries import load


@dataclass(frozen=True, slots=True)
class StoredApiKey:
    """A key's row, without its hash."""

    id: str
    tenant: int | None
    role: Role
    display_name: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None

    @property
    def name(self) -> str:
        """The last part of its resource name."""
        return self.id.partition("/")[2]


@dataclass(frozen=True, slots=True)
class FoundApiKey:
    """What authentication needs of a key, as the database's clock judges it."""

    id: str
    tenant: int | None
    role: Role
    revoked: bool
    expired: bool


def key_id(tenant: int | None, name: str) -> str:
    """The id of a tenant's key of this name."""
    return f"{'' if tenant is None else tenant}/{name}"


async def create(
    connection: Connection,
    *,
    tenant: int | None,
    name: str,
    role: Role,
    digest: bytes,
    display_name: str,
    expires_at: datetime | None,
) -> StoredApiKey | None:
    """Make a key; None where the name is taken."""
    row = await connection.fetchrow(
        load("insert_api_key"),
        key_id(tenant, name),
        tenant,
        role,
        digest,
        display_name,
        expires_at,
    )
    return None if row is None else _stored(row)


async def lock_installation(connection: Connection) -> None:
    """Serialise this transaction with others that make keys of no tenant."""
    await connection.execute(load("lock_installation"))


async def get(connection: Connection, tenant: int | None, name: str) -> StoredApiKey | None:
    """The key of this name."""
    row = await connection.fetchrow(load("get_api_key"), key_id(tenant, name))
    return None if row is None else _stored(row)


async def list_page(
    connection: Connection, tenant: int | None, after: str, count: int
) -> list[StoredApiKey]:
    """At most `count` keys whose names follow `after`, revoked ones too."""
    after_id = key_id(tenant, after) if after else ""
    rows = await connection.fetch(load("list_api_keys"), tenant, after_id, count)
    return [_stored(row) for row in rows]


async def count(connection: Connection, tenant: int | None) -> int:
    """How many keys hold."""
    return int(await connection.fetchval(load("count_api_keys"), tenant))


async def revoke(connection: Connection, tenant: int | None, name: str) -> StoredApiKey | None:
    """Revoke a key; None where there is none, or it is revoked already."""
    row = await connection.fetchrow(load("revoke_api_key"), key_id(tenant, name))
    return None if row is None else _stored(row)


async def find(connection: Connection, digest: bytes) -> FoundApiKey | None:
    """The key of this hash, whether it holds or not."""
    row = await connection.fetchrow(load("find_api_key"), digest)
    if row is None:
        return None
    return FoundApiKey(
        id=row["id"],
        tenant=row["tenant"],
        role=Role(row["role"]),
        revoked=row["revoked"],
        expired=row["expired"],
    )


async def find_ended(connection: Connection, ids: Sequence[str]) -> dict[str, bool]:
    """Those of `ids` that do not hold any more, each with whether it was revoked (else it expired)."""
    rows = await connection.fetch(load("find_ended_api_keys"), ids)
    return {row["id"]: row["revoked"] for row in rows}


def _stored(row: asyncpg.Record) -> StoredApiKey:
    return StoredApiKey(
        id=row["id"],
        tenant=row["tenant"],
        role=Role(row["role"]),
        display_name=row["display_name"],
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        revoked_at=row["revoked_at"],
    )
