"""Durations of many events: counted cheaply while they come, kept in an HDR histogram.

Rule: nothing is thrown away or sampled; what lies above the largest value is counted as that value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hdrh.histogram import HdrHistogram

UNIT_US = 10
"""Counted in steps of 10 microseconds: far below what is told, and it keeps the distinct values few."""

MAX_US = 600_000_000
DIGITS = 3
DISTINCT_MAX = 20_000
PERCENTILES = (50.0, 90.0, 99.0, 99.9)


@dataclass(frozen=True, slots=True)
class Percentiles:
    """In milliseconds; `count` durations in all."""

    count: int
    p50: float
    p90: float
    p99: float
    p999: float
    max: float


class Latencies:
    """Durations in microseconds."""

    def __init__(self) -> None:
        self._histogram: Any = HdrHistogram(1, MAX_US, DIGITS)  # type: ignore[no-untyped-call]
        self._recent: Counter[int] = Counter()

    def add(self, durations_us: Iterable[int]) -> None:
        """Count them: one call for many costs a fraction of a microsecond each."""
        self._recent.update([duration // UNIT_US for duration in durations_us])
        if len(self._recent) > DISTINCT_MAX:
            self._flush()

    def encode(self) -> str:
        """All of it as text, for another process."""
        self._flush()
        return str(self._histogram.encode().decode("ascii"))

    def merge(self, encoded: str) -> None:
        """Add what another one's `encode` gave."""
        self._histogram.decode_and_add(encoded)

    def percentiles(self) -> Percentiles:
        """The usual ones."""
        self._flush()
        histogram = self._histogram
        if not histogram.get_total_count():
            return Percentiles(0, 0.0, 0.0, 0.0, 0.0, 0.0)
        told: Mapping[float, int] = histogram.get_percentile_to_value_dict(list(PERCENTILES))
        p50, p90, p99, p999 = (told[percentile] / 1000 for percentile in PERCENTILES)
        maximum = histogram.get_max_value() / 1000
        return Percentiles(int(histogram.get_total_count()), p50, p90, p99, p999, maximum)

    def _flush(self) -> None:
        for steps, count in self._recent.items():
            # Clocks of one machine, but an event of an open loop may be sent a moment before it is meant to be.
            value = min(max(steps * UNIT_US, 1), MAX_US)
            self._histogram.record_value(value, count)
        self._recent.clear()
