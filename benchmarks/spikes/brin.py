"""Whether BRIN on `event.sequence` stays useful when rows come late, against a btree, and what each costs at insert.

Data sets, rows in the order in which they commit, 64 shards interleaved by group commits of 5 ms:

    busy, in order        5,000 events/s for 80 s
    busy, late rows       the same; one event a second commits 3 s after its sequence (a large one)
    busy, clock behind    from the middle on one shard of the 64 runs 5 s behind (a takeover by a host with such a clock)
    quiet, clock behind   50 events/s for 8,000 s, the same shard behind

Each is a heap like the event table's with its primary key; each index is built on it in turn, and four range scans are
explained: 5 s, 5 s of one shard, an hour (20 s where the data has none), and the same range by the primary key for the
tenants of one shard. Buffers are what a query touched; `rows read` counts those that the recheck threw away, too.

The insert cost is measured apart: the index stands first, then commits of 500 rows arrive in turns over all variants.
`tail` is a scan of the last second afterwards, by the index (sequential scans are off), before any vacuum of the table: pages
that no vacuum and no autosummarize has summarised are read by every scan. Autosummarize is done by autovacuum's workers; its
naptime is 1 s here, a minute by default.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import asyncpg

from benchmarks.spikes.common import (
    EVENT_COLUMNS,
    SHARDS,
    cpu_seconds,
    head,
    median,
    payload,
    postgres,
    table,
)

ROWS = 400_000
TENANTS_A_SHARD = 8
INSERT_ROWS = 500
SUMMARIZE_SECONDS = 10.0
START_US = 1_795_000_000_000_000
INDEXES = {
    "none": "",
    "brin 128": "USING brin (sequence)",
    "brin 32": "USING brin (sequence) WITH (pages_per_range = 32)",
    "brin 8": "USING brin (sequence) WITH (pages_per_range = 8)",
    "brin 128 minmax_multi": "USING brin (sequence int8_minmax_multi_ops)",
    "btree": "USING btree (sequence)",
}
INSERTED = INDEXES | {
    "brin 128 autosummarize": "USING brin (sequence) WITH (autosummarize = on)",
    "brin 8 autosummarize": "USING brin (sequence) WITH (pages_per_range = 8, autosummarize = on)",
}


@dataclass(frozen=True, slots=True)
class DataSet:
    """How rows come. `late_seconds`: of one row a second; `behind_seconds`: of one shard from the middle on."""

    name: str
    per_second: int
    late_seconds: int = 0
    behind_seconds: int = 0


DATA_SETS = (
    DataSet("busy, in order", 5_000),
    DataSet("busy, late rows", 5_000, late_seconds=3),
    DataSet("busy, clock behind", 5_000, behind_seconds=5),
    DataSet("quiet, clock behind", 50, behind_seconds=5),
)


def create(name: str) -> str:
    """A heap with the columns and the key that matter, as one partition of the event table has them."""
    return f"""
        DROP TABLE IF EXISTS {name};
        CREATE TABLE {name} (LIKE event INCLUDING STORAGE INCLUDING DEFAULTS, PRIMARY KEY (tenant, sequence))
            WITH (autovacuum_enabled = off);
    """


async def fill(connection: Any, data: DataSet, rows: int) -> None:
    """Write the rows in their order of commit."""
    await connection.execute(create("log"))
    step_us = 1_000_000 / data.per_second
    await connection.execute(
        f"""
        INSERT INTO log (tenant, sequence, shard, type, time_us, targets, config_version, data)
        SELECT (shard + {SHARDS} * (i / {SHARDS} % {TENANTS_A_SHARD}))::integer, ((at - behind) << 10) + shard, shard,
            'sales_order.created', at, '{{1,2,3}}', 1, decode(repeat('20', 366), 'hex')
        FROM (
            SELECT i, {START_US} + (i * {step_us})::bigint AS at, ((i * 37) % {SHARDS})::smallint AS shard,
                -- Groups of 5 ms; within one the rows stand by shard, as frames do. A late row commits later.
                (i * {step_us})::bigint / 5000
                    + CASE WHEN {data.late_seconds} > 0 AND i % {data.per_second} = 17
                        THEN {data.late_seconds * 200} ELSE 0 END AS commit,
                CASE WHEN {data.behind_seconds} > 0 AND i > {rows // 2} AND (i * 37) % {SHARDS} = 5
                    THEN {data.behind_seconds * 1_000_000} ELSE 0 END AS behind
            FROM generate_series(0::bigint, {rows - 1}) AS i
        ) AS made
        ORDER BY commit, shard, i
        """
    )
    await connection.execute("VACUUM (ANALYZE, FREEZE) log")


@dataclass(frozen=True, slots=True)
class Scan:
    """One explained query."""

    buffers: int
    rows: int
    read: int
    ms: float
    node: str


async def explain(connection: Any, statement: str) -> Scan:
    """Run it twice (the first time warms the cache) and read the plan's figures."""
    plan: dict[str, Any] = {}
    for _ in range(2):
        text = await connection.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}")
        plan = json.loads(text)[0]
    top = plan["Plan"]
    scan = top
    while "Plans" in scan and scan["Node Type"] != "Bitmap Heap Scan":
        scan = scan["Plans"][0]
    loops = scan["Actual Loops"]
    dropped = scan.get("Rows Removed by Index Recheck", 0) + scan.get("Rows Removed by Filter", 0)
    return Scan(
        top["Shared Hit Blocks"] + top["Shared Read Blocks"],
        int(top["Actual Rows"]),
        int((scan["Actual Rows"] + dropped) * loops),
        plan["Execution Time"],
        scan["Node Type"],
    )


