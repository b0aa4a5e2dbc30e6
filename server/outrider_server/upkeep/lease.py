"""The node's lease.

Rule: the lease is trusted until `sent + lease - margin` of the local monotonic clock, where `sent` is the moment before the
renewal was asked for: always earlier than the database's own expiry, however long the answer took. Every request checks
that before it is sent. A holder may renew after expiry, as long as nobody took its place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from outrider_server.pipeline.clock import DatabaseClock
from outrider_server.storage import shards
from outrider_server.storage.database import Connection
from outrider_server.storage.shards import TakenShard


class Lease:
    """This boot's lease of the node name. Times are in seconds."""

    def __init__(
        self,
        *,
        node: str,
        boot: str,
        address: str,
        lease_seconds: float,
        renew_seconds: float,
        margin_seconds: float,
        clock: DatabaseClock,
        monotonic: Callable[[], float],
    ) -> None:
        self.node = node
        self.boot = boot
        self.address = address
        self._lease_seconds = lease_seconds
        self._renew_seconds = renew_seconds
        self._margin_seconds = margin_seconds
        self._clock = clock
        self._monotonic = monotonic
        self._deadline = 0.0
        self._held = False

    def holds(self) -> bool:
        """Whether requests may be sent now."""
        return self._monotonic() < self._deadline

    def remaining_seconds(self) -> float:
        """How long it still holds without renewal."""
        return max(0.0, self._deadline - self._monotonic())

    async def take_over(self, connection: Connection) -> list[TakenShard]:
        """Take the lease and every shard that is free for this node; raises `LeaseLost` as `run` does."""
        sent = self._monotonic()
        taken = await shards.take_over(
            connection,
            self.node,
            self.boot,
            self.address,
            self._lease_seconds,
            again=self._held,
        )
        self._held = True
        self._deadline = sent + self._lease_seconds - self._margin_seconds
        await self._measure_clock(connection)
        return taken

    async def run(self, connection: Connection) -> None:
        """Renew for ever; rises when the connection breaks or another boot of this name took the lease."""
        while True:
            await asyncio.sleep(self._renew_seconds)
            sent = self._monotonic()
            await shards.renew_lease(
                connection, self.node, self.boot, self.address, self._lease_seconds
            )
            self._deadline = sent + self._lease_seconds - self._margin_seconds
            await self._measure_clock(connection)

    async def release(self, connection: Connection) -> None:
        """A clean end."""
        self._deadline = 0.0
        await shards.release(connection, self.node, self.boot)

    async def _measure_clock(self, connection: Connection) -> None:
        sent_us = self._clock.local_us()
        database_us = await shards.database_clock_us(connection)
        self._clock.measured(sent_us, database_us, self._clock.local_us())
