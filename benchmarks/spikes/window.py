"""Reading a full window at takeover: 200,000 events of one shard, three targets each, whole or in pages.

The database holds the window (40 tenants of the shard, 366-byte payloads), as many events of other shards between them, and
what is settled of it: half of the deliveries by attempts of 100, a tenth by owed rows of 256. Ways to read the events:

    whole        the statement of `storage/queries/read_window.sql`, fetched at once, made into tuples (as takeover did when
                 this was measured)
    cursor       the same statement behind a cursor of one transaction, 5,000 rows a page, giving way to the loop between
    keyset       pages of 5,000: `tenant = ANY(...) AND sequence > last ORDER BY sequence LIMIT 5000`
    keyset, one  the same a tenant at a time, by the primary key alone, then sorted here
    slices       pages of 100 ms of the sequence clock by the primary key: `sequence > a AND sequence <= b`

and what is settled: `whole` (read_settled.sql: rows of pairs, one set), `cursor` (the same in pages of 5,000), `packed` (rows as
they stand, arrays and all, in pages, made into pairs here). `restore` is `Obligations.restore_window` with the result.

Each measurement is a process of its own on uvloop: its peak memory above that at its begin, its CPU, the backend's CPU, and
how long its loop was held at most, by a probe that sleeps for a millisecond.
"""

from __future__ import annotations

import asyncio
import gc
import heapq
import json
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg

from benchmarks.children import Child
from benchmarks.loop import run_loop
from benchmarks.spikes.common import (
    EVENT_COLUMNS,
    SHARDS,
    Probe,
    cpu_seconds,
    head,
    median,
    now_us,
    payload,
    postgres,
    table,
)
from outrider_server.domain.endpoint import Endpoint
from outrider_server.domain.subscription import Subscription
from outrider_server.policy.checkpoint import Window
from outrider_server.policy.obligations import Obligations
from outrider_server.policy.plans import Limits

EVENTS = 200_000
TENANTS = 40
TARGETS = 3
SHARD = 7
SPAN_US = 5_000_000
PAGE = 5_000
SLICE_US = 100_000
BATCH = 100
OWED = 256
CHILD_SECONDS_MAX = 120.0
STEP_ROWS = 500

READ_WINDOW = """
    SELECT sequence, tenant, targets FROM event
    WHERE tenant = ANY($1::integer[]) AND sequence > $2 ORDER BY sequence
"""
READ_SETTLED = """
    SELECT sequence, subscription
    FROM attempt, unnest(sequences, subscriptions) AS named (sequence, subscription)
    WHERE shard = $1 AND at >= $2 AND sequence >= $2 AND verdict = 1
    UNION
    SELECT sequence, subscription FROM dead_letter, unnest(sequences) AS named (sequence)
    WHERE shard = $1 AND at >= $2 AND sequence >= $2
    UNION
    SELECT sequence, subscription FROM owed, unnest(sequences) AS named (sequence)
    WHERE shard = $1 AND sequence >= $2
"""
READ_PACKED = """
    SELECT sequences, subscriptions, 0 AS subscription FROM attempt
    WHERE shard = $1 AND at >= $2 AND verdict = 1
    UNION ALL
    SELECT sequences, NULL, subscription FROM dead_letter WHERE shard = $1 AND at >= $2
    UNION ALL
    SELECT sequences, NULL, subscription FROM owed WHERE shard = $1
"""
PACKED_ROWS = 100
"""Rows of a page of `packed`: as many pairs as two pages of the others."""

Events = list[tuple[int, int, list[int]]]
Pairs = set[tuple[int, int]]
TENANT_IDS = list(range(1, TENANTS + 1))


def subscriptions_of(tenant: int) -> list[int]:
    """The tenant's subscriptions; an event matches three of them."""
    return [tenant * 10 + index for index in range(TARGETS)]


async def whole_events(connection: Any, checkpoint: int) -> Events:
    """All at once."""
    rows = await connection.fetch(READ_WINDOW, TENANT_IDS, checkpoint)
    return [(row[0], row[1], row[2]) for row in rows]


