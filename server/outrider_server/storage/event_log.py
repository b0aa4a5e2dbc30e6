"""The log's events: appended in groups with everything that makes them durable once, read back by range.

One ingest transaction is: `begin`, `set_producers`, `find_idempotent`, `append`, `commit`. It is `rollback`ed on any
error; when the commit itself fails, whether it holds is unknown, and nobody may be told that it does.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import asyncpg
import orjson

from outrider_server.domain.event import EVENT_OVERHEAD_BYTES, Event
from outrider_server.domain.frame import EventRefusal, FrameResult
from outrider_server.domain.sequence import SHARD_BITS
from outrider_server.storage.database import Connection
from outrider_server.storage.queries import load
from outrider_server.storage.shards import fence_statement

_SHARD_MASK = (1 << SHARD_BITS) - 1

EVENT_COLUMNS = (
    "tenant",
    "sequence",
    "shard",
    "type",
    "time_us",
    "source",
    "subject",
    "key",
    "organization",
    "actor",
    "idempotency_key",
    "attributes",
    "targets",
    "over_budget",
    "config_version",
    "data",
)  # fmt: skip

_FRAME_COLUMNS = ("at", "producer", "session", "number", "ack")

WINDOW_PAGE_EVENTS = 5_000
SETTLED_PAGE_ROWS = 200
SETTLED_SLICE_ROWS = 5

FrameRow = tuple[int, str, int, int, bytes]
"""(at, producer, session, number, answer)"""


class ProducerConflict(Exception):
    """A producer's row was ahead of this node's memory: another writer was here."""


class DataRefused(Exception):
    """Postgres refused a row of a group as data. The transaction is to be rolled back."""


_REFUSED = (
    struct.error,
    asyncpg.DataError,
    UnicodeEncodeError,
    OverflowError,
    ValueError,
    orjson.JSONEncodeError,
)


@contextmanager
def _refusals_told() -> Iterator[None]:
    try:
        yield
    except _REFUSED as error:
        raise DataRefused(str(error)) from error


async def begin(connection: Connection, epochs: Iterable[tuple[int, int]]) -> None:
    """Start an ingest transaction under the fence of the (shard, epoch) pairs it writes to."""
    await connection.execute(fence_statement(epochs))


async def commit(connection: Connection) -> None:
    """Commit; synchronous, so what it returns from is durable."""
    await connection.execute("COMMIT")


async def rollback(connection: Connection) -> None:
    """Leave the transaction."""
    await connection.execute("ROLLBACK")


async def set_producers(connection: Connection, rows: list[tuple[str, int, int, int]]) -> None:
    """Advance (producer, shard, session, last frame); raises `ProducerConflict` where a row is not behind."""
    rows.sort()
    columns = [list(column) for column in zip(*rows, strict=True)]
    if len(await connection.fetch(load("set_producers"), *columns)) != len(rows):
        raise ProducerConflict


async def find_idempotent(
    connection: Connection, wanted: Sequence[tuple[int, UUID]], since: int
) -> dict[tuple[int, UUID], int]:
    """The sequences of events stored since `since` under these (tenant, hashed key) pairs."""
    rows = await connection.fetch(
        load("find_idempotent"),
        [tenant for tenant, _ in wanted],
        [key for _, key in wanted],
        since,
    )
    return {(row["tenant"], row["key"]): row["sequence"] for row in rows}


async def append(
    connection: Connection,
    events: Sequence[Event],
    keys: Sequence[tuple[int, UUID, int]],
    frames: Sequence[FrameRow],
    *,
    large: bool = False,
) -> None:
    """Write events, their idempotency keys as (tenant, hashed key, sequence), and the answers of their frames.

    The rows are complete before COPY starts (a generator that fails inside one would hang it).
    """
    with _refusals_told():
        if events:
            await (_copy_large if large else _copy_events)(connection, events)
        if keys:
            await connection.copy_records_to_table(
                "idempotency", records=keys, columns=("tenant", "key", "sequence")
            )
        if frames:
            await connection.copy_records_to_table(
                "producer_frame", records=frames, columns=_FRAME_COLUMNS
            )


async def _copy_events(connection: Connection, events: Sequence[Event]) -> None:
    await connection.copy_records_to_table(
        "event", records=[_row(event) for event in events], columns=EVENT_COLUMNS
    )


async def _copy_large(connection: Connection, events: Sequence[Event]) -> None:
    """As `_copy_events`, but in pieces that give way to the loop: 10 MiB at once would hold up everyone's commit."""
    await connection.copy_to_table(
        "event", source=_pieces(events), columns=EVENT_COLUMNS, format="binary"
    )


