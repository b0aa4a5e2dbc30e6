"""How long a node takes to take up the configuration of 5,000 tenants: where the time of a start goes.

5,000 tenants over 64 shards, 2 endpoints and 5 subscriptions each, all with a filter. Filters of two kinds, because nodes
generate a function from each distinct one: `alike`, where every tenant has the same five (they came from templates), and
`distinct`, where every subscription compares with a number of its own.

Steps: `load` is `storage.configuration.load_shards` of all shards; `directory` builds every tenant's index; `configure` is
`Obligations.configure` of every tenant. `share` (not part of a start) builds the indexes with the filters of the tenant before
at hand, which shows what it would save to generate equal filters of different tenants once. Each turn starts from nothing in
this process. At the end each step is profiled (the
profiler's own cost is in those shares).
"""

from __future__ import annotations

import asyncio
import cProfile
import gc
import io
import os
import pstats
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import asyncpg

from benchmarks.spikes.common import SHARDS, Probe, cpu_seconds, head, median, postgres, table
from outrider_server.domain.tenant import TenantConfiguration
from outrider_server.matching.filter import check_filter
from outrider_server.matching.index import Index
from outrider_server.pipeline.match import Directory
from outrider_server.policy.obligations import Obligations
from outrider_server.policy.plans import Limits
from outrider_server.secrets import keys
from outrider_server.secrets.sealing import Sealer
from outrider_server.storage import configuration, endpoints

TENANTS = 5_000
ENDPOINTS = 2
SUBSCRIPTIONS = 5
TURNS = 3
COLLECTOR_THRESHOLD = 10_000
KINDS = ("alike", "distinct")
PROFILE_LINES = 14


def filter_text(kind: str, tenant: int, index: int) -> str:
    """A simple filter."""
    number = index if kind == "alike" else tenant * SUBSCRIPTIONS + index
    return f'order.total > {number} && order.status != "draft"'


async def fill(connection: Any, sealer: Sealer, kind: str, tenants: int) -> None:
    """Write the configuration by whole tables. Each filter's AST is checked once per text form and number."""
    await connection.execute("TRUNCATE tenant, endpoint, subscription CASCADE")
    of_alike = [check_filter(filter_text("alike", 0, i)).ast for i in range(SUBSCRIPTIONS)]
    tenant_rows, endpoint_rows, subscription_rows = [], [], []
    for tenant in range(1, tenants + 1):
        shard = tenant % SHARDS
        tenant_rows.append((tenant, f"tenant-{tenant}", shard, [shard]))
        for index in range(ENDPOINTS):
            endpoint = tenant * ENDPOINTS + index
            spec = endpoints.EndpointSpec(
                url=f"https://receiver-{tenant}.example.com/hook/{index}",
                secrets=(endpoints.SigningSecret(b"k" * 32),),
            )
            # As `endpoints.create` writes a row, without a statement each.
            settings = endpoints._settings(spec)  # noqa: SLF001
            sealed = endpoints._sealed(sealer, tenant, endpoint, spec)  # noqa: SLF001
            endpoint_rows.append((endpoint, tenant, f"endpoint-{index}", settings, sealed))
        for index in range(SUBSCRIPTIONS):
            text = filter_text(kind, tenant, index)
            ast = of_alike[index] if kind == "alike" else check_filter(text).ast
            subscription_rows.append(
                (tenant * SUBSCRIPTIONS + index, tenant, f"subscription-{index}",
                 tenant * ENDPOINTS + index % ENDPOINTS, [f"sales.type_{index}"], text, ast)
            )  # fmt: skip
    for name, rows, columns in (
        ("tenant", tenant_rows, ("id", "name", "shard", "shards")),
        ("endpoint", endpoint_rows, ("id", "tenant", "name", "settings", "sealed")),
        (
            "subscription",
            subscription_rows,
            ("id", "tenant", "name", "endpoint", "types", "filter", "filter_ast"),
        ),
    ):
        await connection.copy_records_to_table(name, records=rows, columns=columns)
    await connection.execute("ANALYZE")


