"""The node's lease, and the shards it takes and gives under it.

Rule: the lease is trusted until `sent + lease - margin` of the local monotonic clock, where `sent` is the moment before the
renewal was asked for: always earlier than the database's own expiry, however long the answer took. Every request checks
that before it is sent. A holder may renew after expiry, as long as nobody took its shards. Nobody is pushed out who is
alive: see `policy.assignment`, and a node waits until nobody runs under its own name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping

from outrider_server.domain.errors import Unavailable
from outrider_server.pipeline.clock import DatabaseClock
from outrider_server.storage import shards
from outrider_server.storage.database import Connection
from outrider_server.storage.shards import LeaseLost

INCUMBENT_CHECK_SECONDS = 0.1

Pause = Callable[[float], Awaitable[bool]]
"""Lets so many seconds pass, or fewer where the node is to stop; tells whether it is."""


class ShardsLost(Unavailable):
    """Another node took shards of this one, which did not renew in time."""

    def __init__(self, lost: Collection[int]) -> None:
        super().__init__(
            "NOT_READY",
            f"other nodes took {len(lost)} of this node's shards; it takes its own up again",
            retry_after_seconds=0.2,
        )


class Lease:
    """This boot's lease of the node name. Times are in seconds.

    `monotonic` must go on while the machine sleeps, where there is such a clock.
    """

    def __init__(
        self,
        *,
        node: str,
        boot: str,
        address: Callable[[], str],
        lease_seconds: float,
        renew_seconds: float,
        margin_seconds: float,
        clock: DatabaseClock,
        monotonic: Callable[[], float],
    ) -> None:
        self.node = node
        self.boot = boot
        self.draining = False
        self._address = address
        self._lease_seconds = lease_seconds
        self._renew_seconds = renew_seconds
        self._margin_seconds = margin_seconds
        self._clock = clock
        self._monotonic = monotonic
        self._deadline = 0.0
        self._held = False
        self._renewing = asyncio.Lock()

    def holds(self) -> bool:
        """Whether requests may be sent now."""
        return self._monotonic() < self._deadline

    def remaining_seconds(self) -> float:
        """How long it still holds without renewal."""
        return max(0.0, self._deadline - self._monotonic())

    async def begin(
        self, connection: Connection, pause: Pause, waiting: Callable[[str], None]
    ) -> bool:
        """Take the lease; false when the node is to stop. `waiting` is told what for.

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
        sent = self._monotonic()
        await shards.become(
            connection,
            self.node,
            self.boot,
            self._address(),
            self._lease_seconds,
            again=self._held,
        )
        self._held = True
        self._deadline = sent + self._lease_seconds - self._margin_seconds
        await self._measure_clock(connection)
        return True

    async def run(self, connection: Connection, held: Callable[[], Mapping[int, int]]) -> None:
        """Renew for ever; raises when the connection breaks, or another boot or node took what this one holds.

        `held` gives the epochs of the shards that this node's memory stands for.
        """
        while True:
            await asyncio.sleep(self._renew_seconds)
            await self.renew(connection, held)

    async def renew(self, connection: Connection, held: Callable[[], Mapping[int, int]]) -> None:
        """Renew once."""
        async with self._renewing:
            await self._renew(connection, held)

    async def _renew(self, connection: Connection, held: Callable[[], Mapping[int, int]]) -> None:
        before = dict(held())
        sent = self._monotonic()
        known = await shards.renew_lease(
            connection,
            self.node,
            self.boot,
            self._address(),
            self._lease_seconds,
            draining=self.draining,
        )
        now = held()
        lost = [
            shard
            for shard, epoch in before.items()
            # What was handed off meanwhile is not lost.
            if known.get(shard) != epoch and now.get(shard) == epoch
        ]
        if lost:
            self._deadline = 0.0
            raise ShardsLost(lost)
        self._deadline = sent + self._lease_seconds - self._margin_seconds
        await self._measure_clock(connection)

    async def end(self, connection: Connection) -> None:
        """A clean end."""
        self._deadline = 0.0
        await shards.end(connection, self.node, self.boot)

    async def _measure_clock(self, connection: Connection) -> None:
        sent_us = self._clock.local_us()
        database_us = await shards.database_clock_us(connection)
        self._clock.measured(sent_us, database_us, self._clock.local_us())
