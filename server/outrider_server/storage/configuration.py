"""Everything of a tenant that matching and delivery use, read in one snapshot and by whole tables.

Rule: what comes out agrees with its `tenant.config_version`: the four statements see the same state, and every change
raised the version in its own transaction.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Collection

from outrider_server.domain.endpoint import Endpoint
from outrider_server.domain.subscription import Subscription
from outrider_server.domain.tenant import Tenant, TenantConfiguration
from outrider_server.secrets.sealing import Sealer
from outrider_server.storage import endpoints, subscriptions
from outrider_server.storage.database import Connection, translated
from outrider_server.storage.queries import load
from outrider_server.storage.tenants import microseconds

# Events go on arriving while a configuration is loaded; unsealing this many rows takes about a millisecond.
_ROWS_BEFORE_YIELD = 32


async def load_shards(
    connection: Connection, sealer: Sealer, shards: Collection[int]
) -> list[TenantConfiguration]:
    """The configuration of every tenant of these shards. The connection must not be in a transaction.

    Raises a SecretsError where an endpoint cannot be unsealed: no tenant's deliveries may quietly go nowhere.
    """
    return await _load(connection, sealer, None, shards)


async def load_tenant(
    connection: Connection, sealer: Sealer, tenant: int
) -> TenantConfiguration | None:
    """The configuration of one tenant; None where it does not exist or was deleted."""
    found = await _load(connection, sealer, tenant, ())
    return found[0] if found else None


async def holds_sealed(connection: Connection) -> bool:
    """Whether anything that is still read was sealed."""
    with translated():
        return bool(await connection.fetchval(load("holds_sealed")))


async def _load(
    connection: Connection, sealer: Sealer, tenant: int | None, shards: Collection[int]
) -> list[TenantConfiguration]:
    with translated():
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            tenant_rows = await connection.fetch(load("load_tenants"), tenant, sorted(shards))
            ids = [row["id"] for row in tenant_rows]
            endpoint_rows = await connection.fetch(load("load_endpoints"), ids)
            subscription_rows = await connection.fetch(load("load_subscriptions"), ids)
            type_rows = await connection.fetch(load("load_event_types"), ids)
    if not tenant_rows:
        return []
    now_us = microseconds(tenant_rows[0]["now"])
    by_tenant: dict[int, tuple[list[Endpoint], list[Subscription], list[str]]]
    by_tenant = defaultdict(lambda: ([], [], []))
    for index, row in enumerate(endpoint_rows):
        by_tenant[row["tenant"]][0].append(endpoints.loaded(row, sealer, now_us))
        if index % _ROWS_BEFORE_YIELD == 0:
            await asyncio.sleep(0)
    for index, row in enumerate(subscription_rows):
        if index % _ROWS_BEFORE_YIELD == 0:
            await asyncio.sleep(0)
        by_tenant[row["tenant"]][1].append(subscriptions.loaded(row))
    for row in type_rows:
        by_tenant[row["tenant"]][2].append(row["name"])
    configurations = []
    for row in tenant_rows:
        of_tenant = by_tenant[row["id"]]
        configurations.append(
            TenantConfiguration(
                tenant=Tenant(
                    id=row["id"],
                    name=row["name"],
                    shard=row["shard"],
                    shards=tuple(row["shards"]),
                    former_shards=tuple(row["former_shards"]),
                    frozen_until_us=microseconds(row["frozen_until"]) if row["frozen_until"] else 0,
                    spread_us=0 if row["spread_at"] is None else microseconds(row["spread_at"]),
                    strict_types=row["strict_types"],
                    config_version=row["config_version"],
                    display_name=row["display_name"],
                ),
                endpoints=tuple(of_tenant[0]),
                subscriptions=tuple(of_tenant[1]),
                event_types=frozenset(of_tenant[2]),
            )
        )
    return configurations
