"""Long work gives way: after 2 ms of it the loop gets its turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

SLICE_SECONDS = 0.002


class GiveWay:
    """In a loop: `if giving_way.due(): await giving_way()`. Every 2 ms it lets others run."""

    __slots__ = ("_monotonic", "_until")

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._until = monotonic() + SLICE_SECONDS

    def due(self) -> bool:
        """Whether it is time. Asked first, for awaiting costs more than asking."""
        return self._monotonic() > self._until

    async def __call__(self) -> None:
        """Let others run."""
        await asyncio.sleep(0)
        self._until = self._monotonic() + SLICE_SECONDS
