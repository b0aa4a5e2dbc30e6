"""Moves: looks at who holds what, takes what this node should have, and gives away what others should.

What a look means is decided in `policy.assignment`; how a shard comes and goes, in `pipeline.tenure`. One move at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Mapping

import structlog

from outrider_server.domain.tenant import TenantConfiguration
from outrider_server.pipeline.homes import Homes
from outrider_server.pipeline.tenure import Tenure
from outrider_server.policy.assignment import Assignment, View
from outrider_server.storage import shards
from outrider_server.storage.database import DedicatedConnection
from outrider_server.telemetry.counters import HomesCounters
from outrider_server.upkeep.lease import Lease

LOOK_SECONDS = 0.5
MOVE_SECONDS_MAX = 2.0
"""How long a shard that is given away for balance may wait for its requests to end, before it stays after all."""

KEPT_SECONDS = 60.0
"""For so long such a shard is not tried again."""

DRAIN_POLL_SECONDS = 0.02

Load = Callable[[Collection[int]], Awaitable[list[TenantConfiguration]]]


class Moves:
    """The moves of one tenure, over one connection. `orderly`: see `storage.shards.take`, of the shards taken first."""

    def __init__(
        self,
        *,
        tenure: Tenure,
        lease: Lease,
        assignment: Assignment,
        homes: Homes,
        connection: DedicatedConnection,
        load: Load,
        monotonic: Callable[[], float],
        renew_seconds: float,
        crash_seconds: float,
        orderly: bool,
        counters: HomesCounters,
        settled: Callable[[View], None],
    ) -> None:
        self._tenure = tenure
        self._lease = lease
        self._assignment = assignment
        self._homes = homes
        self._connection = connection
        self._load = load
        self._monotonic = monotonic
        self._renew_seconds = renew_seconds
        self._crash_seconds = crash_seconds
        self._orderly = orderly
        self._counters = counters
        self._settled = settled
        self._look_now = asyncio.Event()
        self._moving = asyncio.Lock()
        self._given_at = monotonic()
        self._kept: dict[int, float] = {}

    def look_soon(self) -> None:
        """Somebody says that what is known is wrong."""
        self._look_now.set()

    async def run(self) -> None:
        """Look and move for ever."""
        async with self._moving:
            await self._connection.add_listener(shards.CHANNEL, self._told)
        while True:
            await self.look()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._look_now.wait()
            self._look_now.clear()

    async def look(self) -> None:
        """Look once, and take or give what is due."""
        async with self._moving:
            view = await shards.look(self._connection)
            self._homes.looked(view)
            held = self._tenure.obligations.windows
            wanted = (
                []
                if self._lease.draining
                else self._assignment.to_take(view, self._monotonic(), held)
            )
            if wanted:
                taken = await shards.take(
                    self._connection,
                    self._lease.node,
                    self._lease.boot,
                    wanted,
                    orderly=self._orderly,
                    crash_seconds=self._crash_seconds,
                )
                await self._adopt(taken)
                view = await shards.look(self._connection)
                self._homes.looked(view)
            self._settled(view)
            if not self._lease.draining and self._is_time_to_give():
                await self._give_one(view)

    async def drain(self, seconds_max: float) -> None:
        """Hand every shard off: those without requests under way at once, the others as these end.

        What has not ended after `seconds_max` is given away as it is.
        """
        async with self._moving:
            until = self._monotonic() + seconds_max
            view = await shards.look(self._connection)
            obligations = self._tenure.obligations
            spread = self._assignment.spread(view, obligations.windows)
            for shard in spread:  # all pause at once: their requests end side by side
                obligations.pause_shard(shard)
            while left := sorted(spread.keys() & obligations.windows.keys()):
                busy = obligations.busy_shards()
                idle = [shard for shard in left if shard not in busy]
                if self._monotonic() >= until:
                    await self._tenure.abandon(left, self._giver(spread))
                    return
                for shard in idle:
                    if await self._release(
                        shard, spread[shard], max(0.0, until - self._monotonic())
                    ):
                        continue
                    obligations.pause_shard(shard)
                if not idle:
                    await asyncio.sleep(DRAIN_POLL_SECONDS)

    async def _adopt(self, taken: list[shards.TakenShard]) -> None:
        if not taken:
            return
        log = structlog.get_logger()
        started = self._monotonic()
        held_back = await self._tenure.adopt(self._connection, taken, self._load)
        if held_back:
            await shards.mark_held_back(self._connection, held_back)
            log.error(
                "shard.held_back",
                shards=held_back,
                why="their owners kept ending over them; what they owe waits until `outrider-server let-go`",
            )
        self._counters.shards_taken += len(taken)
        self._counters.adopt_seconds.observe(self._monotonic() - started)
        log.info(
            "shards.taken",
            shards=len(taken),
            held=len(self._tenure.obligations.windows),
            seconds=round(self._monotonic() - started, 3),
        )

    def _is_time_to_give(self) -> bool:
        """At most one shard a renewal moves for the sake of balance."""
        return self._monotonic() - self._given_at >= self._renew_seconds

    async def _give_one(self, view: View) -> None:
        """Rather one without requests under way: a hand-off pauses the shard until they end."""
        now = self._monotonic()
        self._kept = {s: at for s, at in self._kept.items() if now - at < KEPT_SECONDS}
        held = self._tenure.obligations.windows
        busy = self._tenure.obligations.busy_shards()
        given = self._assignment.to_give(
            view, held, busy | self._kept.keys()
        ) or self._assignment.to_give(view, held, self._kept)
        if given is None:
            return
        self._given_at = now
        shard, target = given
        if await self._release(shard, target, MOVE_SECONDS_MAX):
            structlog.get_logger().info("shard.handed_off", shard=shard, to=target)
        else:
            self._kept[shard] = now

    async def _release(self, shard: int, target: str | None, seconds_max: float) -> bool:
        given = await self._tenure.release(
            shard, self._giver({shard: target}), seconds_max=seconds_max
        )
        self._counters.shards_handed_off += given
        self._counters.shards_kept += not given
        return given

    def _giver(self, targets: Mapping[int, str | None]) -> Callable[[int, int], Awaitable[None]]:
        async def give(shard: int, epoch: int) -> None:
            await shards.release(
                self._connection, self._lease.node, [(shard, epoch, targets[shard])]
            )

        return give

    def _told(self, *_: object) -> None:
        self._look_now.set()