async def cursor_events(connection: Any, checkpoint: int) -> Events:
    """In pages of one cursor."""
    events: Events = []
    async with connection.transaction(readonly=True):
        cursor = await connection.cursor(READ_WINDOW, TENANT_IDS, checkpoint)
        while rows := await cursor.fetch(PAGE):
            for start in range(0, len(rows), STEP_ROWS):
                events += [(row[0], row[1], row[2]) for row in rows[start : start + STEP_ROWS]]
                await asyncio.sleep(0)
    return events


async def keyset_events(connection: Any, checkpoint: int) -> Events:
    """In pages behind the last sequence."""
    events: Events = []
    after = checkpoint
    statement = await connection.prepare(f"{READ_WINDOW} LIMIT {PAGE}")
    while rows := await statement.fetch(TENANT_IDS, after):
        for start in range(0, len(rows), STEP_ROWS):
            events += [(row[0], row[1], row[2]) for row in rows[start : start + STEP_ROWS]]
            await asyncio.sleep(0)
        after = events[-1][0]
    return events


async def keyset_one_events(connection: Any, checkpoint: int) -> Events:
    """In pages behind the last sequence of one tenant after the other; the pages come sorted, a merge joins them."""
    of_tenants: list[Events] = []
    statement = await connection.prepare(
        f"""
        SELECT sequence, tenant, targets FROM event
        WHERE tenant = $1 AND sequence > $2 ORDER BY sequence LIMIT {PAGE}
        """
    )
    for tenant in TENANT_IDS:
        after, more, own = checkpoint, True, []
        while more:
            rows = await statement.fetch(tenant, after)
            more = len(rows) == PAGE
            for start in range(0, len(rows), STEP_ROWS):
                own += [(row[0], row[1], row[2]) for row in rows[start : start + STEP_ROWS]]
                await asyncio.sleep(0)
            if rows:
                after = rows[-1][0]
        of_tenants.append(own)
    events: Events = []
    for event in heapq.merge(*of_tenants):
        events.append(event)
        if len(events) % STEP_ROWS == 0:
            await asyncio.sleep(0)
    return events


async def slice_events(connection: Any, checkpoint: int) -> Events:
    """In pages of time, up to the last sequence that is stored."""
    events: Events = []
    last = await connection.fetchval(
        """
        SELECT max(newest) FROM unnest($1::integer[]) AS t (tenant), LATERAL (
            SELECT sequence AS newest FROM event WHERE event.tenant = t.tenant ORDER BY sequence DESC LIMIT 1) AS one
        """,
        TENANT_IDS,
    )
    statement = await connection.prepare(
        """
        SELECT sequence, tenant, targets FROM event
        WHERE tenant = ANY($1::integer[]) AND sequence > $2 AND sequence <= $3 ORDER BY sequence
        """
    )
    after = checkpoint
    while after < last:
        upto = after + (SLICE_US << 10)
        rows = await statement.fetch(TENANT_IDS, after, upto)
        for start in range(0, len(rows), STEP_ROWS):
            events += [(row[0], row[1], row[2]) for row in rows[start : start + STEP_ROWS]]
            await asyncio.sleep(0)
        after = upto
    return events


async def whole_settled(connection: Any, first: int) -> Pairs:
    """All at once."""
    rows = await connection.fetch(READ_SETTLED, SHARD, first)
    return {(row[0], row[1]) for row in rows}


async def cursor_settled(connection: Any, first: int) -> Pairs:
    """In pages of one cursor."""
    pairs: Pairs = set()
    async with connection.transaction(readonly=True):
        cursor = await connection.cursor(READ_SETTLED, SHARD, first)
        while rows := await cursor.fetch(PAGE):
            for start in range(0, len(rows), STEP_ROWS):
                pairs.update((row[0], row[1]) for row in rows[start : start + STEP_ROWS])
                await asyncio.sleep(0)
    return pairs


