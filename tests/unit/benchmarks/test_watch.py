"""Memory by quarters, and processes read by the part they play."""

from __future__ import annotations

import os

import psutil
import pytest
from benchmarks.watch import Watch, quarters


def test_drift_compares_the_last_quarter_with_the_second() -> None:
    samples = [(at / 10, 100 + (50 if at >= 75 else 0)) for at in range(100)]
    found = quarters(samples, 0.0, 10.0)
    assert list(found.means) == [100, 100, 100, 150]
    assert found.drift == pytest.approx(0.5)


def test_samples_outside_the_measured_time_do_not_count() -> None:
    samples = [(-1.0, 9_999), (0.5, 10), (1.5, 10), (2.5, 10), (3.5, 10), (4.0, 9_999)]
    assert list(quarters(samples, 0.0, 4.0).means) == [10, 10, 10, 10]


def test_a_quarter_without_a_sample_gives_no_drift() -> None:
    assert quarters([(0.5, 10), (3.5, 20)], 0.0, 4.0).drift == 0.0


def test_a_process_is_read_and_one_that_is_gone_counts_nothing() -> None:
    gone = max(psutil.pids()) + 100_000
    watch = Watch({"this": [os.getpid()], "gone": [gone]}, None, (0,))
    usages = watch.read()
    assert usages["this"].rss_bytes > 1_000_000
    assert usages["this"].cpu_seconds > 0
    assert (usages["gone"].cpu_seconds, usages["gone"].rss_bytes) == (0.0, 0)


def test_postgres_is_taken_out_of_the_part_it_runs_below() -> None:
    watch = Watch({"server": [os.getpid()]}, os.getpid(), (0,))
    usages = watch.read()
    assert usages["server"].rss_bytes == 0
    assert usages["postgres"].rss_bytes > 1_000_000


def test_the_busy_time_of_the_cpus_holds_this_process() -> None:
    busy = Watch({}, None, (0,)).busy()
    assert busy.all_seconds > 0
    assert busy.own_seconds > 0
