"""Reads the ledger's balance of the demo's tenant: what the database itself says is recorded and owed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import asyncpg

from outrider_server.domain.errors import OutriderError
from outrider_server.storage.database import DedicatedConnection
from outrider_server.storage.ledger import Balance, balance

INTERVAL_SECONDS = 0.5
SHARE_MAX = 0.1
"""Of the time, at most, is spent on reading: a long ledger takes longer to sum."""

STORAGE_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, OutriderError, OSError)
"""The ways in which a database that is away shows."""

Connect = Callable[[], Awaitable[DedicatedConnection]]


@dataclass(frozen=True, slots=True)
class Standing:
    """Deliveries by what became of them, since the data began. `holds`: matched is the sum of the others."""

    recorded: int = 0
    owed: int = 0
    holds: bool = True


def standing_of(rows: list[Balance], tenant: str) -> Standing:
    """The standing of one tenant; nothing where it does not exist yet."""
    for row in rows:
        if row.tenant == tenant:
            recorded = row.delivered + row.dead + row.cancelled
            return Standing(recorded, row.owed + row.window, row.holds())
    return Standing()


class LedgerReader:
    """Keeps `at_start` and `now` over a connection of its own, which it opens again when it is lost."""

    def __init__(
        self,
        connect: Connect,
        tenant: str,
        monotonic: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._connect = connect
        self._tenant = tenant
        self._monotonic = monotonic
        self._sleep = sleep
        self._connection: DedicatedConnection | None = None
        self.at_start = Standing()
        self.now = Standing()

    @property
    def recorded(self) -> int:
        """Deliveries recorded since the start."""
        return self.now.recorded - self.at_start.recorded

    async def begin(self) -> None:
        """Take the standing of the start, before the node changes it; all is zero where there are no tables yet."""
        with contextlib.suppress(asyncpg.UndefinedTableError):
            await self.read()
        self.at_start = self.now

    async def read(self) -> None:
        """Bring `now` up to date."""
        if self._connection is None or self._connection.is_closed():
            self._connection = await self._connect()
        self.now = standing_of(await balance(self._connection), self._tenant)

    async def run(self) -> None:
        """Read for ever; while the database is away, `now` stays as it was."""
        while True:
            began = self._monotonic()
            try:
                await self.read()
            except STORAGE_ERRORS:
                self.close()
            took = self._monotonic() - began
            await self._sleep(max(INTERVAL_SECONDS - took, took / SHARE_MAX))

    def close(self) -> None:
        """Let go of the connection."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None
