from __future__ import annotations

from collections import deque
from typing import Any

import pytest

from outrider._frames import Frame
from outrider._queue import FrameQueue, Settings
from outrider.errors import PublisherClosed, SessionSuperseded
from outrider.v1.event_pb2 import Event
from outrider.v1.ingest_service_pb2 import PublishStreamRequest

EVENT = Event(type="a.b").SerializeToString()


async def _no_sleep(_: float) -> None:
    return None


def queue(**options: Any) -> FrameQueue:
    chosen: dict[str, Any] = {
        "tenant": "demo",
        "metadata": (),
        "linger_seconds": 3600.0,
        "frame_events": 3,
        "frame_bytes": 4096,
        "memory_bytes_max": 1 << 20,
        "backoff_seconds": 0.1,
        "backoff_seconds_max": 1.0,
        "random": lambda: 0.5,
        "clock": lambda: 1.0,
        "wall_clock_ns": lambda: 9_000_000,
        "sleep": _no_sleep,
    }
    return FrameQueue(
        Settings(**(chosen | options)),
        "p",
        7,
        spool=None,
        sealed=lambda: None,
        failed=lambda _: None,
    )


def numbers(one: FrameQueue) -> list[tuple[int, int, int]]:
    return [(frame.session, frame.number, frame.events) for frame in one.frames]


async def test_events_are_gathered_and_frames_numbered_without_gaps() -> None:
    one = queue()
    handles = [one.put(EVENT, "demo", 1) for _ in range(7)]
    assert numbers(one) == [(7, 1, 3), (7, 2, 3)]
    one.seal_open()
    one.seal_open()
    assert numbers(one) == [(7, 1, 3), (7, 2, 3), (7, 3, 1)]
    assert not handles[-1].done()


async def test_a_frame_leaves_at_the_latest_when_both_lingers_are_over() -> None:
    one = queue()
    one.put(EVENT, "demo", 1)
    one.unsent = lambda: 1
    one._linger_over(0.0)  # a backlog: once more
    assert one.open is not None
    one._linger_over(0.1)
    assert one.is_empty is False
    assert numbers(one) == [(7, 1, 1)]


async def test_frames_filled_elsewhere_are_numbered_behind_what_gathered_here() -> None:
    one = queue()
    one.put(EVENT, "demo", 1)
    one.adopt(deque())
    assert one.open is not None
    waited: deque[Frame] = deque()
    for events in (3, 2):
        frame = Frame("b", 0.0)
        for _ in range(events):
            frame.add(EVENT, "b")
        waited.append(frame)
    one.adopt(waited)
    one.put(EVENT, "demo", 1)
    one.seal_open()
    assert numbers(one) == [(7, 1, 1), (7, 2, 3), (7, 3, 2), (7, 4, 1)]
    messages = [PublishStreamRequest.FromString(one.message(frame)) for frame in one.frames]
    assert [message.frame.number for message in messages] == [1, 2, 3, 4]


async def test_frames_get_smaller_with_the_server_and_larger_again_to_what_was_asked_for() -> None:
    one = queue(frame_events=10)
    one.fit_frames(2, 1 << 20)
    for _ in range(4):
        one.put(EVENT, "demo", 1)
    one.fit_frames(500, 600)
    for _ in range(10):
        one.put(b"x" * 250, "demo", 1)
    one.fit_frames(500, 1 << 20)
    for _ in range(10):
        one.put(EVENT, "demo", 1)
    assert [frame.events for frame in one.frames] == [2, 2, 2, 2, 2, 2, 10]


async def test_after_the_end_nothing_is_taken_and_everything_has_its_error() -> None:
    one = queue()
    handles = [one.put(EVENT, "demo", 1) for _ in range(4)]
    assert len(one.abandon(PublisherClosed("closed"))) == 2
    assert all(isinstance(handle.exception(), PublisherClosed) for handle in handles)
    assert one.is_empty
    with pytest.raises(PublisherClosed):
        one.put(EVENT, "demo", 1)


async def test_a_session_the_server_does_not_fit_is_left_with_all_its_frames() -> None:
    one = queue()
    for _ in range(9):
        one.put(EVENT, "demo", 1)
    one.sent_number = 3
    one.frames.popleft()
    assert one.is_known(1, 7)
    assert one.is_known(3, 7)
    assert not one.is_known(0, 7)  # it lost what it acknowledged
    assert not one.is_known(4, 7)  # nobody sent that
    one.renew_session(0, 7)
    assert numbers(one) == [(9_000, 1, 3), (9_000, 2, 3)]
    one.sent_number = 1
    with pytest.raises(SessionSuperseded):
        one.renew_session(2, 9_000)
