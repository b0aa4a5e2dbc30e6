"""What the spikes share: an embedded Postgres in a temporary folder, CPU time of other processes, tables, a bound in time.

Rule: figures are CPU time where there is a choice, and variants take turns in one run, so that other work on the machine
meets all of them; what is reported is the median of the turns and the ratio to a variant named in the table.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg

from benchmarks.machine import describe, pin
from outrider_server.embedded import EmbeddedPostgres
from outrider_server.storage import partitions
from outrider_server.storage.migrate import migrate

CPUS = 2
PAYLOAD_BYTES = 366
SHARDS = 64
EVENT_COLUMNS = (
    "tenant", "sequence", "shard", "type", "time_us", "key", "targets", "config_version", "data",
)  # fmt: skip
PARTITION_HOURS = 24.0
LOCK_MS_MAX = 5_000


def payload(number: int, size: int = PAYLOAD_BYTES) -> bytes:
    """A JSON object of `size` bytes that no two numbers share."""
    head = b'{"number":%019d,"order":{"total":150,"status":"open"},"note":"' % number
    return head + b"x" * (size - len(head) - 2) + b'"}'


@asynccontextmanager
async def postgres(settings: dict[str, str] | None = None) -> AsyncIterator[str]:
    """The DSN of a migrated database in a temporary folder, with partitions for now; gone after the block."""
    with tempfile.TemporaryDirectory(prefix="outrider-spike-") as folder:
        # Started by root, Postgres runs as another user, who must get through.
        await asyncio.to_thread(Path(folder).chmod, 0o711)
        server = EmbeddedPostgres(Path(folder) / "state", settings=settings)
        address = await asyncio.to_thread(server.start)
        try:
            connection = await asyncpg.connect(address.dsn)
            try:
                await migrate(connection)
                for table in partitions.partitioned_tables(PARTITION_HOURS):
                    await partitions.ensure(connection, table, now_us(), 1, LOCK_MS_MAX)
            finally:
                await connection.close()
            yield address.dsn
        finally:
            await asyncio.to_thread(server.stop)


def now_us() -> int:
    """Microseconds since 1970 UTC."""
    return time.time_ns() // 1000


def cpu_seconds(pid: int) -> float:
    """CPU time of a process with one thread, such as a Postgres backend, to the nanosecond."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def median(values: Iterable[float]) -> float:
    """The middle value."""
    return statistics.median(values)


class Probe:
    """How long the event loop was held: the longest time beyond a millisecond's sleep, and all beyond five."""

    def __init__(self) -> None:
        self.longest_ms = 0.0
        self.over_5_ms = 0
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Probe:
        self._task = asyncio.get_running_loop().create_task(self._run())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        await asyncio.sleep(0.003)  # a block at the very end is seen too
        self._task.cancel()

    async def _run(self) -> None:
        while True:
            begin = time.perf_counter()
            await asyncio.sleep(0.001)
            late_ms = (time.perf_counter() - begin) * 1000 - 1
            self.longest_ms = max(self.longest_ms, late_ms)
            self.over_5_ms += late_ms > 5


def head(name: str, question: str) -> None:
    """Say what is measured, when and on what; keep to the two CPUs that every benchmark keeps to."""
    with tempfile.TemporaryDirectory() as folder:
        machine = describe(pin(CPUS), Path(folder))
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    print(f"# {name}: {question}")
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {machine.cpu}, {len(machine.cpus_used)} CPUs, {machine.kernel}, {machine.python},"
        f" {packages}, a flush takes {machine.flush_ms:.2f} ms\n"
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))
    for row in rows:
        print("| " + " | ".join(_text(value) for value in row) + " |")
    print(flush=True)


def _text(value: object) -> str:
    if isinstance(value, float):
        value = value if abs(value) > 1e-9 else 0.0
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
