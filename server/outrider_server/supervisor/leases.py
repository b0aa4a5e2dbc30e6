"""What the supervisor writes into the database about its own nodes: that one is dead, and that all of them go.

Rule: nothing depends on it. A lease ends by itself and nodes drain without being told; this only spares the others a wait.
So a database that is away costs a bounded moment, and nothing is tried twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeAlias

import asyncpg
import structlog
from typing_extensions import override

from outrider_server.domain.errors import OutriderError
from outrider_server.storage.database import DedicatedConnection, connect, translated
from outrider_server.storage.queries import load

SECONDS_MAX = 1.0

_Work: TypeAlias = Callable[[DedicatedConnection], Awaitable[None]]

FIND_BOOT = "SELECT boot FROM node WHERE name = $1 AND expires_at > '-infinity'"
SET_DRAINING = "UPDATE node SET draining = true WHERE name = ANY($1::text[])"


class Leases(Protocol):
    """What a supervisor tells about its nodes."""

    async def expire(self, node: str) -> None:
        """The process that ran as `node` is dead, and no other runs under that name yet."""

    async def set_draining(self, nodes: Sequence[str]) -> None:
        """These nodes are about to be stopped, so none should give its shards to another of them."""


class DatabaseLeases(Leases):
    """Over one connection, made when it is needed and kept. Close it."""

    def __init__(self, dsn: str, *, name: str, boot: str) -> None:
        self._dsn = dsn
        self._name = name
        self._boot = boot
        self._connection: DedicatedConnection | None = None
        self._turn = asyncio.Lock()
        self._log = structlog.get_logger()

    @override
    async def expire(self, node: str) -> None:
        async def work(connection: DedicatedConnection) -> None:
            # By boot, so that a statement that arrives late does no harm to the next life of that name.
            boot = await connection.fetchval(FIND_BOOT, node)
            if boot is not None:
                await connection.execute(load("expire_node"), node, boot)

        await self._do("lease.not_expired", node, work)

    @override
    async def set_draining(self, nodes: Sequence[str]) -> None:
        async def work(connection: DedicatedConnection) -> None:
            await connection.execute(SET_DRAINING, list(nodes))

        await self._do("drain.not_told", ",".join(nodes), work)

    async def close(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    async def _do(self, failure: str, node: str, work: _Work) -> None:
        try:
            async with asyncio.timeout(SECONDS_MAX), self._turn:
                if self._connection is None or self._connection.is_closed():
                    self._connection = await connect(
                        self._dsn,
                        "supervisor",
                        node=self._name,
                        boot=self._boot,
                        statement_seconds_max=SECONDS_MAX,
                    )
                with translated():
                    await work(self._connection)
        except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError):
            pass  # the schema is older than this: its nodes know nothing of it either
        except (OutriderError, TimeoutError, asyncpg.PostgresError) as error:
            await self.close()
            self._log.warning(failure, node=node, error=type(error).__name__, detail=str(error))
