"""The primitives that stages add to: bounded, exact, and cheap enough for the path of an event."""

from __future__ import annotations

import timeit
from bisect import bisect_left

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider_server.telemetry.counters import (
    DELIVERY_BOUNDS_SECONDS,
    LATENCY_BOUNDS_SECONDS,
    Histogram,
    Tally,
)


def test_tally_counts_by_label_values() -> None:
    tally = Tally(("method", "code"))
    tally.add("Publish", "OK")
    tally.add("Publish", "OK", count=4)
    tally.add("Publish", "ABORTED")
    assert tally.get("Publish", "OK") == 5
    assert tally.get("Publish", "UNKNOWN") == 0
    assert tally.total() == 6
    assert dict(tally.items()) == {("Publish", "OK"): 5, ("Publish", "ABORTED"): 1}


def test_tally_is_bounded_and_loses_no_count() -> None:
    tally = Tally(("reason",), keys_max=10)
    for number in range(1_000):
        tally.add(f"reason {number}")
    assert len(tally.items()) == 10
    assert tally.total() == 1_000
    assert tally.get("other") == 991
    assert tally.get("reason 8") == 1


def test_tally_clips_long_values_to_one_key() -> None:
    tally = Tally(("reason",))
    for _ in range(3):
        tally.add("x" * 10_000)
    assert tally.items() == [(("x" * 128,), 3)]


def test_tally_refuses_the_wrong_number_of_values() -> None:
    with pytest.raises(ValueError, match="method, code"):
        Tally(("method", "code")).add("Publish")


def test_bounds_are_in_order() -> None:
    for bounds in (LATENCY_BOUNDS_SECONDS, DELIVERY_BOUNDS_SECONDS):
        assert list(bounds) == sorted(set(bounds))


def test_bucket_includes_its_upper_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for seconds in (0.5, 1.0, 1.5, 2.0, 2.5):
        histogram.observe(seconds)
    assert histogram.counts == [2, 2, 1]
    assert histogram.count == 5
    assert histogram.sum == pytest.approx(7.5)


def test_negative_duration_counts_as_none_and_never_shrinks_the_sum() -> None:
    histogram = Histogram((1.0,))
    histogram.observe(-5.0)
    histogram.observe_many(-5.0, 3)
    assert histogram.counts == [4, 0]
    assert histogram.sum == 0.0


@given(st.lists(st.floats(0, 1e5), max_size=50), st.integers(1, 5))
def test_observing_many_is_observing_each(durations: list[float], count: int) -> None:
    one, many = Histogram(), Histogram()
    for seconds in durations:
        many.observe_many(seconds, count)
        for _ in range(count):
            one.observe(seconds)
    assert many.counts == one.counts
    assert many.sum == pytest.approx(one.sum)


@given(
    st.lists(st.floats(0, LATENCY_BOUNDS_SECONDS[-1]), min_size=1, max_size=200),
    st.sampled_from((0.01, 0.5, 0.9, 0.99, 1.0)),
)
def test_quantile_lies_in_the_bucket_of_the_exact_one(
    durations: list[float], fraction: float
) -> None:
    histogram = Histogram()
    for seconds in durations:
        histogram.observe(seconds)
    estimate = histogram.quantile(fraction)
    assert estimate is not None
    wanted = fraction * len(durations)
    exact = next(s for n, s in enumerate(sorted(durations), start=1) if n >= wanted - 1e-9)
    bounds = LATENCY_BOUNDS_SECONDS
    bucket = bisect_left(bounds, exact)
    lower = bounds[bucket - 1] if bucket else 0.0
    assert lower - 1e-9 <= estimate <= bounds[bucket] + 1e-9


def test_quantile_of_nothing_is_unknown_and_of_the_endless_bucket_its_start() -> None:
    histogram = Histogram((1.0, 2.0))
    assert histogram.quantile(0.5) is None
    histogram.observe(100.0)
    assert histogram.quantile(0.5) == 2.0


def test_adding_is_cheap_enough_for_the_hot_path() -> None:
    histogram, tally = Histogram(), Tally(("error",))
    rounds = 20_000
    # Both cost 0.1 us on an idle machine. The bound is loose for a busy one, and still below any locked instrument.
    for add in (lambda: histogram.observe(0.0123), lambda: tally.add("timeout")):
        assert min(timeit.repeat(add, number=rounds, repeat=7)) / rounds < 1e-6
