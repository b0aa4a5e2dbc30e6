"""The database's clock, as this node reads it: its own clock plus an offset measured at each lease renewal.

Sequences, due times and record times of every node come from this one clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class DatabaseClock:
    """Microseconds since 1970 UTC by the database's clock. `local_us` is this machine's clock, likewise."""

    def __init__(self, local_us: Callable[[], int] = lambda: time.time_ns() // 1000) -> None:
        self._local_us = local_us
        self._offset_us = 0

    def now_us(self) -> int:
        """The database's time now."""
        return self._local_us() + self._offset_us

    def measured(self, sent_us: int, database_us: int, received_us: int) -> None:
        """The database said `database_us` between the local times `sent_us` and `received_us`."""
        self._offset_us = database_us - (sent_us + received_us) // 2

    def local_us(self) -> int:
        """This machine's time now."""
        return self._local_us()
