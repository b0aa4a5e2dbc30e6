"""The database's clock, as this node reads it: its own clock plus an offset measured at each lease renewal.

Sequences, due times and record times of every node come from this one clock. The node's own clock is one that nobody
sets: a step of the machine's would stand in sequences until the next renewal, and sequences never go back.
"""

from __future__ import annotations

import time
from collections.abc import Callable

_STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_STARTED_US = (time.time_ns() - time.clock_gettime_ns(_STEADY)) // 1000


def steady_us() -> int:
    """Microseconds since 1970 UTC as the machine's clock had it when this process began, and steady since."""
    return _STARTED_US + time.clock_gettime_ns(_STEADY) // 1000


class DatabaseClock:
    """Microseconds since 1970 UTC by the database's clock. `local_us` is this machine's clock, likewise."""

    def __init__(self, local_us: Callable[[], int] = steady_us) -> None:
        self._local_us = local_us
        self._offset_us = 0
        self._last_us = 0

    def now_us(self) -> int:
        """The database's time now; never before what it was said to be."""
        now_us = self._local_us() + self._offset_us
        if now_us < self._last_us:
            return self._last_us
        self._last_us = now_us
        return now_us

    def measured(self, sent_us: int, database_us: int, received_us: int) -> None:
        """The database said `database_us` between the local times `sent_us` and `received_us`."""
        self._offset_us = database_us - (sent_us + received_us) // 2

    def local_us(self) -> int:
        """This machine's time now."""
        return self._local_us()
