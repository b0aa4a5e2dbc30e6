"""Ingest: check the events of a frame, one by one, before anything is stored.

Rules:
- An event that breaks a rule is refused for good, with its reason, and costs the others nothing.
- Each payload is parsed once; the same parse serves matching.
- Long work gives way: after 2 ms of it the loop gets its turn. Large payloads are left to `pipeline.large`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import orjson

from outrider_server.domain.errors import InvalidArgument
from outrider_server.domain.event import EVENT_BYTES_MAX, EVENT_OVERHEAD_BYTES, Event
from outrider_server.domain.frame import EventRefusal
from outrider_server.matching.event_types import validate_event_type
from outrider_server.pipeline.match import TenantEntry, match
from outrider_server.pipeline.slices import GiveWay
from outrider_server.telemetry.counters import IngestCounters, MatchCounters

KNOWN_TYPES_MAX = 10_000
TIME_US_MIN = -62_135_596_800_000_000
TIME_US_MAX = 253_402_300_799_999_999
ATTRIBUTES_MAX = 32
ATTRIBUTE_BYTES_MAX = 8 * 1024

_TEXT_LIMITS = (
    ("key", 512),
    ("subject", 512),
    ("source", 256),
    ("organization", 256),
    ("actor", 256),
    ("idempotency_key", 512),
)


@dataclass(frozen=True, slots=True)
class IngestLimits:
    """Bounds of what one event may be. `large_event_bytes`: above it, parsing is left to the child process."""

    event_bytes_max: int = EVENT_BYTES_MAX
    json_depth_max: int = 128
    large_event_bytes: int = 256 * 1024


class Refused(Exception):
    """This event is refused for good."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class EventChecker:
    """Checks events against the rules of the contract, and parses their payloads."""

    def __init__(self, limits: IngestLimits) -> None:
        self._limits = limits
        self._known_types: set[str] = set()

    def check(self, event: Event, entry: TenantEntry) -> None:
        """Everything but the payload's JSON; raises `Refused`."""
        limits = self._limits
        size = len(event.data)
        if size == 0:
            raise Refused("EMPTY_PAYLOAD", "the event carries no payload")
        if size > limits.event_bytes_max:
            raise Refused(
                "PAYLOAD_TOO_LARGE",
                f"the payload has {size} bytes, at most {limits.event_bytes_max} are taken",
            )
        event.size = size + EVENT_OVERHEAD_BYTES
        self._check_type(event.type)
        if entry.strict and event.type not in entry.event_types:
            raise Refused(
                "UNKNOWN_EVENT_TYPE",
                f"tenant {entry.name} is strict and does not know the type {event.type}",
            )
        if not TIME_US_MIN <= event.time_us <= TIME_US_MAX:
            raise Refused("INVALID_TIME", "the time lies outside the years 1 to 9999")
        if (
            event.key
            or event.subject
            or event.source
            or event.organization
            or event.actor
            or event.idempotency_key
        ):
            for name, limit in _TEXT_LIMITS:
                text = getattr(event, name)
                if text:
                    _check_text(name, text, limit)
        if event.attributes:
            _check_attributes(event.attributes)

    def parse(self, data: bytes) -> object:
        """The payload as a value; raises `Refused`."""
        return parse_payload(data, self._limits.json_depth_max)

    def _check_type(self, name: str) -> None:
        if name in self._known_types:
            return
        try:
            validate_event_type(name)
        except InvalidArgument as error:
            raise Refused(error.reason, error.message) from None
        if len(self._known_types) >= KNOWN_TYPES_MAX:
            self._known_types.clear()
        self._known_types.add(name)


def parse_payload(data: bytes, depth_max: int) -> object:
    """A payload's JSON value; raises `Refused` for what is not one, is not UTF-8 or nests too deep."""
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        try:
            data.decode()
        except UnicodeDecodeError as wrong:
            raise Refused(
                "PAYLOAD_NOT_UTF8", f"the payload is not UTF-8 at byte {wrong.start}"
            ) from None
        if "depth limit" in str(error):
            raise Refused(
                "PAYLOAD_TOO_DEEP", f"the payload nests deeper than {depth_max}"
            ) from None
        raise Refused("PAYLOAD_NOT_JSON", f"the payload is not JSON: {error}") from None
    # Counting brackets is an upper bound of the depth that costs next to nothing; few payloads need the walk.
    if data.count(b"[") + data.count(b"{") > depth_max and _depth_exceeds(document, depth_max):
        raise Refused("PAYLOAD_TOO_DEEP", f"the payload nests deeper than {depth_max}")
    return document


def _depth_exceeds(document: object, depth_max: int) -> bool:
    level = [document]
    for _ in range(depth_max):
        inner: list[object] = []
        for value in level:
            if isinstance(value, dict):
                inner.extend(v for v in value.values() if isinstance(v, dict | list))
            elif isinstance(value, list):
                inner.extend(v for v in value if isinstance(v, dict | list))
        if not inner:
            return False
        level = inner
    return True


def _check_text(name: str, text: str, limit: int) -> None:
    if len(text) > limit or (not text.isascii() and len(text.encode()) > limit):
        raise Refused("FIELD_TOO_LONG", f"{name} has more than {limit} bytes")
    if "\0" in text:
        raise Refused("INVALID_TEXT", f"{name} holds a NUL character")


def _check_attributes(attributes: dict[str, str]) -> None:
    if len(attributes) > ATTRIBUTES_MAX:
        raise Refused("FIELD_TOO_LONG", f"there are more than {ATTRIBUTES_MAX} attributes")
    size = 0
    for name, value in attributes.items():
        if "\0" in name or "\0" in value:
            raise Refused("INVALID_TEXT", "an attribute holds a NUL character")
        size += len(name.encode()) + len(value.encode())
    if size > ATTRIBUTE_BYTES_MAX:
        raise Refused(
            "FIELD_TOO_LONG", f"the attributes have more than {ATTRIBUTE_BYTES_MAX} bytes"
        )


async def check_and_match(
    events: Sequence[Event],
    entries: Sequence[TenantEntry],
    places: Sequence[int],
    checker: EventChecker,
    ingest: IngestCounters,
    matched: MatchCounters,
    monotonic: Callable[[], float],
) -> list[EventRefusal]:
    """Check and match events; `entries` are their tenants, `places` their indexes in the frame.

    Returns the refused ones. None of `events` may be large (see `pipeline.large`).
    """
    refusals: list[EventRefusal] = []
    giving_way = GiveWay(monotonic)
    for event, entry, place in zip(events, entries, places, strict=True):
        try:
            checker.check(event, entry)
            match(entry, event, checker.parse(event.data), matched)
        except Refused as refused:
            refusals.append(EventRefusal(place, refused.reason, refused.message))
            ingest.events_refused.add(refused.reason)
        if giving_way.due():
            await giving_way()
    return refusals