async def scans(connection: Any, data: DataSet, rows: int) -> dict[str, Scan]:
    """The range scans, in the later half, where clocks may be behind."""
    seconds = rows / data.per_second
    middle = START_US + int(seconds * 0.52 * 1e6)
    long = 3_600 if seconds > 7_600 else 20
    what = "SELECT sequence, tenant, targets FROM log WHERE"

    def between(width: float) -> str:
        upto = middle + int(width * 1e6)
        return f"sequence >= {middle << 10} AND sequence < {upto << 10}"

    tenants = ",".join(str(3 + SHARDS * n) for n in range(TENANTS_A_SHARD))
    return {
        "5 s": await explain(connection, f"{what} {between(5)}"),
        "5 s, shard": await explain(connection, f"{what} {between(5)} AND shard = 3"),
        f"{long} s": await explain(connection, f"{what} {between(long)}"),
        "5 s, key": await explain(
            connection, f"{what} {between(5)} AND tenant = ANY('{{{tenants}}}')"
        ),
    }


async def insert_turn(connection: Any, name: str, first: int, commits: int) -> tuple[float, int]:
    """Commit `commits` groups into table `name`; (CPU us of the backend, WAL bytes) a row."""
    data = payload(1)
    pid = connection.get_server_pid()
    groups = []
    for group in range(commits):
        rows = []
        for index in range(INSERT_ROWS):
            number = first + group * INSERT_ROWS + index
            shard = index * SHARDS // INSERT_ROWS
            at = START_US + number * 200
            tenant = shard + SHARDS * (index % TENANTS_A_SHARD)
            rows.append(
                (
                    tenant,
                    (at << 10) + shard,
                    shard,
                    "sales_order.created",
                    at,
                    None,
                    (1, 2, 3),
                    1,
                    data,
                )
            )
        groups.append(rows)
    wal = await connection.fetchval("SELECT (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint")
    cpu = cpu_seconds(pid)
    for rows in groups:
        await connection.copy_records_to_table(name, records=rows, columns=EVENT_COLUMNS)
    used = cpu_seconds(pid) - cpu
    wal = (
        await connection.fetchval("SELECT (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint")
        - wal
    )
    count = commits * INSERT_ROWS
    return used / count * 1e6, wal / count


