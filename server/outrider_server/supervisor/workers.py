"""All workers of a service: kept alive together, restarted one after the other, drained together.

Rule: whoever stops this stops them first and waits; what does not drain in time is killed, which the log survives.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog

from outrider_server.supervisor.leases import Leases
from outrider_server.supervisor.worker import Refusal, Worker

MARGIN_SECONDS = 6.0
"""What a node may take for its end beside its drain: its last metrics, its calls under way, its connections."""

READY_SECONDS_MAX = 60.0
"""How long a restart of one after the other waits for a worker before it leaves the rest as they are."""


class DrainIncomplete(Exception):
    """Some workers were killed or died while they drained. Nothing acknowledged is lost; some may be delivered twice."""


class Workers:
    """Runs its workers until `stop`. `drain_seconds` is how long each may take for its requests under way."""

    def __init__(self, workers: Sequence[Worker], *, leases: Leases, drain_seconds: float) -> None:
        self.each = tuple(workers)
        self._leases = leases
        self._drain_seconds = drain_seconds + MARGIN_SECONDS
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._roll = asyncio.Event()
        self._refusal: Refusal | None = None
        self._log = structlog.get_logger()

    def stop(self) -> None:
        """Drain and end; asked again, kill what has not drained."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    def roll(self) -> None:
        """Restart the workers one after the other, each when the one before is ready again."""
        self._roll.set()

    @property
    def alive(self) -> int:
        return sum(worker.pid is not None for worker in self.each)

    async def run(self) -> None:
        """Until `stop`. Raises Refusal or DrainIncomplete, with no process left."""
        async with asyncio.TaskGroup() as tasks:
            keepers = {tasks.create_task(self._keep(worker)) for worker in self.each}
            roller = tasks.create_task(self._roll_when_asked())
            await self._stop.wait()
            roller.cancel()
            await self._drain(keepers)
        if self._refusal is not None:
            raise self._refusal
        unclean = [worker.name for worker in self.each if worker.unclean]
        if unclean:
            raise DrainIncomplete(
                f"{', '.join(unclean)} did not drain in order; what was under way there may be delivered twice."
            )

    async def _keep(self, worker: Worker) -> None:
        try:
            await worker.keep()
        except Refusal as refusal:
            self._refusal = self._refusal or refusal
            self._stop.set()

    async def _drain(self, keepers: set[asyncio.Task[None]]) -> None:
        self._log.info("workers.draining", workers=self.alive)
        await self._leases.set_draining([worker.name for worker in self.each])
        for worker in self.each:
            worker.stop()
        hurry = asyncio.ensure_future(self._hurry.wait())
        ended = asyncio.ensure_future(asyncio.wait(keepers))
        try:
            await asyncio.wait(
                {ended, hurry}, timeout=self._drain_seconds, return_when=asyncio.FIRST_COMPLETED
            )
            for worker in self.each:
                if worker.pid is not None:
                    self._log.warning(
                        "worker.killed", node=worker.name, why="it did not drain in time"
                    )
                    worker.kill()
            await ended
        finally:
            hurry.cancel()

    async def _roll_when_asked(self) -> None:
        while True:
            await self._roll.wait()
            self._roll.clear()
            self._log.info("workers.rolling", workers=len(self.each))
            for worker in self.each:
                if not await worker.roll(self._drain_seconds, READY_SECONDS_MAX):
                    # It would be in the same way with the next one.
                    self._log.error(
                        "workers.roll_ended", node=worker.name, why="it did not get ready"
                    )
                    break
            else:
                self._log.info("workers.rolled", workers=len(self.each))
