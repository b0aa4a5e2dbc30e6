"""Frames: events encoded once, numbered once, answered once.

An event is encoded when it is sent and its bytes never change again; a frame's message is those bytes joined behind a
header. So a frame that is sent again is the same, byte for byte, and encoding costs the same with 1 or 500 events. The
few bytes that bind them are written here by hand, as proto3 prescribes: a length-delimited field is its tag, its length
as a varint, its bytes.

A frame also holds what became of its events: one acknowledgement for all of them, from which each handle reads its own
id when it is asked. Nothing here waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from outrider.errors import EventRejected, OutriderError
from outrider.v1 import error_reason_pb2, ingest_service_pb2

_LOG = logging.getLogger("outrider.publisher")

FRAME_EVENTS_MAX = 500
FRAME_BYTES_MAX = 1024 * 1024
EVENT_BYTES_MAX = 10 * 1024 * 1024
"""Largest payload of one event."""

_EVENTS_TAG = b"\x1a"  # Frame.events = 3
_FRAME_TAG = b"\x12"  # PublishStreamRequest.frame = 2


def varint(value: int) -> bytes:
    """`value` as a base-128 varint."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


# The prefix of every event up to 16 KiB; larger ones are rare enough to be computed.
_PREFIXES = tuple(_EVENTS_TAG + varint(size) for size in range(16_384))


def event_prefix(size: int) -> bytes:
    """What stands before an encoded event of `size` bytes in a frame."""
    return _PREFIXES[size] if size < 16_384 else _EVENTS_TAG + varint(size)


class Ack(NamedTuple):
    """An event is durable under `event_id`.

    `duplicate`: it was stored before, by its idempotency key or because its frame came again. `event_id` is None only
    where the server no longer tells the ids of a frame that it stored more than a day ago.
    """

    event_id: int | None
    duplicate: bool


class Place(NamedTuple):
    """Where a spool keeps a frame: segment, offset and length of its message, and its checksum."""

    segment: int
    offset: int
    length: int
    checksum: int


class Frame:
    """Events under one number, from the first one put in to the answer.

    It is open (takes events), then sealed (has number, size and message), then settled (`ack` or `error` is set).
    `message` is dropped when it is settled, or while a spool holds it (`place`). `size` is the encoded frame's, `bytes`
    that of its events in it, `cost` what the publisher's window counts for it.
    """

    __slots__ = (
        "_tenant_set",
        "ack",
        "bytes",
        "cost",
        "error",
        "events",
        "message",
        "number",
        "on_settled",
        "opened_at",
        "outcomes",
        "parts",
        "place",
        "sent_at",
        "session",
        "settled",
        "size",
        "tenant",
        "tenants",
        "waiters",
    )

    def __init__(self, tenant: str, opened_at: float) -> None:
        self.tenant = tenant
        self.opened_at = opened_at
        self.session = 0
        self.number = 0
        self.events = 0
        self.bytes = 0
        self.cost = 0
        self.size = 0
        self.parts: list[bytes] = []
        self.tenants: list[str] | None = None
        self._tenant_set: frozenset[str] | None = None
        self.message: bytes | None = None
        self.place: Place | None = None
        self.sent_at = 0.0
        self.settled = False
        self.ack: ingest_service_pb2.FrameAck | None = None
        self.error: OutriderError | None = None
        self.outcomes: list[Ack | EventRejected] | None = None
        self.waiters: list[asyncio.Future[None]] | None = None
        self.on_settled: list[Callable[[], None]] | None = None

    def add(self, data: bytes, tenant: str) -> int:
        """Put an encoded event in; returns its place."""
        index = self.events
        prefix = event_prefix(len(data))
        self.parts.append(prefix)
        self.parts.append(data)
        self.bytes += len(prefix) + len(data)
        if self.tenants is not None:
            self.tenants.append(tenant)
        elif tenant != self.tenant:
            if index:
                self.tenants = [self.tenant] * index
                self.tenants.append(tenant)
            else:
                self.tenant = tenant
        self.events = index + 1
        return index

    def holds(self, tenant: str) -> bool:
        """Whether events of the tenant are in it."""
        if self.tenants is None:
            return tenant == self.tenant
        if not self.number:
            return tenant in self.tenants
        # Sealed: nothing is added any more, and a publisher that spreads many tenants asks for each of them.
        if self._tenant_set is None:
            self._tenant_set = frozenset(self.tenants)
        return tenant in self._tenant_set

    def tenant_events(self) -> dict[str, int]:
        """How many events of each tenant are in it."""
        return {self.tenant: self.events} if self.tenants is None else dict(Counter(self.tenants))

    def seal(self, session: int, number: int, default_tenant: str) -> None:
        """Give the frame its number and its final bytes."""
        self.session, self.number = session, number
        header = _header(number, default_tenant)
        self.size = len(header) + self.bytes
        self.message = b"".join((_FRAME_TAG, varint(self.size), header, *self.parts))
        self.parts = []

    def renumber(self, session: int, number: int, message: bytes) -> bytes:
        """Move the frame to another session; returns its new message. Only for one that is stored nowhere."""
        request = ingest_service_pb2.PublishStreamRequest.FromString(message)
        request.frame.number = number
        moved = request.SerializeToString()
        self.session, self.number, self.size = session, number, _frame_bytes(len(moved))
        if self.message is not None:
            self.message = moved
        return moved

    def settle(
        self, ack: ingest_service_pb2.FrameAck | None, error: OutriderError | None = None
    ) -> None:
        """Answer every event of the frame at once and wake those who wait."""
        self.ack, self.error, self.settled = ack, error, True
        self.message = None
        self.parts = []
        if self.waiters:
            for waiter in self.waiters:
                if not waiter.done():
                    waiter.set_result(None)
            self.waiters = None
        if self.on_settled:
            callbacks, self.on_settled = self.on_settled, None
            for callback in callbacks:
                try:
                    callback()
                except Exception:  # noqa: BLE001 - a fault of theirs is not one of the stream
                    _LOG.exception("a callback of an event failed")

    def outcome(self, index: int) -> Ack | OutriderError:
        """What became of the event at `index`: its acknowledgement or its error."""
        if self.error is not None:
            return self.error
        ack = self.ack
        if ack is None:
            raise asyncio.InvalidStateError("not acknowledged yet")
        if not ack.results and self.tenants is None and len(ack.ids) <= 1:
            if not ack.ids:
                return Ack(None, ack.duplicate)
            only = ack.ids[0]
            return Ack(only.first + only.step * index, ack.duplicate)
        if self.outcomes is None:
            self.outcomes = _outcomes(ack, self.tenants or [self.tenant] * self.events)
        return self.outcomes[index]


