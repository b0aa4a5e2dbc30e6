"""Handles: what a sender holds of an event on its way.

Rule: a handle is two words, its frame and its place there. Futures are made only where somebody waits, one for each,
because cancelling one who waits must not cancel the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from typing import Any

from outrider._frames import Ack, Frame
from outrider.errors import OutriderError


class Handle:
    """One event on its way. Await it for its `Ack` or its error; several may await it, and none needs to."""

    __slots__ = ("_frame", "_index")

    def __init__(self, frame: Frame, index: int) -> None:
        self._frame = frame
        self._index = index

    def done(self) -> bool:
        """Whether it is acknowledged or failed."""
        return self._frame.settled

    def result(self) -> Ack:
        """The acknowledgement; raises the event's error, or asyncio.InvalidStateError before it is done."""
        outcome = self._frame.outcome(self._index)
        if isinstance(outcome, Ack):
            return outcome
        raise outcome.again()

    def exception(self) -> OutriderError | None:
        """The event's error, None if it is acknowledged; asyncio.InvalidStateError before it is done."""
        outcome = self._frame.outcome(self._index)
        return None if isinstance(outcome, Ack) else outcome

    async def wait(self) -> None:
        """Wait until it is done, whatever became of it."""
        await settled(self._frame)

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Call `callback()` in the publisher's loop when it is done; at once if it is."""
        frame = self._frame
        if frame.settled:
            callback()
            return
        if frame.on_settled is None:
            frame.on_settled = []
        frame.on_settled.append(callback)

    def __await__(self) -> Generator[Any, None, Ack]:
        if not self._frame.settled:
            yield from settled(self._frame).__await__()
        return self.result()


async def settled(frame: Frame) -> None:
    """Wait until the frame is answered."""
    if frame.settled:
        return
    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiters = frame.waiters
    if waiters is None:
        waiters = frame.waiters = []
    waiters.append(waiter)
    try:
        await waiter
    except asyncio.CancelledError:
        waiters.remove(waiter)
        raise