async def _pieces(events: Sequence[Event]) -> AsyncIterator[bytes]:
    """The rows in Postgres' binary COPY format."""
    yield _COPY_HEAD
    for event in events:
        fields = _row(event)[:-1]
        row = [struct.pack("!h", len(EVENT_COLUMNS))]
        row += [_binary(encode, value) for encode, value in zip(_ENCODINGS, fields, strict=True)]
        yield b"".join(row) + struct.pack("!i", len(event.data))
        view = memoryview(event.data)
        for start in range(0, len(view), PIECE_BYTES):
            yield bytes(view[start : start + PIECE_BYTES])
            await asyncio.sleep(0)
    yield struct.pack("!h", -1)


def _binary(encode: Callable[[Any], bytes], value: object) -> bytes:
    if value is None:
        return struct.pack("!i", -1)
    encoded = encode(value)
    return struct.pack("!i", len(encoded)) + encoded


def _integers(values: Sequence[int]) -> bytes:
    """An integer[]: dimensions, no nulls, the element's type, then length and lower bound, then the elements."""
    if not values:
        return struct.pack("!iii", 0, 0, _INTEGER_OID)
    head = struct.pack("!iiiii", 1, 0, _INTEGER_OID, len(values), 1)
    return head + b"".join(struct.pack("!ii", 4, value) for value in values)


PIECE_BYTES = 128 * 1024
_INTEGER_OID = 23
_COPY_HEAD = b"PGCOPY\n\xff\r\n\0" + struct.pack("!ii", 0, 0)
_BY_COLUMN: dict[str, Callable[[Any], bytes]] = {
    "tenant": struct.Struct("!i").pack,
    "sequence": struct.Struct("!q").pack,
    "shard": struct.Struct("!h").pack,
    "time_us": struct.Struct("!q").pack,
    "config_version": struct.Struct("!q").pack,
    "targets": _integers,
    "over_budget": _integers,
}
# Texts where the table above says nothing; the last column is the payload.
_ENCODINGS = [_BY_COLUMN.get(column, str.encode) for column in EVENT_COLUMNS[:-1]]


async def refused_alone(connection: Connection, events: Sequence[Event]) -> list[Event]:
    """Which of `events` Postgres refuses as data, found by halving, in transactions that are rolled back."""
    if not events:
        return []
    await connection.execute("BEGIN")
    try:
        await _copy_events(connection, events)
    except _REFUSED:
        await connection.execute("ROLLBACK")
        if len(events) == 1:
            return list(events)
        middle = len(events) // 2
        first = await refused_alone(connection, events[:middle])
        return first + await refused_alone(connection, events[middle:])
    await connection.execute("ROLLBACK")
    return []


def _row(event: Event) -> tuple[object, ...]:
    return (
        event.tenant,
        event.sequence,
        event.sequence & _SHARD_MASK,
        event.type,
        event.time_us,
        event.source or None,
        event.subject or None,
        event.key or None,
        event.organization or None,
        event.actor or None,
        event.idempotency_key or None,
        orjson.dumps(event.attributes).decode() if event.attributes else None,
        event.targets,
        event.over_budget or None,
        event.config_version,
        event.data,
    )


async def read_producer(connection: Connection, producer: str) -> dict[int, tuple[int, int]]:
    """What is durable of a producer: per shard its latest session there, and the last frame of that."""
    rows = await connection.fetch(load("read_producer"), producer)
    return {row["shard"]: (row["session"], row["last_frame"]) for row in rows}


