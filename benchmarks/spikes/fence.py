"""What the fence of an ingest transaction costs: key-share row locks, `fence()` of the first migration, or nothing.

    fence()      shared advisory locks, then a read of the epochs, in a function whose plans are kept
    key share    SELECT ... FOR KEY SHARE as a statement of its own text, planned each time
    key share()  the same in a function whose plan is kept, as `fence()` is one

Two connections commit small ingest-like transactions (20 events of 8 shards out of 64, COPY, synchronous commit). Paces:

    500/s            an open loop, 250 a second on each connection
    500/s, records   the same beside a third connection that does what the record loop does ten times a second: the same
                     fence over all 64 shards, then an UPDATE of each shard's row, committed asynchronously
    full             as fast as the two connections can

Each variant gets 20 s in all at each pace, in turns of 5 s. Multixacts are counted by `mxid_age`, which reads the next one
to be given out.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from benchmarks.spikes.common import (
    EVENT_COLUMNS,
    SHARDS,
    cpu_seconds,
    head,
    median,
    now_us,
    payload,
    percentile,
    postgres,
    table,
)

EVENTS = 20
SHARDS_OF_A_COMMIT = 8
WRITERS = 2
RATE = 500.0
RECORDS_A_SECOND = 10.0
VARIANTS = ("none", "fence()", "key share", "key share()")
PACES = ("500/s", "500/s, records", "full")
EPOCH = 1
KEY_SHARE = """
    CREATE FUNCTION key_share(shards smallint[], epochs bigint[]) RETURNS void LANGUAGE plpgsql VOLATILE AS $$
    DECLARE
        held integer;
    BEGIN
        PERFORM 1 FROM shard JOIN unnest(shards, epochs) AS mine (s, e) ON shard.shard = mine.s AND shard.epoch = mine.e
            ORDER BY shard.shard FOR KEY SHARE OF shard;
        GET DIAGNOSTICS held = ROW_COUNT;
        IF held <> cardinality(shards) THEN
            RAISE EXCEPTION 'another node took a shard over' USING ERRCODE = 'OR001';
        END IF;
    END $$
"""


class Fenced(RuntimeError):
    """The fence refused, which nothing here may cause."""


@dataclass
class Turn:
    """What was seen in one turn."""

    seconds: float = 0.0
    commits: int = 0
    records: int = 0
    whole_ms: list[float] = field(default_factory=list)
    fence_ms: list[float] = field(default_factory=list)
    wal_bytes: int = 0
    multixacts: int = 0
    backend_seconds: float = 0.0


def opening(variant: str, shards: Sequence[int]) -> str:
    """`BEGIN` and the fence, one round trip."""
    if variant == "none":
        return "BEGIN"
    numbers = ",".join(map(str, shards))
    if variant.endswith("()"):
        epochs = ",".join([str(EPOCH)] * len(shards))
        name = variant.removesuffix("()").replace(" ", "_")
        return f"BEGIN; SELECT {name}('{{{numbers}}}'::smallint[], '{{{epochs}}}'::bigint[])"
    pairs = ",".join(f"({shard},{EPOCH})" for shard in shards)
    return (
        "BEGIN; SELECT 1 FROM shard WHERE (shard, epoch) IN "
        f"(VALUES {pairs}) ORDER BY shard FOR KEY SHARE OF shard"
    )


async def open_transaction(connection: Any, variant: str, shards: Sequence[int]) -> None:
    """Begin under the fence; every variant tells a wrong epoch in the same round trip."""
    status = await connection.execute(opening(variant, shards))
    if variant == "key share" and status != f"SELECT {len(shards)}":
        raise Fenced(status)


class Writer:
    """One connection's transactions. Sequences are its own, so writers never meet in the event table's key."""

    def __init__(self, connection: Any, number: int) -> None:
        self.connection = connection
        self._chance = random.Random(number)
        self._number = number
        self._made = 0
        self._data = payload(number)

    async def commit(self, variant: str, turn: Turn) -> None:
        """One transaction."""
        shards = sorted(self._chance.sample(range(SHARDS), SHARDS_OF_A_COMMIT))
        rows = []
        at = now_us()
        for index in range(EVENTS):
            self._made += 1
            sequence = ((at + index) << 10) + shards[index % len(shards)]
            rows.append(
                (self._made * 10 + self._number, sequence, shards[index % len(shards)], "order.created",
                 at, None, (1,), 1, self._data)
            )  # fmt: skip
        begin = time.perf_counter()
        await open_transaction(self.connection, variant, shards)
        fenced = time.perf_counter()
        await self.connection.copy_records_to_table("event", records=rows, columns=EVENT_COLUMNS)
        await self.connection.execute("COMMIT")
        end = time.perf_counter()
        turn.commits += 1
        turn.whole_ms.append((end - begin) * 1000)
        turn.fence_ms.append((fenced - begin) * 1000)


async def record(connection: Any, variant: str, turn: Turn, seconds: float) -> None:
    """The record loop's part in it."""
    begin = time.perf_counter()
    number = 0
    while (wait := begin + number / RECORDS_A_SECOND - time.perf_counter()) < seconds:
        number += 1
        await asyncio.sleep(max(0.0, wait))
        if time.perf_counter() - begin >= seconds:
            return
        await open_transaction(connection, variant, range(SHARDS))
        await connection.execute("UPDATE shard SET record_no = record_no + 1; COMMIT")
        turn.records += 1


