"""How many requests of one endpoint may start in a time: a rate limit that is exact (the generic cell rate algorithm).

The rule it keeps: in any t microseconds at most `burst + requests * t / period` requests start, and whoever asks again as
soon as it was told to reaches `requests` a period in the long run.

How: each request moves the theoretical arrival time, when the next one would be due at an even pace, on by
`period / requests`. A request may start as long as that time lies at most `burst - 1` such steps ahead of now. One number
is the whole state; nothing is refilled and nothing ticks.

A limiter begins with its burst used up: what its endpoint was sent before (by an earlier start of this node, by the node
that held it before, under the limit it had until now) is not known here, and must not add up with what comes to more than
the limit. So the first request waits one step, and pauses earn the burst from there.
"""

from __future__ import annotations

from math import gcd

from outrider_server.domain.endpoint import RateLimit


class RateLimiter:
    """The limit of one endpoint, or one of the equal `parts` into which a split tenant's is divided.

    A part has its share of the rate, exactly, and of the burst, rounded down but at least 1, or nothing could ever start:
    all parts together let as many start at once as the burst says, or one each where that is more.

    Times are microseconds of any clock that is not set while the limiter lives. If it goes back all the same, the limiter
    lets no more through for that, and waits no longer than one step.

    Counted in whole parts of a microsecond (`_per_us` of them each), so that no step is rounded: at 600,000 requests a
    second that would cost a sixth of the rate.
    """

    __slots__ = ("_arrival", "_burst", "_per_us", "_step")

    def __init__(self, limit: RateLimit, parts: int = 1) -> None:
        divisor = gcd(limit.requests, limit.period_us * parts)
        self._per_us = limit.requests // divisor
        self._step = limit.period_us * parts // divisor
        self._burst = max(1, limit.burst // parts) * self._step
        self._arrival: int | None = None

    def ready_in_us(self, now_us: int) -> int:
        """Microseconds until a request may start; 0 for now. The first time it is asked is when it begins."""
        early = self._ahead(now_us) + self._step - self._burst
        return -(-early // self._per_us) if early > 0 else 0

    def take(self, now_us: int) -> None:
        """A request starts now. Only when `ready_in_us` says so."""
        ahead = self._ahead(now_us)
        assert ahead + self._step <= self._burst, "a request starts before its time"
        self._arrival = now_us * self._per_us + ahead + self._step

    def _ahead(self, now_us: int) -> int:
        """How far the theoretical arrival time lies ahead of now."""
        now = now_us * self._per_us
        latest = now + self._burst
        if self._arrival is None or self._arrival > latest:
            self._arrival = latest
        return max(0, self._arrival - now)