def resumed_frame(session: int, number: int, events: int, place: Place) -> Frame:
    """A frame that a spool kept from an earlier life: nobody holds a handle of it."""
    frame = Frame("", 0.0)
    frame.session, frame.number, frame.events, frame.place = session, number, events, place
    frame.size = frame.cost = _frame_bytes(place.length)
    return frame


def _header(number: int, tenant: str) -> bytes:
    return ingest_service_pb2.Frame(number=number, tenant=tenant).SerializeToString()


def _frame_bytes(message_bytes: int) -> int:
    """The frame's size in a message: what is left without its tag and its length as a varint."""
    for width in range(1, 6):
        size = message_bytes - 1 - width
        if len(varint(size)) == width:
            return size
    raise ValueError(f"{message_bytes} bytes are no frame message")


def _outcomes(ack: ingest_service_pb2.FrameAck, tenants: list[str]) -> list[Ack | EventRejected]:
    """The outcome of each event, where tenants mix or some were not plainly stored.

    A tenant's plainly stored events take the ids of its range in frame order.
    """
    special: dict[int, Ack | EventRejected] = {}
    for result in ack.results:
        if result.WhichOneof("result") == "error":
            name = error_reason_pb2.ErrorReason.Name(result.error.reason)
            special[result.index] = EventRejected(
                result.error.message, reason=name.removeprefix("ERROR_REASON_")
            )
        else:
            special[result.index] = Ack(result.id, result.duplicate or ack.duplicate)
    ranges = {each.tenant: [each.first, each.step, each.count] for each in ack.ids}
    outcomes: list[Ack | EventRejected] = []
    for index, tenant in enumerate(tenants):
        told = special.get(index)
        if told is not None:
            outcomes.append(told)
            continue
        row = ranges.get(tenant)
        if row is None or not row[2]:
            outcomes.append(Ack(None, ack.duplicate))
            continue
        outcomes.append(Ack(row[0], ack.duplicate))
        row[0] += row[1]
        row[2] -= 1
    return outcomes
