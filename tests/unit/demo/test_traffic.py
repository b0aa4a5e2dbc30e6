"""Traffic keeps its rate, makes up for no outage, and stops while the disk's bound is passed."""

from __future__ import annotations

import asyncio
import contextlib
from typing import cast

import pytest

from outrider.errors import PublisherFailed
from outrider.publisher import Handle
from outrider.v1.event_pb2 import Event
from outrider_server.demo.traffic import DiskBound, Pace, Traffic, watch_disk


class Clock:
    """Time that passes only by sleeping; after `ticks` sleeps the sleeper is cancelled."""

    def __init__(self, ticks: int) -> None:
        self.now = 0.0
        self.ticks = ticks

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.ticks -= 1
        if self.ticks < 0:
            raise asyncio.CancelledError


class Sent:
    """Counts what is sent; fails at event number `fail_at`."""

    def __init__(self, fail_at: int = -1) -> None:
        self.count = 0
        self.fail_at = fail_at

    async def send(self, event: Event) -> Handle:
        if self.count == self.fail_at:
            raise PublisherFailed("the key was revoked")
        self.count += 1
        return cast(Handle, None)


async def run(sent: Sent, disk: DiskBound, *, rate: float, ticks: int) -> Traffic:
    clock = Clock(ticks)
    traffic = Traffic(
        send=sent.send,
        next_event=Event,
        rate=rate,
        disk=disk,
        monotonic=lambda: clock.now,
        sleep=clock.sleep,
    )
    with contextlib.suppress(asyncio.CancelledError):
        await traffic.run()
    return traffic


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 0), (0.5, 5), (200.0, 2000), (5000.0, 50000)])
async def test_it_publishes_at_its_rate(rate: float, expected: int) -> None:
    sent = Sent()
    await run(sent, DiskBound(100), rate=rate, ticks=500)  # 10 s
    assert sent.count == pytest.approx(expected, abs=1)


def test_what_an_outage_held_up_is_not_made_up_for_beyond_a_second() -> None:
    pace = Pace(200.0, now=0.0)
    assert pace.due(60.0) == 200
    assert pace.due(60.1) == 20


async def test_nothing_is_published_while_the_disk_is_at_its_bound() -> None:
    sent, disk = Sent(), DiskBound(100)
    disk.see(101)
    await run(sent, disk, rate=200, ticks=50)
    assert sent.count == 0


def test_the_disk_must_fall_well_below_its_bound_again() -> None:
    disk = DiskBound(100)
    disk.see(101)
    disk.see(95)
    assert disk.passed
    disk.see(89)
    assert not disk.passed


async def test_a_publisher_that_fails_for_good_ends_it_with_a_sentence() -> None:
    sent = Sent(fail_at=3)
    traffic = await run(sent, DiskBound(100), rate=200, ticks=50)
    assert sent.count == 3
    assert traffic.problem == "publishing has ended: the key was revoked"


async def test_the_disk_is_measured_again_and_again() -> None:
    sizes = iter((10, 200, 50))
    disk, clock = DiskBound(100), Clock(2)
    seen = []

    def measure() -> int:
        seen.append(disk.passed)
        return next(sizes)

    with pytest.raises(asyncio.CancelledError):
        await watch_disk(disk, measure, clock.sleep)
    assert seen == [False, False, True]
    assert disk.used == 50
    assert not disk.passed
