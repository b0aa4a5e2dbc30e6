"""Brings the database's tables to what this code needs: numbered SQL files, each applied once, in order.

The files are in dbmate's format and `schema_migrations` is dbmate's table, so dbmate can be used on the same
database; a table of our own beside it remembers what each file held. Every file runs in a transaction of its own,
whole or not at all, under one advisory lock: nodes that start together apply each file once between them.
What was applied may never change afterwards, and nothing runs against a database that is ahead of the code.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import asyncpg

MIGRATIONS = Path(__file__).parent / "migrations"

# Any constant of our own; taken for the length of one migration's transaction.
_ADVISORY_LOCK = 0x6F757472_69646572
_LOCK_SECONDS = 60.0
_FILE_NAME = re.compile(r"(\d{4})_[a-z0-9_]+\.sql")
_UP = re.compile(r"^-- *migrate:up(.*)$", re.MULTILINE)
_DOWN = re.compile(r"^-- *migrate:down.*$", re.MULTILINE)

_CREATE_TABLES = """
CREATE TABLE IF NOT EXISTS schema_migrations (version text PRIMARY KEY);
CREATE TABLE IF NOT EXISTS schema_migrations_checksum (
    version text PRIMARY KEY,
    file text NOT NULL,
    sha256 text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
);
"""


class MigrationError(Exception):
    """Base: why the database was left as it is, in one sentence for the person who starts the service."""


class MigrationFileError(MigrationError):
    """A file that is not a migration, or two or none of one number."""


class MigrationChangedError(MigrationError):
    """A file differs from what was applied."""


class MigrationGapError(MigrationError):
    """The database holds a later migration without an earlier one."""


class DatabaseTooNewError(MigrationError):
    """The database holds migrations that this code does not know."""


class MigrationFailedError(MigrationError):
    """Postgres refused the statements of a file."""


class MigrationLockError(MigrationError):
    """Somebody else held the lock for too long."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One file: its number as text, its name, the statements of its up part, the checksum of all of it."""

    version: str
    file: str
    up: str
    sha256: str


@dataclass(frozen=True, slots=True)
class SchemaStatus:
    """File names applied and still to apply, and the sentence that `migrate` would fail with, if any."""

    applied: tuple[str, ...]
    pending: tuple[str, ...]
    problem: str | None


def load_migrations(folder: Path = MIGRATIONS) -> list[Migration]:
    """The folder's files in order; they must be numbered 0001, 0002, ... without a gap."""
    migrations = [_parse(path) for path in sorted(folder.glob("*.sql"))]
    for number, migration in enumerate(migrations, start=1):
        if migration.version != f"{number:04}":
            raise MigrationFileError(
                f"Migration {migration.file} stands where number {number:04} belongs:"
                " number the files without gaps or doubles."
            )
    return migrations


def _parse(path: Path) -> Migration:
    name = _FILE_NAME.fullmatch(path.name)
    if name is None:
        raise MigrationFileError(
            f"{path.name} is no name of a migration: call it NNNN_what.sql, in small letters."
        )
    # A checkout with other line ends is the same migration.
    text = path.read_text(encoding="utf-8").replace("\r\n", "\n")
    up, down = _UP.search(text), _DOWN.search(text)
    if up is None or (down is not None and down.start() < up.end()):
        raise MigrationFileError(
            f"Migration {path.name} has no up part: begin its statements with a line -- migrate:up,"
            " before any -- migrate:down."
        )
    if up[1].strip():
        raise MigrationFileError(
            f"Migration {path.name} asks for{up[1].rstrip()}: remove it, each file is one transaction."
        )
    statements = text[up.end() : down.start() if down else len(text)]
    checksum = hashlib.sha256(text.encode()).hexdigest()
    return Migration(name[1], path.name, statements, checksum)


async def migrate(
    connection: asyncpg.Connection[asyncpg.Record],
    folder: Path = MIGRATIONS,
    *,
    lock_seconds: float = _LOCK_SECONDS,
) -> list[str]:
    """Apply what is pending; the names of the files applied here, none if another node was quicker."""
    migrations = load_migrations(folder)
    done: list[str] = []
    # One round per file and one that finds nothing left: the lock is let go with each transaction, so every
    # round looks anew at what is there.
    for _ in range(len(migrations) + 1):
        applied = await _apply_next(connection, migrations, lock_seconds)
        if applied is None:
            break
        done.append(applied)
    return done