async def packed_settled(connection: Any, first: int) -> Pairs:
    """Rows as they stand, in pages of one cursor."""
    pairs: Pairs = set()
    async with connection.transaction(readonly=True):
        cursor = await connection.cursor(READ_PACKED, SHARD, first)
        while rows := await cursor.fetch(PACKED_ROWS):
            for index, (sequences, named, subscription) in enumerate(rows):
                if named is None:
                    pairs.update((each, subscription) for each in sequences if each >= first)
                else:
                    pairs.update(
                        pair for pair in zip(sequences, named, strict=True) if pair[0] >= first
                    )
                if index % 5 == 4:
                    await asyncio.sleep(0)
    return pairs


def restore(events: Events, settled: Pairs, checkpoint: int) -> None:
    """What takeover does with it."""
    obligations = Obligations(Limits())
    for tenant in TENANT_IDS:
        endpoint = Endpoint(tenant, tenant, "e", "http://127.0.0.1/", (b"k",))
        obligations.configure(
            SHARD,
            tenant,
            [endpoint],
            [Subscription(s, tenant, f"s{s}", tenant, ("*",)) for s in subscriptions_of(tenant)],
        )
    obligations.restore_window(Window(SHARD, 1, checkpoint, 0, events[-1][0]), events, settled)


EVENT_WAYS: dict[str, Callable[[Any, int], Awaitable[Events]]] = {
    "whole": whole_events,
    "cursor": cursor_events,
    "keyset": keyset_events,
    "keyset, one": keyset_one_events,
    "slices": slice_events,
}
SETTLED_WAYS: dict[str, Callable[[Any, int], Awaitable[Pairs]]] = {
    "whole": whole_settled,
    "cursor": cursor_settled,
    "packed": packed_settled,
}


async def measure(part: str, way: str, dsn: str, checkpoint: int) -> None:
    """One measurement, told as JSON on standard output."""
    gc.set_threshold(10_000)
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("SELECT count(*) FROM event WHERE sequence < 0")
        pid = connection.get_server_pid()
        events: Events = []
        settled: Pairs = set()
        if part == "restore":
            events = await cursor_events(connection, checkpoint)
            settled = await packed_settled(connection, checkpoint)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        cpu, backend, begin = time.process_time(), cpu_seconds(pid), time.perf_counter()
        count = 0
        async with Probe() as probe:
            if part == "events":
                count = len(await EVENT_WAYS[way](connection, checkpoint))
            elif part == "settled":
                count = len(await SETTLED_WAYS[way](connection, checkpoint))
            else:
                count = len(events) * TARGETS - len(settled)
                restore(events, settled, checkpoint)
            seconds = time.perf_counter() - begin
        report = {
            "count": count,
            "seconds": seconds,
            "cpu": time.process_time() - cpu,
            "backend": cpu_seconds(pid) - backend,
            "longest_ms": probe.longest_ms,
            "over_5_ms": probe.over_5_ms,
            "memory_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024,
        }
    finally:
        await connection.close()
    print(json.dumps(report), flush=True)


