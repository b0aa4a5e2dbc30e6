from __future__ import annotations

import asyncio

import pytest

from outrider._frames import Ack, Frame, varint
from outrider.errors import EventRejected, PublisherClosed
from outrider.v1.error_reason_pb2 import ErrorReason
from outrider.v1.event_pb2 import Event
from outrider.v1.ingest_service_pb2 import (
    EventError,
    EventResult,
    FrameAck,
    IdRange,
    PublishStreamRequest,
)
from outrider.v1.ingest_service_pb2 import Frame as FrameMessage


def frame_of(events: list[Event], tenant: str = "demo") -> Frame:
    frame = Frame(events[0].tenant or tenant, 0.0)
    for event in events:
        frame.add(event.SerializeToString(), event.tenant or tenant)
    frame.seal(5, 3, tenant)
    return frame


@pytest.mark.parametrize("sizes", [[1], [0, 127, 128, 129], [16_383, 16_384, 300_000], [5] * 500])
def test_a_frames_message_is_what_protobuf_would_encode(sizes: list[int]) -> None:
    events = [Event(type="a.b", data=b"x" * size) for size in sizes]
    frame = frame_of(events)
    want = PublishStreamRequest(frame=FrameMessage(number=3, tenant="demo", events=events))
    assert frame.message == want.SerializeToString()
    assert frame.size == want.frame.ByteSize()


@pytest.mark.parametrize("value", [0, 1, 127, 128, 16_383, 16_384, 2**21 - 1, 2**21, 2**32])
def test_a_varint_is_as_protobuf_writes_it(value: int) -> None:
    # Field 1 as a varint: the tag, then the value.
    message = FrameMessage(number=value).SerializeToString() or b"\x08\x00"
    assert varint(value) == message[1:]


def test_a_renumbered_frame_changes_only_its_number() -> None:
    frame = frame_of([Event(type="a.b", data=b"1"), Event(tenant="t", data=b"2")])
    assert frame.message is not None
    before = PublishStreamRequest.FromString(frame.message)
    frame.renumber(9, 300, frame.message)
    after = PublishStreamRequest.FromString(frame.message)
    assert (frame.session, frame.number, frame.size) == (9, 300, after.frame.ByteSize())
    assert after.frame.number == 300
    after.frame.number = before.frame.number
    assert after == before


def test_events_take_the_ids_of_the_range_in_order() -> None:
    frame = frame_of([Event(data=b"1")] * 3)
    frame.settle(FrameAck(number=3, ids=[IdRange(tenant="demo", first=1000, count=3, step=64)]))
    assert [frame.outcome(i) for i in range(3)] == [
        Ack(1000, duplicate=False),
        Ack(1064, duplicate=False),
        Ack(1128, duplicate=False),
    ]


def test_mixed_tenants_and_special_results_are_told_apart() -> None:
    frame = frame_of(
        [
            Event(tenant="b", data=b"1"),
            Event(data=b"2"),
            Event(tenant="b", data=b"3"),
            Event(tenant="b", data=b"4"),
            Event(tenant="demo", data=b"5"),
            Event(data=b"6"),
        ]
    )
    error = EventError(reason=ErrorReason.ERROR_REASON_PAYLOAD_NOT_JSON, message="no")
    frame.settle(
        FrameAck(
            number=3,
            ids=[
                IdRange(tenant="b", first=10, count=2, step=1),
                IdRange(tenant="demo", first=500, count=2, step=64),
            ],
            results=[
                EventResult(index=2, error=error),
                EventResult(index=4, id=77, duplicate=True),
            ],
        )
    )
    outcomes = [frame.outcome(i) for i in range(6)]
    rejected = outcomes.pop(2)
    assert isinstance(rejected, EventRejected)
    assert (rejected.reason, rejected.message) == ("PAYLOAD_NOT_JSON", "no")
    assert outcomes == [
        Ack(10, duplicate=False),
        Ack(500, duplicate=False),
        Ack(11, duplicate=False),
        Ack(77, duplicate=True),
        Ack(564, duplicate=False),
    ]


def test_a_frame_of_long_ago_is_acknowledged_without_ids() -> None:
    frame = frame_of([Event(data=b"1"), Event(tenant="b", data=b"1")])
    frame.settle(FrameAck(number=3, duplicate=True))
    assert [frame.outcome(i) for i in (0, 1)] == [Ack(None, duplicate=True)] * 2


def test_an_error_of_the_frame_is_the_error_of_each_event() -> None:
    frame = frame_of([Event(data=b"1")])
    with pytest.raises(asyncio.InvalidStateError):
        frame.outcome(0)
    frame.settle(None, PublisherClosed("over"))
    assert isinstance(frame.outcome(0), PublisherClosed)
    assert frame.message is None


@pytest.mark.parametrize("sealed", [False, True])
def test_a_frame_knows_whose_events_it_holds_and_how_many(sealed: bool) -> None:
    frame = Frame("a", 0.0)
    for tenant in "aab":
        frame.add(b"x", tenant)
    if sealed:
        frame.seal(5, 3, "a")
    assert [frame.holds(tenant) for tenant in "abc"] == [True, True, False]
    assert frame.tenant_events() == {"a": 2, "b": 1}
    alone = Frame("a", 0.0)
    alone.add(b"x", "c")
    assert [alone.holds(tenant) for tenant in "ac"] == [False, True]
    assert alone.tenant_events() == {"c": 1}