async def write(writer: Writer, variant: str, turn: Turn, seconds: float, rate: float) -> None:
    """Commit for `seconds`, each transaction at its own moment, or one after the other (`rate` 0)."""
    begin = time.perf_counter()
    number = 0
    while (passed := time.perf_counter() - begin) < seconds:
        if rate and (wait := number / rate - passed) > 0:
            await asyncio.sleep(wait)
            continue
        number += 1
        await writer.commit(variant, turn)


async def one_turn(
    writers: list[Writer], recorder: Any, watcher: Any, variant: str, pace: str, seconds: float
) -> Turn:
    """One variant at one pace."""
    turn = Turn()
    pids = [each.connection.get_server_pid() for each in writers] + [recorder.get_server_pid()]

    async def look() -> tuple[int, int, float]:
        row = await watcher.fetchrow(
            "SELECT (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint, mxid_age('1'::xid)"
        )
        return row[0], row[1], sum(map(cpu_seconds, pids))

    wal, multixacts, cpu = await look()
    begin = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        if pace == "500/s, records":
            tasks.create_task(record(recorder, variant, turn, seconds))
        for writer in writers:
            rate = 0.0 if pace == "full" else RATE / WRITERS
            tasks.create_task(write(writer, variant, turn, seconds, rate))
    turn.seconds = time.perf_counter() - begin
    wal_after, multixacts_after, cpu_after = await look()
    turn.wal_bytes = wal_after - wal
    turn.multixacts = multixacts_after - multixacts
    turn.backend_seconds = cpu_after - cpu
    return turn


async def run(quick: bool) -> None:  # noqa: FBT001 - the one option of every spike
    """Take turns and print the table."""
    turns, seconds = (1, 1.0) if quick else (4, 5.0)
    head(
        "fence",
        f"{WRITERS} connections, transactions of {EVENTS} events in {SHARDS_OF_A_COMMIT} of {SHARDS} shards",
    )
    seen: dict[tuple[str, str], list[Turn]] = defaultdict(list)
    async with postgres() as dsn:
        connections = [await asyncpg.connect(dsn) for _ in range(WRITERS + 2)]
        *of_writers, recorder, watcher = connections
        try:
            await watcher.execute(f"UPDATE shard SET epoch = {EPOCH}, node = 'spike'")
            await watcher.execute(KEY_SHARE)
            await recorder.execute("SET synchronous_commit = off")
            writers = [Writer(each, number) for number, each in enumerate(of_writers, start=1)]
            for variant in VARIANTS:  # plans, catalogue caches, first full pages
                await one_turn(writers, recorder, watcher, variant, "500/s, records", seconds / 5)
            for turn in range(turns):
                for pace in PACES:
                    at = turn % len(VARIANTS)
                    for variant in VARIANTS[at:] + VARIANTS[:at]:
                        one = await one_turn(writers, recorder, watcher, variant, pace, seconds)
                        seen[pace, variant].append(one)
        finally:
            for each in connections:
                await each.close()
    columns = [
        "pace", "fence", "commits/s", "whole ms p50", "p99", "of it the fence p50", "p99", "WAL bytes a commit",
        "multixacts", "backends' CPU us a commit", "ratio to none",
    ]  # fmt: skip
    rows = []
    for pace in PACES:
        cost = {v: median(_cpu_us(turn) for turn in seen[pace, v]) for v in VARIANTS}
        for variant in VARIANTS:
            those = seen[pace, variant]
            whole = [ms for turn in those for ms in turn.whole_ms]
            fence = [ms for turn in those for ms in turn.fence_ms]
            rows.append(
                (
                    pace, variant, median(t.commits / t.seconds for t in those),
                    percentile(whole, 0.5), percentile(whole, 0.99),
                    percentile(fence, 0.5), percentile(fence, 0.99),
                    median(t.wal_bytes / t.commits for t in those), sum(t.multixacts for t in those),
                    cost[variant], cost[variant] / cost["none"],
                )
            )  # fmt: skip
    print(f"{turns} turns of {seconds:g} s each")
    table(columns, rows)


def _cpu_us(turn: Turn) -> float:
    return turn.backend_seconds / turn.commits * 1e6
