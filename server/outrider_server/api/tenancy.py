"""Which tenant a call is about, and changes of a tenant's configuration.

Rules: a key of one tenant gets one and the same answer for every other, whether it exists or not. A change is
answered only after this node knows it (`changed`), so that what is published after the answer is matched by it; where
it is unknown whether a change was committed, the node is told as well. So a change is made only on the node that holds
the tenant's home, and under the fence of its shard: whoever takes the shard over reads the configuration after it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from outrider_server.access.policy import require_tenant
from outrider_server.api import names
from outrider_server.api.interceptors import current_caller
from outrider_server.domain.errors import NotFound, Unavailable
from outrider_server.domain.sequence import SHARD_COUNT
from outrider_server.domain.tenant import Tenant
from outrider_server.storage import shards, tenants
from outrider_server.storage.database import Connection, Database
from outrider_server.storage.tenants import LockedTenant, StoredTenant

Changed = Callable[[int], Awaitable[None]]
"""Told the id of a tenant whose configuration may have changed; returns once the node uses the new one."""


Epoch = Callable[[int], int | None]
"""The epoch under which this node holds a shard; None where it does not."""


@dataclass(frozen=True, slots=True)
class Change:
    """A change under way: its transaction's connection, and the tenant it has locked."""

    connection: Connection
    locked: LockedTenant

    @property
    def tenant(self) -> StoredTenant:
        """The tenant."""
        return self.locked.stored


@dataclass(slots=True)
class Work:
    """A transaction under way, and the tenant it changes, once that is known (`changes`)."""

    connection: Connection
    epoch: Epoch
    tenant: int | None = None

    async def changes(self, tenant: Tenant) -> None:
        """This transaction changes the configuration of `tenant`; raises where another node would have to know."""
        epoch = self.epoch(tenant.shard)
        if epoch is None or not await shards.is_held(self.connection, tenant.shard, epoch):
            raise Unavailable(
                "NOT_READY",
                "this node does not hold the shard that this tenant belongs to",
                retry_after_seconds=1.0,
            )
        self.tenant = tenant.id


class Tenancy:
    """Finds tenants for callers and brings changes to the node."""

    def __init__(self, database: Database, changed: Changed, epoch: Epoch) -> None:
        self._database = database
        self._changed = changed
        self._epoch = epoch

    def held(self) -> list[int]:
        """The shards that this node holds."""
        return [shard for shard in range(SHARD_COUNT) if self._epoch(shard) is not None]

    @property
    def database(self) -> Database:
        """The database, for reads."""
        return self._database

    async def resolve(self, connection: Connection, tenant: str) -> StoredTenant:
        """The tenant of this id, if the current caller's key reaches it."""
        found = await tenants.get(connection, tenant)
        require_tenant(current_caller(), None if found is None else found.id)
        if found is None:
            raise not_found(names.tenant_name(tenant))
        return found

    @asynccontextmanager
    async def work(self, *, dry_run: bool) -> AsyncIterator[Work]:
        """A transaction that tells the node of the tenant it changed, when it is committed. A dry run is taken back."""
        work: Work | None = None
        try:
            async with self._database.transaction(dry_run=dry_run) as connection:
                work = Work(connection, self._epoch)
                yield work
        except (Unavailable, asyncio.CancelledError):
            # It may have been committed all the same.
            if work is not None and work.tenant is not None and not dry_run:
                with contextlib.suppress(Exception):
                    await self._changed(work.tenant)
            raise
        if work.tenant is not None and not dry_run:
            await self._changed(work.tenant)

    @asynccontextmanager
    async def change(self, tenant: str, *, dry_run: bool = False) -> AsyncIterator[Change]:
        """A change of the configuration of a tenant, one at a time, if the current caller's key reaches it."""
        async with self.work(dry_run=dry_run) as work:
            found = await self.resolve(work.connection, tenant)
            locked = await tenants.lock(work.connection, found.id)
            if locked is None:  # deleted between the two
                raise not_found(names.tenant_name(tenant))
            await work.changes(locked.stored.tenant)
            yield Change(work.connection, locked)


def not_found(resource: str) -> NotFound:
    """The error of a resource that does not exist."""
    return NotFound(
        "RESOURCE_NOT_FOUND", f"there is no {resource}", metadata={"resource": resource}
    )