async def status(
    connection: asyncpg.Connection[asyncpg.Record], folder: Path = MIGRATIONS
) -> SchemaStatus:
    """What is applied and what is not. Reads only, also in a database that was never migrated."""
    migrations = load_migrations(folder)
    known = await connection.fetchval(
        "SELECT to_regclass('schema_migrations_checksum') IS NOT NULL"
    )
    plain = await connection.fetchval("SELECT to_regclass('schema_migrations') IS NOT NULL")
    if known and plain:
        applied = await _read_applied(connection)
    elif plain:
        rows = await connection.fetch("SELECT version FROM schema_migrations")
        applied = {row["version"]: None for row in rows}
    else:
        applied = {}
    problem = None
    try:
        _check(migrations, applied)
    except MigrationError as error:
        problem = str(error)
    return SchemaStatus(
        applied=tuple(each.file for each in migrations if each.version in applied),
        pending=tuple(each.file for each in migrations if each.version not in applied),
        problem=problem,
    )


async def _apply_next(
    connection: asyncpg.Connection[asyncpg.Record],
    migrations: Sequence[Migration],
    lock_seconds: float,
) -> str | None:
    async with connection.transaction():
        await _lock(connection, lock_seconds)
        await connection.execute(_CREATE_TABLES)
        applied = await _read_applied(connection)
        _check(migrations, applied)
        for migration in migrations:
            if migration.version in applied:
                if applied[migration.version] is None:  # dbmate applied it and keeps no checksum
                    await _remember(connection, migration)
                continue
            await _apply(connection, migration)
            return migration.file
    return None


async def _lock(connection: asyncpg.Connection[asyncpg.Record], seconds: float) -> None:
    """Wait for other nodes that migrate, with a bound; the bound also holds for the locks a migration takes."""
    await connection.execute(f"SET LOCAL lock_timeout = {max(1, int(seconds * 1000))}")
    try:
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _ADVISORY_LOCK)
    except asyncpg.LockNotAvailableError:
        raise MigrationLockError(
            f"Another process has been migrating this database for {seconds:g} s: wait for it or end it,"
            " then start again."
        ) from None


async def _read_applied(
    connection: asyncpg.Connection[asyncpg.Record],
) -> dict[str, str | None]:
    """Version to checksum. dbmate's table decides: after its `down` our row may still be there."""
    rows = await connection.fetch(
        "SELECT version, sha256 FROM schema_migrations"
        " LEFT JOIN schema_migrations_checksum USING (version) ORDER BY version"
    )
    return {row["version"]: row["sha256"] for row in rows}


def _check(migrations: Sequence[Migration], applied: Mapping[str, str | None]) -> None:
    known = {migration.version for migration in migrations}
    if unknown := sorted(set(applied) - known):
        raise DatabaseTooNewError(
            f"The database holds migration {unknown[-1]}, which this version does not know:"
            " run the newer version that applied it, or restore a backup from before."
        )
    latest = max(applied, default="")
    for migration in migrations:
        if migration.version not in applied:
            if migration.version < latest:
                raise MigrationGapError(
                    f"The database holds migration {latest} but not {migration.file} before it:"
                    " restore a backup, or apply that file by hand and add its number to schema_migrations."
                )
        elif applied[migration.version] not in (None, migration.sha256):
            raise MigrationChangedError(
                f"Migration {migration.file} was changed after it was applied:"
                " restore the file as it was, and put the change into a new migration."
            )


async def _apply(connection: asyncpg.Connection[asyncpg.Record], migration: Migration) -> None:
    try:
        await connection.execute(migration.up)
    except asyncpg.PostgresError as error:
        raise MigrationFailedError(
            f"Migration {migration.file} failed and left nothing behind ({str(error).rstrip('.')}):"
            " correct the cause, then start again."
        ) from error
    await connection.execute(
        "INSERT INTO schema_migrations (version) VALUES ($1)", migration.version
    )
    await _remember(connection, migration)


async def _remember(connection: asyncpg.Connection[asyncpg.Record], migration: Migration) -> None:
    await connection.execute(
        "INSERT INTO schema_migrations_checksum (version, file, sha256) VALUES ($1, $2, $3)"
        " ON CONFLICT (version) DO UPDATE SET file = excluded.file, sha256 = excluded.sha256, applied_at = now()",
        migration.version,
        migration.file,
        migration.sha256,
    )
