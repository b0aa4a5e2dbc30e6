"""Publishes sample events through the real client at a bounded rate, and stops for as long as the disk's bound is passed.

Rule: what could not be published in time is not made up for beyond a second's worth, so an outage is not followed by a
flood; the publisher's window bounds what is held meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from outrider.errors import OutriderError
from outrider.publisher import Handle
from outrider.v1.event_pb2 import Event

TICK_SECONDS = 0.02
DEBT_SECONDS_MAX = 1.0
DISK_CHECK_SECONDS = 5.0
RESUME_SHARE = 0.9
"""Of the disk's bound: publishing goes on below it, so that it does not flutter."""

Send = Callable[[Event], Awaitable[Handle]]


class Pace:
    """How many events are due. `rate` is per second."""

    def __init__(self, rate: float, now: float) -> None:
        self._rate = rate
        self._last = now
        self._debt = 0.0

    def due(self, now: float) -> int:
        """How many to publish now."""
        self._debt += (now - self._last) * self._rate
        self._last = now
        # At least one, or a rate below one a second would never come to an event.
        self._debt = min(self._debt, max(self._rate * DEBT_SECONDS_MAX, 1.0))
        count = int(self._debt)
        self._debt -= count
        return count


@dataclass(slots=True)
class DiskBound:
    """Whether the folder is too full to publish more."""

    bytes_max: int
    used: int = 0
    passed: bool = False

    def see(self, used: int) -> None:
        """Take note of what is used now."""
        self.used = used
        if used > self.bytes_max:
            self.passed = True
        elif used < self.bytes_max * RESUME_SHARE:
            self.passed = False


class Traffic:
    """The publishing loop. `problem` is the sentence to show while nothing is published; empty while all is well."""

    def __init__(
        self,
        *,
        send: Send,
        next_event: Callable[[], Event],
        rate: float,
        disk: DiskBound,
        monotonic: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._send = send
        self._next_event = next_event
        self._rate = rate
        self._disk = disk
        self._monotonic = monotonic
        self._sleep = sleep
        self.problem = ""

    async def run(self) -> None:
        """Publish until cancelled, or until the publisher fails for good."""
        pace = Pace(self._rate, self._monotonic())
        while True:
            due = pace.due(self._monotonic())
            if not self._disk.passed:
                try:
                    for _ in range(due):
                        # Its outcome is counted by the publisher; what matters here is that sending waits for room.
                        _ = await self._send(self._next_event())
                except OutriderError as error:
                    self.problem = f"publishing has ended: {error}"
                    return
            await self._sleep(TICK_SECONDS)


async def watch_disk(
    disk: DiskBound,
    measure: Callable[[], int],
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Measure for ever, in a thread: there may be thousands of files."""
    while True:
        disk.see(await asyncio.to_thread(measure))
        await sleep(DISK_CHECK_SECONDS)
