"""Percentiles come out as they went in, over processes too, and nothing is dropped."""

from __future__ import annotations

import pytest
from benchmarks.latency import DISTINCT_MAX, MAX_US, UNIT_US, Latencies, Percentiles


def test_percentiles_of_known_durations() -> None:
    latencies = Latencies()
    latencies.add(range(1_000, 1_001_000, 1_000))
    found = latencies.percentiles()
    assert found.count == 1_000
    assert found.p50 == pytest.approx(500, rel=0.002)
    assert found.p90 == pytest.approx(900, rel=0.002)
    assert found.p99 == pytest.approx(990, rel=0.002)
    assert found.p999 == pytest.approx(999, rel=0.002)
    assert found.max == pytest.approx(1_000, rel=0.002)


def test_no_durations_are_zeroes() -> None:
    assert Latencies().percentiles() == Percentiles(0, 0.0, 0.0, 0.0, 0.0, 0.0)


def test_more_distinct_values_than_are_held_are_all_counted() -> None:
    latencies = Latencies()
    count = DISTINCT_MAX * 3
    for begin in range(0, count, 1_000):
        latencies.add(range(begin * UNIT_US, (begin + 1_000) * UNIT_US, UNIT_US))
    assert latencies.percentiles().count == count


def test_values_beyond_the_bounds_are_counted_at_them() -> None:
    latencies = Latencies()
    latencies.add([-5, 0, MAX_US * 4])
    found = latencies.percentiles()
    assert found.count == 3
    assert found.max == pytest.approx(MAX_US / 1_000, rel=0.002)


def test_what_other_processes_counted_adds_up() -> None:
    parts = [Latencies(), Latencies()]
    parts[0].add([1_000] * 90)
    parts[1].add([50_000] * 10)
    whole = Latencies()
    for part in parts:
        whole.merge(part.encode())
    found = whole.percentiles()
    assert found.count == 100
    assert found.p50 == pytest.approx(1, rel=0.01)
    assert found.p99 == pytest.approx(50, rel=0.01)


def test_an_empty_part_changes_nothing() -> None:
    whole = Latencies()
    whole.add([7_000])
    whole.merge(Latencies().encode())
    assert whole.percentiles().count == 1