async def read_frames(
    connection: Connection, producer: str, session: int, numbers: list[int]
) -> dict[int, FrameResult]:
    """What these frames were answered with; those whose answer is no longer kept are left out."""
    rows = await connection.fetch(load("read_frames"), producer, session, numbers)
    known: dict[int, FrameResult] = {}
    for row in rows:  # several where a frame's events live in several shards
        answer = decode_answer(row["ack"])
        earlier = known.get(row["number"])
        known[row["number"]] = answer if earlier is None else earlier.joined(answer)
    return known


async def is_forgotten(
    connection: Connection, producer: str, session: int, number: int, since: int
) -> bool:
    """Whether a frame without an answer may have had one that is no longer kept.

    Numbers grow with time: while the answer to an earlier frame is kept, or the first that is kept came after `since`,
    within which nothing is dropped, none has been forgotten.
    """
    row = await connection.fetchrow(load("first_frame"), producer, session)
    return row is None or (row["number"] > number and row["at"] < since)


def encode_answer(result: FrameResult) -> bytes:
    """An answer as it is stored."""
    refusals = [(r.index, r.reason, r.message) for r in result.refusals]
    return orjson.dumps([result.ranges, refusals, result.duplicates, result.singles])


def decode_answer(data: bytes) -> FrameResult:
    """A stored answer, marked as a repeated one."""
    ranges, refusals, duplicates, *rest = orjson.loads(data)
    return FrameResult(
        ranges=[(name, first, count) for name, first, count in ranges],
        refusals=[EventRefusal(*refusal) for refusal in refusals],
        duplicates=[(index, sequence) for index, sequence in duplicates],
        singles=[(index, sequence) for index, sequence in (rest[0] if rest else ())],
        duplicate=True,
    )


async def read_tenants(connection: Connection, shards: list[int]) -> list[tuple[int, int]]:
    """(tenant, shard) of all that ever were in these: a deleted one may still have events above the checkpoint."""
    return [(row[0], row[1]) for row in await connection.fetch(load("read_tenants"), shards)]


async def read_window(
    connection: Connection, shard: int, tenants: list[int], checkpoint: int
) -> AsyncGenerator[list[tuple[int, int, list[int]]], None]:
    """(sequence, tenant, targets) of the tenants' events of a shard above `checkpoint`, in order, in pages.

    One cursor in one transaction: pages asked for one by one would each be sorted anew.
    """
    async with connection.transaction(readonly=True):
        cursor = await connection.cursor(load("read_window"), tenants, checkpoint, shard)
        while rows := await cursor.fetch(WINDOW_PAGE_EVENTS):
            yield [(row[0], row[1], row[2]) for row in rows]


async def read_settled(connection: Connection, shard: int, first: int) -> set[tuple[int, int]]:
    """(sequence, subscription) pairs from `first` on that attempts, dead letters or owed rows name.

    Read as the rows stand, and unpacked here in slices that give way to the loop.
    """
    settled: set[tuple[int, int]] = set()
    async with connection.transaction(readonly=True):
        cursor = await connection.cursor(load("read_settled"), shard, first)
        while rows := await cursor.fetch(SETTLED_PAGE_ROWS):
            for index, (sequences, subscriptions, subscription) in enumerate(rows):
                named = (
                    zip(sequences, subscriptions, strict=True)
                    if subscriptions is not None
                    else ((sequence, subscription) for sequence in sequences)
                )
                settled.update(pair for pair in named if pair[0] >= first)
                if index % SETTLED_SLICE_ROWS == 0:
                    await asyncio.sleep(0)
    return settled


async def load_events(
    connection: Connection, tenant: int, sequences: list[int], bytes_max: int
) -> list[Event]:
    """Events by sequence, in order, as many as `bytes_max` allows (at least the first that exists)."""
    rows = await connection.fetch(load("load_events"), tenant, sequences, bytes_max)
    return [
        Event(
            tenant=row["tenant"],
            sequence=row["sequence"],
            type=row["type"],
            time_us=row["time_us"],
            source=row["source"] or "",
            subject=row["subject"] or "",
            key=row["key"] or "",
            organization=row["organization"] or "",
            actor=row["actor"] or "",
            attributes=orjson.loads(row["attributes"]) if row["attributes"] else {},
            config_version=row["config_version"],
            data=row["data"],
            size=len(row["data"]) + EVENT_OVERHEAD_BYTES,
        )
        for row in rows
    ]
