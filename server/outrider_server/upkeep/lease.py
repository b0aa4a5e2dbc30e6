"""The node's lease.

Rule: the lease is trusted until `sent + lease - margin` of the local monotonic clock, where `sent` is the moment before the
renewal was asked for: always earlier than the database's own expiry, however long the answer took. Every request checks
that before it is sent. A holder may renew after expiry, as long as nobody took its place. Nobody is pushed out who is
alive: a node waits for its turn, until a second look finds a lease of others expired and unchanged, and until nobody runs
under its own name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from outrider_server.pipeline.clock import DatabaseClock
from outrider_server.storage import shards
from outrider_server.storage.database import Connection
from outrider_server.storage.shards import LeaseLost, TakenShard

INCUMBENT_CHECK_SECONDS = 0.1

Pause = Callable[[float], Awaitable[bool]]
"""Lets so many seconds pass, or fewer where the node is to stop; tells whether it is."""


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

    async def turn(
        self, connection: Connection, pause: Pause, waiting: Callable[[str], None]
    ) -> bool:
        """Wait until there are shards to take; false when the node is to stop. `waiting` is told what for.

        Raises `LeaseLost` when a process of this name is still there after a whole lease: one that was killed, even
        with its machine, is not.
        """
        deadline = self._monotonic() + self._lease_seconds
        while not self._held and await shards.has_incumbent(connection, self.node, self.boot):
            if self._monotonic() >= deadline:
                raise LeaseLost(self.node)
            waiting("another process runs as this node")
            if await pause(INCUMBENT_CHECK_SECONDS):
                return False
        seen: frozenset[tuple[object, ...]] = frozenset()
        while True:
            free = await shards.find_free(connection, self.node)
            if free.expired <= seen and (free.unowned or free.expired):
                return True
            seen = free.expired
            waiting("another node holds the shards")
            if await pause(self._renew_seconds):
                return False

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
