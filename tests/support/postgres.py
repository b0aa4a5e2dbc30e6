"""A Postgres for the tests: one server a session, a migrated template, and a database of its own for each test.

OUTRIDER_TEST_DATABASE_URL   use this server (15 or newer; the user must be able to create databases)
OUTRIDER_TEST_POSTGRES_BIN   start one from this folder of programs, for example a system's Postgres 15
neither                      start the embedded one
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from outrider_server.embedded import EmbeddedPostgres
from outrider_server.storage.migrate import migrate

OLDEST_VERSION = 150_000

T = TypeVar("T")


def run_apart(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` on a loop in a thread of its own: a fixture must not meddle with the loop of the test around it."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, work).result()


@dataclass(frozen=True)
class Database:
    """A database that belongs to one test."""

    name: str
    dsn: str = field(repr=False)  # holds the password


class PostgresServer:
    """Makes databases on one server, most of them by copying a template that is migrated once."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        # Several runs may share a given server.
        self._prefix = f"outrider_test_{os.getpid()}_{os.urandom(3).hex()}"
        self._made = 0
        self._template: str | None = None

    def dsn(self, database: str) -> str:
        return urlunsplit(urlsplit(self._dsn)._replace(path=f"/{database}"))

    @contextmanager
    def migrated(self) -> Iterator[Database]:
        if self._template is None:
            name = f"{self._prefix}_template"
            run_apart(self._create(name, ""))
            run_apart(self._migrate(name))
            self._template = name
        # Copying files takes half the time of logging every page, and nobody needs the copy after a crash.
        with self._database(f"TEMPLATE {self._template} STRATEGY file_copy") as database:
            yield database

    @contextmanager
    def empty(self) -> Iterator[Database]:
        with self._database("") as database:
            yield database

    def check(self) -> None:
        version = run_apart(self._version())
        if version < OLDEST_VERSION:
            raise RuntimeError(f"The tests need Postgres 15 or newer, this is {version // 10_000}.")

    def close(self) -> None:
        if self._template is not None:
            run_apart(self._drop(self._template))
            self._template = None

    @contextmanager
    def _database(self, options: str) -> Iterator[Database]:
        self._made += 1
        name = f"{self._prefix}_{self._made}"
        run_apart(self._create(name, options))
        try:
            yield Database(name, self.dsn(name))
        finally:
            run_apart(self._drop(name))

    async def _version(self) -> int:
        return int(await self._ask("SHOW server_version_num"))

    async def _create(self, name: str, options: str) -> None:
        await self._ask(f"CREATE DATABASE {name} {options}")

    async def _drop(self, name: str) -> None:
        # FORCE: a test that failed halfway may have left connections open.
        await self._ask(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    async def _migrate(self, name: str) -> None:
        connection = await asyncpg.connect(self.dsn(name))
        try:
            await migrate(connection)
        finally:
            await connection.close()

    async def _ask(self, statement: str) -> Any:
        connection = await asyncpg.connect(self._dsn)
        try:
            return await connection.fetchval(statement)
        finally:
            await connection.close()


@contextmanager
def state_folder() -> Iterator[Path]:
    """A folder for a launcher. Not pytest's: as root that one is closed to the account Postgres runs as, and its
    long names do not fit into a socket's path."""
    folder = Path(tempfile.mkdtemp(prefix="outrider-test-"))
    folder.chmod(0o755)
    try:
        yield folder / "state"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def bin_folder() -> Path | None:
    given = os.environ.get("OUTRIDER_TEST_POSTGRES_BIN")
    return Path(given) if given else None


@contextmanager
def session_server() -> Iterator[PostgresServer]:
    """The server the environment asks for. Only here durability is off: no test outlives its server's power."""
    if given := os.environ.get("OUTRIDER_TEST_DATABASE_URL"):
        yield from _serve(given)
        return
    settings = {
        "fsync": "off",
        "synchronous_commit": "on",
        "full_page_writes": "off",
        "shared_buffers": "64MB",
        "max_wal_size": "256MB",
        "max_connections": "200",
    }
    with (
        state_folder() as folder,
        EmbeddedPostgres(folder, bin_folder=bin_folder(), settings=settings) as address,
    ):
        yield from _serve(address.dsn)


def _serve(dsn: str) -> Iterator[PostgresServer]:
    server = PostgresServer(dsn)
    server.check()
    try:
        yield server
    finally:
        server.close()