async def fill(dsn: str, events: int) -> int:
    """Make the window and what is settled of it; returns the checkpoint."""
    connection = await asyncpg.connect(dsn)
    start_us = now_us()
    step_us = SPAN_US / events
    data = payload(1)
    rows, own = [], []
    for index in range(events * 2):
        at = start_us + int(index * step_us / 2)
        if index % 2:
            tenant, shard = 1_000 + index % 1_000, index % SHARDS
            shard += shard == SHARD
        else:
            tenant, shard = TENANT_IDS[index // 2 % TENANTS], SHARD
            own.append(((at << 10) + shard, tenant))
        targets = tuple(subscriptions_of(tenant))
        # Sequences of one shard are strictly increasing, and two events here have at least 12 us between them.
        rows.append(
            (tenant, (at << 10) + shard, shard, "order.created", at, None, targets, 1, data)
        )
        if len(rows) == 5_000:
            await connection.copy_records_to_table("event", records=rows, columns=EVENT_COLUMNS)
            rows.clear()
    await connection.copy_records_to_table("event", records=rows, columns=EVENT_COLUMNS)
    by_subscription: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for sequence, tenant in own:
        for subscription in subscriptions_of(tenant):
            by_subscription[tenant, subscription].append(sequence)
    at = ((start_us + SPAN_US) << 10) + SHARD
    attempts: list[tuple[Any, ...]] = []
    owed: list[tuple[Any, ...]] = []
    for (tenant, subscription), sequences in by_subscription.items():
        half, tenth = len(sequences) // 2, len(sequences) // 10
        for first in range(0, half, BATCH):
            batch = sequences[first : first + BATCH]
            attempts.append(
                (
                    at,
                    SHARD,
                    tenant,
                    tenant,
                    1,
                    batch,
                    [subscription] * len(batch),
                    1,
                    1,
                    200,
                    0,
                    5.0,
                )
            )
        for first in range(half, half + tenth, OWED):
            part = sequences[first : min(first + OWED, half + tenth)]
            owed.append(
                (SHARD, len(owed), tenant, subscription, part[0], part, 0, 0, 1)
            )  # fmt: skip
    await connection.copy_records_to_table(
        "attempt",
        records=attempts,
        columns=(
            "at", "shard", "tenant", "endpoint", "endpoint_version", "sequences", "subscriptions", "number",
            "verdict", "status", "error", "duration_ms",
        ),
    )  # fmt: skip
    await connection.copy_records_to_table(
        "owed",
        records=owed,
        columns=(
            "shard", "id", "tenant", "subscription", "first_sequence", "sequences", "attempt", "due_us", "cause",
        ),
    )  # fmt: skip
    # No ANALYZE: a takeover comes seconds after the rows, and statistics do not.
    await connection.close()
    return ((start_us - 1) << 10) + SHARD


async def run(quick: bool) -> None:  # noqa: FBT001 - the one option of every spike
    """Take turns and print the tables."""
    turns, events = (1, 20_000) if quick else (3, EVENTS)
    head(
        "window", f"a window of {events:,} events of one shard, {TARGETS} targets each, at takeover"
    )
    seen: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    # Without parallel workers a backend's CPU is all that a statement costs.
    async with postgres({"max_parallel_workers_per_gather": "0"}) as dsn:
        checkpoint = await fill(dsn, events)
        asked = [("events", way) for way in EVENT_WAYS]
        asked += [("settled", way) for way in SETTLED_WAYS]
        asked.append(("restore", "as it is"))
        for _ in range(turns):
            for part, way in asked:
                seen[part, way].append(await _in_child(part, way, dsn, checkpoint))
    columns = [
        "part", "way", "rows", "seconds", "own CPU s", "backend CPU s", "loop held at most, ms", "held over 5 ms, times",
        "memory MiB", "CPU ratio to whole",
    ]  # fmt: skip
    rows = []
    for part, way in asked:
        middle = {name: median(r[name] for r in seen[part, way]) for name in seen[part, way][0]}
        whole = seen.get((part, "whole"))
        base = median(r["cpu"] + r["backend"] for r in whole) if whole else None
        ratio = (middle["cpu"] + middle["backend"]) / base if base else "-"
        rows.append(
            (
                part, way, int(middle["count"]), middle["seconds"], middle["cpu"], middle["backend"],
                middle["longest_ms"], int(middle["over_5_ms"]), middle["memory_mib"], ratio,
            )
        )  # fmt: skip
    print(f"medians of {turns} turns")
    table(columns, rows)


async def _in_child(part: str, way: str, dsn: str, checkpoint: int) -> dict[str, float]:
    child = await Child.start(
        f"outrider-spike-{os.getpid()}-window",
        ["-m", "benchmarks.spikes.window", part, way, dsn, str(checkpoint)],
        Path(os.environ.get("TMPDIR", "/tmp")),
        dict(os.environ),
    )
    try:
        report = await child.report(CHILD_SECONDS_MAX)
    finally:
        await child.end(10.0)
        child.log.unlink(missing_ok=True)
    return {name: float(value) for name, value in report.items()}


if __name__ == "__main__":
    run_loop(measure(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
