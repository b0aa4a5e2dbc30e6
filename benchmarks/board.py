"""Counts that the processes of a run show each other: a mapped file of 64-bit numbers, one writer a number.

Rule: reading never waits for writing, and costs no message; an aligned 64-bit write is seen whole.
"""

from __future__ import annotations

import mmap
from enum import IntEnum
from pathlib import Path

SLOT_NUMBERS = 8
PROCESSES_MAX = 80


class Sent(IntEnum):
    """What a generator shows."""

    SENT = 0
    ACKED = 1
    REJECTED = 2
    FRAMES = 3
    REFUSED = 4
    RESENT = 5


class Received(IntEnum):
    """What a receiver shows."""

    REQUESTS = 0
    DELIVERIES = 1
    DUPLICATES = 2
    ASTRAY = 3
    BAD = 4
    LARGE = 5


class Board:
    """The mapped numbers. Each process writes the row that is its own."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        size = SLOT_NUMBERS * PROCESSES_MAX * 8
        if create:
            path.write_bytes(bytes(size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)
        self._numbers = memoryview(self._map).cast("q")

    def row(self, process: int) -> memoryview:
        """The numbers of one process."""
        return self._numbers[process * SLOT_NUMBERS : (process + 1) * SLOT_NUMBERS]

    def total(self, processes: range, number: IntEnum) -> int:
        """A number summed over processes."""
        return sum(self._numbers[process * SLOT_NUMBERS + number] for process in processes)
