"""Rate limits are exact: never more in any interval, and no less in the long run."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations_with_replacement

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from outrider_server.domain.endpoint import RateLimit
from outrider_server.policy.rate_limit import RateLimiter

START_US = 1_700_000_000_000_000
MINUTE_US = 60_000_000


@st.composite
def limits(draw: st.DrawFn) -> RateLimit:
    requests = draw(st.one_of(st.integers(1, 20), st.integers(1, 1_000_000)))
    period_us = draw(st.one_of(st.just(MINUTE_US), st.integers(1_000_000, 86_400_000_000)))
    return RateLimit(requests, period_us, draw(st.integers(1, min(requests, 10))))


PARTS = st.integers(1, 64)


def rate_of(limit: RateLimit, parts: int = 1) -> Fraction:
    """Requests a microsecond."""
    return Fraction(limit.requests, limit.period_us * parts)


def started(limiter: RateLimiter, asks_us: list[int]) -> list[int]:
    """When requests start if one wants to at each of these times."""
    times: list[int] = []
    for now_us in asks_us:
        if limiter.ready_in_us(now_us) == 0:
            limiter.take(now_us)
            times.append(now_us)
    return times


def greedy(limiter: RateLimiter, count: int, late_us: int = 0) -> list[int]:
    """When requests start if one comes back each time when told, so much too late."""
    now_us = START_US
    times: list[int] = []
    while len(times) < count:
        wait_us = limiter.ready_in_us(now_us)
        if wait_us:
            now_us += wait_us + late_us
        else:
            limiter.take(now_us)
            times.append(now_us)
    return times


@settings(deadline=None)
@given(limits(), PARTS, st.lists(st.floats(0, 12), min_size=1, max_size=40))
def test_no_interval_ever_holds_more_than_the_limit(
    limit: RateLimit, parts: int, steps: list[float]
) -> None:
    """The asks lie up to twelve steps apart, so that some bursts fill up and some do not."""
    rate = rate_of(limit, parts)
    asks_us = [START_US]
    for step in steps:
        asks_us.append(asks_us[-1] + int(step / rate))
    burst = max(1, limit.burst // parts)
    times = started(RateLimiter(limit, parts), [at for at in asks_us for _ in range(burst + 1)])
    period_us = limit.period_us * parts
    for first, last in combinations_with_replacement(range(len(times)), 2):
        beyond = last - first + 1 - burst
        assert beyond * period_us <= limit.requests * (times[last] - times[first])
    # And it began with nothing.
    for count, at in enumerate(times, start=1):
        assert count <= rate * (at - START_US)


@given(limits(), PARTS, st.integers(1, 40))
def test_whoever_comes_back_when_told_gets_the_rate(
    limit: RateLimit, parts: int, count: int
) -> None:
    times = greedy(RateLimiter(limit, parts), count)
    # Where no burst makes up for it, a microsecond's rounding a request is all that is lost.
    assert times[-1] - START_US < count / rate_of(limit, parts) + count


@given(limits(), st.integers(2, 40), st.floats(0, 1))
def test_a_burst_makes_up_for_coming_back_late(
    limit: RateLimit, count: int, lateness: float
) -> None:
    assume(limit.burst >= 2)
    rate = rate_of(limit)
    # One is told the time rounded up to a microsecond: that is part of the lateness.
    late_us = max(0, int(lateness * (limit.burst - 1) / rate) - 1)
    times = greedy(RateLimiter(limit), count, late_us)
    assert times[-1] - START_US < count / rate + late_us + 1


@given(limits(), st.integers(0, 3))
def test_after_a_pause_as_many_start_at_once_as_the_burst_says(
    limit: RateLimit, longer: int
) -> None:
    limiter = RateLimiter(limit)
    limiter.ready_in_us(START_US)
    rested_us = START_US + longer * MINUTE_US + int(limit.burst / rate_of(limit)) + 1
    assert started(limiter, [rested_us] * (limit.burst + 3)) == [rested_us] * limit.burst


def test_a_limiter_begins_with_its_burst_used_up() -> None:
    limiter = RateLimiter(RateLimit(100, MINUTE_US, burst=10))
    assert limiter.ready_in_us(START_US) == 600_000
    assert limiter.ready_in_us(START_US + 599_999) == 1
    assert started(limiter, [START_US + 600_000] * 3) == [START_US + 600_000]


def test_a_restart_lets_no_more_through_than_the_limit() -> None:
    limit = RateLimit(100, MINUTE_US, burst=10)
    first = started(RateLimiter(limit), list(range(START_US, START_US + MINUTE_US, 10_000)))
    again_us = first[-1] + 1
    second = started(RateLimiter(limit), list(range(again_us, again_us + MINUTE_US, 10_000)))
    times = first + second
    for start, end in combinations_with_replacement(range(0, len(times), 3), 2):
        assert end - start + 1 <= 10 + Fraction(100, MINUTE_US) * (times[end] - times[start])


def test_a_step_that_is_no_whole_number_of_microseconds_is_not_rounded() -> None:
    limit = RateLimit(999_999, 1_000_000, burst=1000)
    limiter = RateLimiter(limit)
    limiter.ready_in_us(START_US)
    asks = [at for at in range(START_US, START_US + 1_000_000, 500) for _ in range(1000)]
    assert len(started(limiter, asks)) == int(rate_of(limit) * 999_500)


def test_parts_of_a_limit_add_up_to_it() -> None:
    limit = RateLimit(100, MINUTE_US, burst=8)
    asks = [at for at in range(START_US, START_US + 6 * MINUTE_US + 1, 100_000) for _ in range(3)]
    whole = len(started(RateLimiter(limit), asks))
    assert whole == 600
    for parts in (2, 3, 7):
        each = len(started(RateLimiter(limit, parts), asks))
        assert parts * each <= whole < parts * (each + 1)


def test_a_part_too_small_for_a_burst_lets_one_start() -> None:
    limiter = RateLimiter(RateLimit(6, MINUTE_US, burst=2), 64)
    assert greedy(limiter, 2) == [START_US + 640_000_000, START_US + 1_280_000_000]


def test_a_clock_that_goes_back_lets_nothing_more_through_and_does_not_stop_it() -> None:
    limiter = RateLimiter(RateLimit(60, MINUTE_US, burst=3))
    limiter.ready_in_us(START_US)
    assert len(started(limiter, [START_US + MINUTE_US] * 5)) == 3
    back_us = START_US - 1_000 * MINUTE_US
    assert limiter.ready_in_us(back_us) == 1_000_000
    assert started(limiter, [back_us + 1_000_000] * 5) == [back_us + 1_000_000]


def test_a_request_before_its_time_is_a_mistake() -> None:
    limiter = RateLimiter(RateLimit(60))
    with pytest.raises(AssertionError, match="before its time"):
        limiter.take(START_US)
    limiter.take(START_US + 1_000_000)
    with pytest.raises(AssertionError, match="before its time"):
        limiter.take(START_US + 1_999_999)