class Start:
    """One start: the steps, each measured."""

    def __init__(self, connection: Any, sealer: Sealer) -> None:
        self.connection = connection
        self.sealer = sealer
        self.configurations: list[TenantConfiguration] = []
        self.directory = Directory()
        self.obligations = Obligations(Limits())

    async def load(self) -> None:
        """Read everything."""
        self.configurations = await configuration.load_shards(
            self.connection, self.sealer, range(SHARDS)
        )

    def index(self) -> None:
        """Build every tenant's index."""
        for each in self.configurations:
            self.directory.replace(each)

    def share(self) -> None:
        """As `index`, but a filter that any tenant has is generated once in the node: what that would save."""
        known: Index | None = None
        for each in self.configurations:
            known = Index.build(each.subscriptions, previous=known)

    def configure(self) -> None:
        """Make lanes and routes."""
        for each in self.configurations:
            tenant = each.tenant
            self.obligations.configure(tenant.shard, tenant.id, each.endpoints, each.subscriptions)


def _profiled(run: Callable[[], object]) -> str:
    profile = cProfile.Profile()
    profile.runcall(run)
    return _told(profile)


def _told(profile: cProfile.Profile) -> str:
    text = io.StringIO()
    pstats.Stats(profile, stream=text).strip_dirs().sort_stats("tottime").print_stats(PROFILE_LINES)
    lines = [line for line in text.getvalue().splitlines() if line.strip()]
    return "\n".join(lines[:1] + lines[3:])


async def run(quick: bool) -> None:  # noqa: FBT001 - the one option of every spike
    """Print the table and the profiles."""
    turns, tenants = (1, 500) if quick else (TURNS, TENANTS)
    head(
        "many",
        f"{tenants:,} tenants over {SHARDS} shards, {ENDPOINTS} endpoints and {SUBSCRIPTIONS} subscriptions each",
    )
    gc.set_threshold(COLLECTOR_THRESHOLD)
    sealer = Sealer(keys.KeyRing((keys.KeyEncryptionKey.of(b"k" * keys.KEY_BYTES),)), os.urandom)
    rows: list[tuple[Any, ...]] = []
    profiles: list[str] = []
    async with postgres() as dsn:
        connection = await asyncpg.connect(dsn)
        try:
            for kind in KINDS:
                await fill(connection, sealer, kind, tenants)
                rows += await _turns(connection, sealer, kind, turns)
                profiles += await _profile(connection, sealer, kind)
        finally:
            await connection.close()
    print(f"medians of {turns} turns")
    table(
        ["filters", "step", "seconds", "own CPU s", "backend CPU s", "loop held at most, ms"], rows
    )
    print("\n\n".join(profiles))


async def _turns(connection: Any, sealer: Sealer, kind: str, turns: int) -> list[tuple[Any, ...]]:
    seen: dict[str, list[tuple[float, float, float, float]]] = defaultdict(list)
    pid = connection.get_server_pid()
    for _ in range(turns):
        gc.collect()
        start = Start(connection, sealer)
        for name in ("load", "index", "share", "configure"):
            cpu, backend, begin = time.process_time(), cpu_seconds(pid), time.perf_counter()
            async with Probe() as probe:
                if name == "load":
                    await start.load()
                else:
                    getattr(start, name)()
                seconds = time.perf_counter() - begin
            seen[name].append(
                (
                    seconds,
                    time.process_time() - cpu,
                    cpu_seconds(pid) - backend,
                    probe.longest_ms,
                )
            )
    told: list[tuple[Any, ...]] = [
        (kind, name, *(median(column) for column in zip(*turns_of, strict=True)))
        for name, turns_of in seen.items()
    ]
    whole = [sum(row[column] for row in told if row[1] != "share") for column in (2, 3, 4)]
    return [*told, (kind, "all", *whole, "")]


async def _profile(connection: Any, sealer: Sealer, kind: str) -> list[str]:
    start = Start(connection, sealer)
    profile = cProfile.Profile()
    profile.enable()
    await start.load()
    profile.disable()
    told = [f"{kind}, load: {_told(profile)}"]
    told.append(f"{kind}, index: {_profiled(start.index)}")
    told.append(f"{kind}, configure: {_profiled(start.configure)}")
    await asyncio.sleep(0)
    return told
