"""The database's clock, as this machine can know it."""

from __future__ import annotations

import time

import pytest

from outrider_server.pipeline.clock import DatabaseClock


def test_it_is_the_local_clock_until_measured_and_then_corrected_by_half_the_way() -> None:
    local = [1_000_000]
    clock = DatabaseClock(lambda: local[0])
    assert clock.now_us() == clock.local_us() == 1_000_000
    clock.measured(1_000_000, 5_000_300, 1_000_200)
    assert clock.now_us() == 5_000_200
    local[0] += 50
    assert clock.now_us() == 5_000_250
    clock.measured(1_000_000, 5_000_500, 1_000_000)
    assert clock.now_us() == 5_000_550


def test_it_never_goes_back_and_goes_on_when_it_is_reached_again() -> None:
    local = [1_000_000]
    clock = DatabaseClock(lambda: local[0])
    assert clock.now_us() == 1_000_000
    clock.measured(1_000_000, 999_900, 1_000_000)
    assert clock.now_us() == 1_000_000
    local[0] += 99
    assert clock.now_us() == 1_000_000
    local[0] += 2
    assert clock.now_us() == 1_000_001


def test_who_sets_the_machines_clock_does_not_set_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = DatabaseClock()
    before, wall_ns = clock.now_us(), time.time_ns
    assert abs(before - wall_ns() // 1000) < 60_000_000
    monkeypatch.setattr(time, "time_ns", lambda: wall_ns() + 3_600 * 10**9)
    assert 0 <= clock.now_us() - before < 60_000_000
