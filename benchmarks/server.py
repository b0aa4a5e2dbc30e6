"""The server under test: started from nothing on an own state folder, or one that runs already.

Rules: only loopback; a started one gets no setting from the surrounding environment but those that were asked for, so that
two runs of one command measure the same; its embedded Postgres keeps its own settings, flushing included.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg
import psutil

from benchmarks.children import Child, ChildFailed
from benchmarks.scrape import ScrapeError, get, scrape

START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 40.0
FSYNC_SETTINGS = ("fsync", "wal_sync_method", "synchronous_commit", "server_version")


class TargetError(ValueError):
    """A server that cannot be measured from here: said in one sentence."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a server is reached. `database` is the DSN, where it is known."""

    address: str
    key: str
    admin: tuple[str, int]
    database: str | None
    pid: int | None = None
    postmaster: int | None = None

    async def metrics(self) -> dict[str, float]:
        """Its counters and levels now."""
        return await scrape(*self.admin)


class Ledger:
    """Reads what is durable of this run's tenants, over a connection of its own."""

    def __init__(self, connection: Any, prefix: str) -> None:
        self._connection = connection
        self._prefix = prefix

    async def recorded(self) -> int:
        """Deliveries that records tell to be delivered."""
        statement = """
            SELECT coalesce(sum(pair.delivered), 0)::bigint
            FROM ledger, unnest(tenants, delivered) AS pair (tenant, delivered)
            JOIN tenant ON tenant.id = pair.tenant WHERE tenant.name LIKE $1
        """
        return int(await self._connection.fetchval(statement, self._prefix + "%"))

    async def settings(self) -> dict[str, str]:
        """How the database makes things durable."""
        return {
            name: str(await self._connection.fetchval(f"SHOW {name}")) for name in FSYNC_SETTINGS
        }

    async def close(self) -> None:
        """Close the connection."""
        await self._connection.close()


async def open_ledger(target: Target, mark: str) -> Ledger | None:
    """The ledger's reader, where the database can be reached."""
    if target.database is None:
        return None
    return Ledger(await asyncpg.connect(target.database, timeout=10), f"bench-{mark}-")


def require_loopback(address: str) -> tuple[str, int]:
    """Host and port of `address`. Receivers listen on loopback, so a server elsewhere could not reach them."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback or not port.isdigit():
        raise TargetError(
            f"{address} is not host:port on this machine; receivers listen on loopback only"
        )
    return host, int(port)


def environment(settings: dict[str, str]) -> dict[str, str]:
    """This process's environment without the server's settings, and with those that were asked for."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OUTRIDER_", "OTEL_", "GRPC_"))
    }
    return kept | {f"OUTRIDER_{name.upper()}": value for name, value in settings.items()}


class StartedServer:
    """A server of our own. `start`, use `target`, `stop`."""

    def __init__(
        self, folder: Path, settings: dict[str, str], workers: int, database: str | None
    ) -> None:
        self.target: Target
        self._folder = folder
        self._state = folder / "state"
        self._environment = environment(settings)
        self._workers = workers
        self._database = database
        self._child: Child | None = None

    async def start(self) -> Target:
        """Make the first key, then serve."""
        where = ["--state-folder", str(self._state)]
        if self._database is not None:
            where += ["--database-url", self._database]
        command = ["-m", "outrider_server"]
        listen, admin = _free_ports(2)
        serve = [*command, "serve", *where]
        serve += ["--workers", str(self._workers)]
        key_maker = await Child.start(
            "create-admin-key",
            [*command, "create-admin-key", *where],
            self._folder,
            self._environment,
        )
        try:
            key = (await key_maker.output(START_SECONDS_MAX)).strip().splitlines()[-1]
        finally:
            await key_maker.end(STOP_SECONDS_MAX)
        serve += [
            "--listen-address",
            f"127.0.0.1:{listen}",
            "--admin-address",
            f"127.0.0.1:{admin}",
        ]
        child = self._child = await Child.start("server", serve, self._folder, self._environment)
        await self._until_ready(child, admin)
        dsn, postmaster = self._database, None
        if dsn is None:
            dsn, postmaster = embedded_database(self._state)
        self.target = Target(
            f"127.0.0.1:{listen}", key, ("127.0.0.1", admin), dsn, child.pid, postmaster
        )
        return self.target

    async def stop(self) -> bool:
        """Drain and end it; True if it ended in order."""
        return self._child is not None and await self._child.end(STOP_SECONDS_MAX)

    def require_alive(self) -> None:
        """Raise if it is gone."""
        if self._child is not None and self._child.ended:
            raise ChildFailed(f"the server ended during the run{self._child.tail()}")

    def log(self) -> str:
        """The end of its log."""
        return self._child.tail() if self._child is not None else ""

    async def _until_ready(self, child: Child, admin: int) -> None:
        try:
            async with asyncio.timeout(START_SECONDS_MAX):
                while True:
                    if child.ended:
                        raise ChildFailed(f"the server did not start{child.tail()}")
                    status, text = 0, ""
                    with contextlib.suppress(ScrapeError):
                        status, text = await get("127.0.0.1", admin, "/readyz")
                    # All of them: tenants are made where there are fewest, of the nodes that are there.
                    if (
                        status == 200
                        and text.count("ready") - text.count("not ready") >= self._workers
                    ):
                        return
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise ChildFailed(
                f"the server was not ready after {START_SECONDS_MAX:.0f} s{child.tail()}"
            ) from None


def embedded_database(state: Path) -> tuple[str, int]:
    """DSN and process id of the Postgres that runs in a state folder."""
    pid, _, _, port, sockets, *_ = (state / "postgres" / "postmaster.pid").read_text().splitlines()
    password = (state / "postgres.password").read_text().strip()
    host = quote(sockets, safe="/")
    return (
        f"postgresql://outrider:{quote(password, safe='')}@/outrider?host={host}&port={port}",
        int(pid),
    )


def find_processes(port: int) -> tuple[int | None, int | None]:
    """The process that listens on a port, and the Postgres below it; None where it is not ours to see."""
    try:
        listening = [
            connection.pid
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
            and connection.laddr
            and connection.laddr.port == port
        ]
        pid = next((pid for pid in listening if pid), None)
        if pid is None:
            return None, None
        below = psutil.Process(pid).children(recursive=True)
        return pid, next((child.pid for child in below if child.name() == "postgres"), None)
    except psutil.Error:
        return None, None


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, all different."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
