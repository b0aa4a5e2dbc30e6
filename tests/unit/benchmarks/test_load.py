from __future__ import annotations

from typing import Any, cast

from benchmarks.load import Load, Producer

from outrider import FrameReport


class Clock:
    """What a producer needs of its load."""

    def __init__(self) -> None:
        self.acks: list[tuple[list[int], int]] = []

    def now_us(self) -> int:
        return 100

    def acknowledged(self, times: list[int], now_us: int, report: FrameReport) -> None:
        self.acks.append((times, now_us))


def producer(load: Any) -> Producer:
    return Producer(cast(Load, load), 0, "127.0.0.1:1", "key", "bench", 2.0, follow_homes=True)


def report(line: int, **tenants: int) -> FrameReport:
    return FrameReport(1, sum(tenants.values()), 10, 0.0, 0.0, 0.0, 0, False, line, tenants)


def test_acknowledgements_of_several_lines_find_the_times_of_their_own_tenants() -> None:
    load = Clock()
    one = producer(load)
    for time_us, tenant in enumerate("ababab"):
        one.times[tenant].append(time_us)
        one.sent += 1
    one._acked(report(1, b=2))
    one._acked(report(0, a=1))
    one._acked(report(0, a=2, b=1))
    assert load.acks == [([1, 3], 100), ([0], 100), ([2, 4, 5], 100)]
    assert one.acked_in_order("ababab") == 6


def test_what_is_acknowledged_behind_a_gap_does_not_count_as_acknowledged_in_order() -> None:
    one = producer(Clock())
    for time_us, tenant in enumerate("ababab"):
        one.times[tenant].append(time_us)
        one.sent += 1
    one._acked(report(1, b=3))
    assert one.acked_in_order("ababab") == 0
    one._acked(report(0, a=2))
    assert one.acked_in_order("ababab") == 4
