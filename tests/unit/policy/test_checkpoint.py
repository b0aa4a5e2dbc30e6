"""The window of a shard and its checkpoint."""

from __future__ import annotations

import pytest

from outrider_server.domain.event import Event
from outrider_server.domain.sequence import sequence_of
from outrider_server.policy.checkpoint import Window

SHARD = 5


def window_of(*events: Event) -> Window:
    window = Window(SHARD, epoch=1, checkpoint=sequence_of(9, SHARD), record_no=0, last=0)
    for event in events:
        window.append(event)
    return window


def event_at(us: int, *, open_count: int = 0, committed: bool = True, tenant: int = 1) -> Event:
    return Event(
        tenant,
        "order.created",
        b"{}",
        0,
        sequence=sequence_of(us, SHARD),
        targets=(1, 2),
        open=open_count,
        deliveries=() if committed else None,
    )


def test_the_checkpoint_is_just_below_the_lowest_open_event() -> None:
    window = window_of(event_at(10), event_at(11), event_at(12, open_count=1), event_at(13))
    matched: dict[int, int] = {}
    assert window.pass_closed(matched)
    assert window.checkpoint == sequence_of(11, SHARD)
    assert matched == {1: 4}
    assert len(window) == 2


def test_the_checkpoint_stays_while_the_first_event_is_open() -> None:
    window = window_of(event_at(10, open_count=1, committed=False), event_at(11))
    matched: dict[int, int] = {}
    assert not window.pass_closed(matched)
    assert window.checkpoint == sequence_of(9, SHARD)
    assert matched == {}


def test_matched_is_counted_per_tenant() -> None:
    window = window_of(event_at(10), event_at(11, tenant=2), event_at(12))
    matched: dict[int, int] = {}
    window.pass_closed(matched)
    assert matched == {1: 4, 2: 2}


def test_a_passed_event_lets_its_deliveries_go() -> None:
    event = event_at(10)
    event.deliveries = ["a delivery that refers to its event"]
    window_of(event).pass_closed({})
    assert event.deliveries is None


def test_the_old_end_holds_what_is_older_than_the_window() -> None:
    events = [event_at(us) for us in (10, 20, 30)]
    window = window_of(*events)
    assert list(window.old_end(20, 100)) == events[:1]
    assert list(window.old_end(31, 100)) == events
    assert list(window.old_end(0, 100)) == []


def test_the_old_end_holds_what_is_more_than_the_window_takes() -> None:
    events = [event_at(us) for us in (10, 20, 30)]
    assert list(window_of(*events).old_end(0, 1)) == events[:2]


def test_the_old_end_ends_at_an_event_that_is_not_committed() -> None:
    events = [event_at(10), event_at(20, open_count=3, committed=False), event_at(30)]
    assert list(window_of(*events).old_end(100, 0)) == events[:1]


def test_a_rolled_back_event_is_forgotten_wherever_it_stands() -> None:
    events = [event_at(us) for us in (10, 20, 30)]
    window = window_of(*events)
    window.discard(events[1])
    assert list(window.old_end(100, 0)) == [events[0], events[2]]


def test_an_event_that_is_not_in_the_window_cannot_be_rolled_back() -> None:
    with pytest.raises(IndexError):
        window_of(event_at(10)).discard(event_at(10))


def test_the_age_of_the_window_is_that_of_its_oldest_event() -> None:
    assert window_of().oldest_us() is None
    assert window_of(event_at(10), event_at(20)).oldest_us() == 10


@pytest.mark.parametrize(
    ("checkpoint", "last"), [(sequence_of(50, SHARD), 0), (0, sequence_of(50, SHARD))]
)
def test_no_sequence_is_given_out_twice_whatever_the_clock_says(checkpoint: int, last: int) -> None:
    window = Window(SHARD, epoch=1, checkpoint=checkpoint, record_no=0, last=last)
    assert window.clock.take(10, 1) == sequence_of(51, SHARD)
