"""Lanes: bounded, in order, deciding only."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import pytest

from outrider_server.domain.delivery import Delivery, DeliveryState, OwedRow
from outrider_server.domain.endpoint import BatchPolicy, DeliveryMode, Endpoint, RateLimit
from outrider_server.domain.event import Event
from outrider_server.domain.sequence import sequence_of
from outrider_server.policy.lane import Lane

SINGLE = Endpoint(1, 1, "single", "http://one", ())
BATCH = Endpoint(
    2, 1, "batch", "http://two", (), mode=DeliveryMode.BATCH, batch=BatchPolicy(3, 100, 20.0)
)


def delivery_at(us: int, size: int = 10) -> Delivery:
    return Delivery(
        Event(1, "order.created", b"x" * size, 0, sequence=sequence_of(us, 3), size=size), 7
    )


def lane_of(
    endpoint: Endpoint, *sizes: int, deliveries_max: int = 10, bytes_max: int = 1000
) -> Lane:
    lane = Lane(endpoint, deliveries_max, bytes_max)
    for us, size in zip(count(1000), sizes, strict=False):
        lane.push(delivery_at(us, size))
    return lane


def row_of(*us: int, retry: bool = False) -> OwedRow:
    sequences = [sequence_of(each, 3) for each in us]
    row = OwedRow(3, us[0], 1, 7, sequences, 0)
    row.waiting = sorted(sequences, reverse=True)
    row.retry = retry
    return row


def test_a_lane_is_bounded_by_count_and_by_bytes() -> None:
    assert lane_of(SINGLE, 10, 10, deliveries_max=3).has_room()
    assert not lane_of(SINGLE, 10, 10, deliveries_max=2).has_room()
    assert not lane_of(SINGLE, 10, 10, bytes_max=20).has_room()
    assert lane_of(SINGLE, 10, 10, deliveries_max=3, bytes_max=50).room() == (1, 30)


def test_a_single_mode_request_carries_one_delivery() -> None:
    lane = lane_of(SINGLE, 10, 10)
    first = lane.queue[0]
    assert lane.take() == [first]
    assert first.state is DeliveryState.IN_FLIGHT
    assert lane.in_flight == 1
    assert lane.queue_bytes == 10


def test_a_batch_ends_where_its_policy_says() -> None:
    assert [len(lane_of(BATCH, *[10] * 5).take()) for _ in range(1)] == [3]
    lane = lane_of(BATCH, 60, 40, 1)
    assert [d.event.size for d in lane.take()] == [60, 40]
    assert [d.event.size for d in lane.take()] == [1]


def test_an_event_above_the_batchs_bytes_travels_alone() -> None:
    lane = lane_of(BATCH, 500, 1)
    assert [d.event.size for d in lane.take()] == [500]


def test_nothing_is_taken_from_an_empty_lane() -> None:
    lane = lane_of(SINGLE)
    assert lane.take() == []
    assert lane.in_flight == 0


def test_single_deliveries_are_sent_at_once() -> None:
    assert lane_of(SINGLE, 10).ready_in_us(0) == 0


def test_a_batch_waits_for_company_as_long_as_its_oldest_event_may() -> None:
    lane = lane_of(BATCH, 10)
    assert lane.ready_in_us(1000) == 20_000
    assert lane.ready_in_us(11_000) == 10_000
    assert lane.ready_in_us(50_000) == 0


@pytest.mark.parametrize("sizes", [(10, 10, 10), (99, 1)])
def test_a_full_batch_does_not_wait(sizes: tuple[int, ...]) -> None:
    assert lane_of(BATCH, *sizes).ready_in_us(1000) == 0


def test_an_empty_or_paused_lane_is_never_ready() -> None:
    assert lane_of(SINGLE).ready_in_us(0) is None
    lane = lane_of(SINGLE, 10)
    lane.paused = True
    assert lane.ready_in_us(0) is None


def test_a_lane_with_only_spilled_deliveries_is_ready_when_they_are_next() -> None:
    lane = lane_of(BATCH)
    lane.spill.append(delivery_at(1))
    assert lane.ready_in_us(1) == 0
    lane.backlog = 1
    assert lane.ready_in_us(1) is None


@pytest.mark.parametrize("what", ["backlog", "loading", "owing", "owing_now"])
def test_a_lane_drains_while_anything_older_is_outside_its_queue(what: str) -> None:
    lane = lane_of(SINGLE)
    lane.spill.append(delivery_at(1))
    assert lane.drains()
    assert lane.may_reclaim()
    lane.spill.clear()
    assert not lane.drains()
    setattr(lane, what, 1)
    assert lane.drains()
    lane.spill.append(delivery_at(1))
    assert not lane.may_reclaim()


def test_waiting_rows_make_a_lane_drain() -> None:
    lane = lane_of(SINGLE)
    lane.waiting_rows.append(row_of(1))
    assert lane.drains()
    lane.spill.append(delivery_at(2))
    assert not lane.may_reclaim()


def test_a_claimed_row_waits_for_the_unread_rows_before_it() -> None:
    lane = lane_of(SINGLE)
    row = row_of(10)
    near, far = sequence_of(10, 3), sequence_of(11, 3)
    assert lane.may_load(row, far), "nothing is unread"
    lane.backlog = 1
    assert lane.may_load(row, far), "what is unread comes after all that was read"
    lane.horizon = near
    assert lane.may_load(row, near)
    assert not lane.may_load(row, far)


@pytest.mark.parametrize("what", ["owing", "owing_now"])
def test_a_claimed_row_waits_for_rows_that_are_about_to_be_written(what: str) -> None:
    lane = lane_of(SINGLE)
    lane.waiting_rows.append(row_of(10))
    setattr(lane, what, True)
    assert not lane.may_load(lane.waiting_rows[0], sequence_of(10, 3))
    assert not lane.wants_catch_up(0)
    lane.backlog = 1
    assert not lane.wants_backlog()


def test_retries_mix_in_whatever_waits() -> None:
    lane = lane_of(SINGLE)
    lane.backlog, lane.horizon, lane.owing = 1, 0, True
    assert lane.may_load(row_of(10, retry=True), sequence_of(10, 3))


def test_a_lane_catches_up_when_half_of_it_is_free() -> None:
    lane = lane_of(SINGLE, 1, 1, 1, deliveries_max=4)
    lane.backlog = 1
    assert not lane.wants_catch_up(0)
    lane.take()
    assert lane.wants_catch_up(0)


@pytest.mark.parametrize("what", ["paused", "catching_up"])
def test_a_lane_does_not_catch_up_while_paused_or_twice_at_once(what: str) -> None:
    lane = lane_of(SINGLE)
    lane.backlog = 1
    setattr(lane, what, True)
    assert not lane.wants_catch_up(0)


def test_rows_that_nobody_can_find_yet_are_not_looked_for() -> None:
    lane = lane_of(SINGLE)
    lane.backlog = lane.unrecorded = 2
    assert not lane.wants_catch_up(0)
    lane.backlog = 3
    assert lane.wants_catch_up(0)


def test_rows_behind_the_horizon_do_not_make_a_lane_spin() -> None:
    lane = lane_of(SINGLE)
    lane.waiting_rows.append(row_of(10))
    lane.backlog = lane.unrecorded = 1
    lane.horizon = 0
    assert not lane.wants_catch_up(0)


def test_retries_are_wanted_when_due() -> None:
    lane = lane_of(SINGLE)
    lane.retry_us = 50
    assert not lane.wants_catch_up(49)
    assert lane.wants_catch_up(50)


def test_an_endpoint_without_a_rate_limit_has_no_limiter() -> None:
    lane = lane_of(SINGLE)
    assert lane.limiter is None
    assert not lane.configure(SINGLE)
    assert lane.limiter is None


def test_the_limiter_stays_as_long_as_the_limit_does() -> None:
    limited = replace(SINGLE, rate_limit=RateLimit(60))
    lane = lane_of(limited)
    assert lane.limiter is not None
    assert lane.limiter.ready_in_us(0) == 1_000_000
    assert lane.configure(replace(limited, rate_limit=RateLimit(60), url="http://new"))
    assert lane.endpoint.url == "http://new"
    assert lane.limiter.ready_in_us(400_000) == 600_000
    lane.limiter.take(1_000_000)
    assert lane.limiter.ready_in_us(1_000_000) == 1_000_000


def test_another_limit_begins_with_its_burst_used_up() -> None:
    lane = lane_of(replace(SINGLE, rate_limit=RateLimit(60, burst=5)))
    assert lane.limiter is not None
    lane.limiter.ready_in_us(0)
    assert lane.limiter.ready_in_us(10_000_000) == 0
    assert lane.configure(replace(SINGLE, rate_limit=RateLimit(120, burst=5)))
    assert lane.limiter.ready_in_us(10_000_000) == 500_000
    assert lane.configure(SINGLE)
    assert lane.limiter is None


def test_lanes_that_divide_an_endpoint_have_a_part_of_its_limits() -> None:
    endpoint = replace(SINGLE, concurrency=7, rate_limit=RateLimit(60, burst=4))
    lane = lane_of(endpoint)
    assert lane.concurrency == 7
    assert lane.configure(endpoint, 2)
    assert not lane.configure(endpoint, 2)
    assert lane.concurrency == 3
    assert lane.limiter is not None
    assert lane.limiter.ready_in_us(0) == 2_000_000
    assert lane.configure(endpoint, 16)
    assert lane.concurrency == 1
    assert lane.configure(replace(endpoint, concurrency=48), 16)
    assert lane.concurrency == 3
