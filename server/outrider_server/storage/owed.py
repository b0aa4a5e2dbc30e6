"""Owed rows: read for catch-up and for jobs. They are written by records only."""

from __future__ import annotations

from dataclasses import dataclass

import asyncpg

from outrider_server.domain.delivery import HELD_BACK_US
from outrider_server.policy.plans import FoundRow
from outrider_server.storage.database import Connection
from outrider_server.storage.queries import load


@dataclass(frozen=True, slots=True)
class OwedCount:
    """What stands owed of one subscription in a shard: rows that wait for room, and when the first retry is due."""

    shard: int
    subscription: int
    tenant: int
    backlog: int
    retry_us: int | None


async def count(connection: Connection, shards: list[int]) -> list[OwedCount]:
    """Per shard and subscription, of these shards."""
    return [OwedCount(*row) for row in await connection.fetch(load("count_owed"), shards)]


async def total(connection: Connection, shards: list[int]) -> tuple[int, int]:
    """Deliveries owed over these shards, and those of them that are held back."""
    row = await connection.fetchrow(load("sum_owed"), shards, HELD_BACK_US)
    assert row is not None
    return row["owed"], row["held_back"]


async def find_backlog(
    connection: Connection, shard: int, subscriptions: list[int], held: list[int], rows_max: int
) -> tuple[list[FoundRow], int | None]:
    """Rows that wait for room, in sequence order; and where they stopped, None when these are all."""
    rows = await connection.fetch(load("find_backlog"), subscriptions, held, rows_max, shard)
    horizon = rows[-1]["first_sequence"] if len(rows) == rows_max else None
    return [_found(row) for row in rows], horizon


async def find_retries(
    connection: Connection,
    shard: int,
    subscriptions: list[int],
    held: list[int],
    rows_max: int,
    now_us: int,
) -> tuple[list[FoundRow], int | None]:
    """Rows whose time has come; and when the next after these is due, None for none."""
    found = [
        _found(row)
        for row in await connection.fetch(
            load("find_retries"), subscriptions, held, rows_max, now_us, shard
        )
    ]
    held = held + [row.id for row in found]
    return found, await connection.fetchval(load("next_retry"), subscriptions, held, shard)


async def find_below(
    connection: Connection, shards: list[int], sequence: int, rows_max: int
) -> list[FoundRow]:
    """Rows that name an event below `sequence`."""
    return [
        _found(row)
        for row in await connection.fetch(load("find_owed_below"), shards, sequence, rows_max)
    ]


async def find_of(
    connection: Connection, shard: int, subscription: int, rows_max: int
) -> list[FoundRow]:
    """Rows of one subscription in a shard, whatever they wait for."""
    rows = await connection.fetch(load("find_owed_of"), subscription, rows_max, shard)
    return [_found(row) for row in rows]


def _found(row: asyncpg.Record) -> FoundRow:
    return FoundRow(
        row["shard"],
        row["id"],
        row["tenant"],
        row["subscription"],
        row["sequences"],
        row["attempt"],
        row["due_us"],
    )