async def measure_insert(connection: Any, turns: int, commits: int) -> None:
    """The cost of each index at insert, in turns; then a scan of what came last."""
    names = {variant: f"log_{number}" for number, variant in enumerate(INSERTED)}
    for variant, name in names.items():
        await connection.execute(create(name))
        if INSERTED[variant]:
            await connection.execute(f"CREATE INDEX ON {name} {INSERTED[variant]}")
    seen: dict[str, list[tuple[float, float]]] = defaultdict(list)
    order = list(names)
    for turn in range(turns):
        at = turn % len(order)
        for variant in order[at:] + order[:at]:
            first = turn * commits * INSERT_ROWS
            one = await insert_turn(connection, names[variant], first, commits)
            if turn:  # the first one fills caches and writes full pages
                seen[variant].append(one)
    await asyncio.sleep(SUMMARIZE_SECONDS)
    await connection.execute("SET enable_seqscan = off")
    rows = []
    last = START_US + turns * commits * INSERT_ROWS * 200
    base = median(cpu for cpu, _ in seen["none"])
    for variant, name in names.items():
        await connection.execute(f"ANALYZE {name}")
        tail = await explain(
            connection,
            f"SELECT sequence, tenant, targets FROM {name} WHERE sequence >= {(last - 1_000_000) << 10}",
        )
        size = await connection.fetchval(
            f"SELECT pg_indexes_size('{name}') - pg_relation_size('{name}_pkey')"
        )
        cpu = median(cpu for cpu, _ in seen[variant])
        rows.append(
            (
                variant, cpu, cpu / base, median(wal for _, wal in seen[variant]), size // 1024,
                tail.node, tail.buffers, tail.read, tail.rows,
            )
        )  # fmt: skip
        await connection.execute(f"DROP TABLE {name}")
    print(f"insert: commits of {INSERT_ROWS} rows, {turns - 1} turns of {commits} commits each")
    table(
        [
            "index", "backend CPU us a row", "ratio to none", "WAL bytes a row", "index KiB",
            "tail 1 s: plan", "buffers", "rows read", "rows",
        ],
        rows,
    )  # fmt: skip


async def run(quick: bool) -> None:  # noqa: FBT001 - the one option of every spike
    """Print the tables."""
    rows = 50_000 if quick else ROWS
    head("brin", f"BRIN on event.sequence after late rows, {rows:,} rows a data set")
    begin = time.perf_counter()
    settings = {
        "shared_buffers": "512MB",
        "max_parallel_workers_per_gather": "0",
        "autovacuum_naptime": "1s",
    }
    async with postgres(settings) as dsn:
        connection = await asyncpg.connect(dsn)
        try:
            for data in DATA_SETS:
                await fill(connection, data, rows)
                pages = await connection.fetchval("SELECT pg_relation_size('log') / 8192")
                told = []
                for index, text in INDEXES.items():
                    if text:
                        await connection.execute(f"CREATE INDEX log_extra ON log {text}")
                    for name, scan in (await scans(connection, data, rows)).items():
                        if index != "none" or name == "5 s, key":
                            told.append(
                                (
                                    index,
                                    name,
                                    scan.node,
                                    scan.buffers,
                                    scan.read,
                                    scan.rows,
                                    scan.ms,
                                )
                            )
                    if text:
                        await connection.execute("DROP INDEX log_extra")
                print(f"{data.name}: {data.per_second:,} events/s, heap of {pages:,} pages")
                table(
                    ["index", "range", "plan", "buffers", "rows read", "rows", "ms"],
                    _without_repeats(told),
                )
            await measure_insert(connection, *((2, 5) if quick else (6, 40)))
        finally:
            await connection.close()
    print(f"took {time.perf_counter() - begin:.0f} s")


def _without_repeats(told: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The scan by the primary key is told once: no other index changes it, or it is told why not."""
    first = next(row for row in told if row[1] == "5 s, key")
    return [row for row in told if row[1] != "5 s, key" or row is first or row[2:4] != first[2:4]]
