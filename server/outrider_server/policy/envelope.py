"""The JSON a receiver gets: one element per delivery, alone or in an array.

    {"id": "<delivery>", "event_id": "<sequence>", "type": ..., "timestamp": ...,
     "source" .. "attributes" only where set, "data": <payload>}

Rule: the payload's bytes pass through unchanged; the envelope is concatenated around them. What the subscriptions of an
event share is made once (`shared_part`), what differs is only the delivery's id. Ids are strings: a JSON number of 63
bits loses its end in many readers.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import lru_cache

import orjson

from outrider_server.domain.event import NewEvent
from outrider_server.domain.sequence import SEQUENCE_MAX

CONTENT_TYPE = "application/json"

_DELIVERY_PREFIX = "dlv_"
_BATCH_PREFIX = "bat_"


def delivery_id(sequence: int, subscription: int) -> str:
    """A delivery's id: the same on every attempt and in every copy."""
    return f"dlv_{sequence}_{subscription}"


def parse_delivery_id(text: str) -> tuple[int, int] | None:
    """The sequence and subscription that a delivery's id names; None if it is none."""
    prefix, _, rest = text.partition("_")
    sequence, _, subscription = rest.partition("_")
    if prefix + "_" != _DELIVERY_PREFIX or not (_is_number(sequence) and _is_number(subscription)):
        return None
    return int(sequence), int(subscription)


def batch_id(deliveries: Sequence[tuple[int, int]]) -> str:
    """The id of a request that carries `deliveries`, pairs of sequence and subscription: `bat_<sequence>_<subscription>_<n>`.

    The first delivery names it; `n` is a digest of all of them in order. So the same deliveries sent again have the
    same id, and other deliveries another one: a receiver that drops requests whose `webhook-id` it has seen would
    otherwise lose what a retried batch holds beyond its first form.
    """
    sequence, subscription = deliveries[0]
    flat = [number for pair in deliveries for number in pair]
    digest = hashlib.blake2b(struct.pack(f"<{len(flat)}q", *flat), digest_size=8).hexdigest()
    return f"{_BATCH_PREFIX}{sequence}_{subscription}_{digest}"


def shared_part(
    sequence: int,
    type_: str,
    time_us: int,
    source: str = "",
    subject: str = "",
    key: str = "",
    organization: str = "",
    actor: str = "",
    attributes: dict[str, str] | None = None,
) -> bytes:
    """What the elements of one event share: from the end of the delivery's id to the start of the payload.

    `time_us` lies between the years 1 and 9999 (ingest refuses others).
    """
    seconds, microseconds = divmod(time_us, 1_000_000)
    dumps = orjson.dumps
    optional = b""
    if source:
        optional += b'"source":' + dumps(source) + b","
    if subject:
        optional += b'"subject":' + dumps(subject) + b","
    if key:
        optional += b'"key":' + dumps(key) + b","
    if organization:
        optional += b'"organization":' + dumps(organization) + b","
    if actor:
        optional += b'"actor":' + dumps(actor) + b","
    if attributes:
        optional += b'"attributes":' + dumps(attributes) + b","
    return b'","event_id":"%d","type":%b,"timestamp":"%b.%06dZ",%b"data":' % (
        sequence,
        dumps(type_),
        _second_text(seconds),
        microseconds,
        optional,
    )


def shared_part_of(sequence: int, event: NewEvent) -> bytes:
    """`shared_part` of an event as it was published."""
    return shared_part(
        sequence,
        event.type,
        event.time_us,
        event.source,
        event.subject,
        event.key,
        event.organization,
        event.actor,
        event.attributes,
    )


def element(sequence: int, subscription: int, shared: bytes, data: bytes) -> bytes:
    """The JSON of one delivery: the body of a single request, or one item of a batch."""
    return b'{"id":"dlv_%d_%d%b%b}' % (sequence, subscription, shared, data)


def batch_body(elements: Iterable[bytes]) -> bytes:
    """The body of a request that carries several deliveries."""
    return b"[%b]" % b",".join(elements)


@lru_cache(maxsize=1024)
def _second_text(seconds: int) -> bytes:
    """`2026-01-31T12:00:00`: most events of a moment share their second, and formatting it costs a microsecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat()[:19].encode()


def _is_number(text: str) -> bool:
    """Whether `text` is how a number up to the largest sequence is written: other spellings would be other ids."""
    return (
        text.isascii()
        and text.isdigit()
        and len(text) <= 19
        and str(int(text)) == text
        and int(text) <= SEQUENCE_MAX
    )
