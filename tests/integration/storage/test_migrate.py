"""The runner's promises, on a real server and with migrations of the test's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
from tests.support.postgres import Database

from outrider_server.storage.migrate import (
    DatabaseTooNewError,
    MigrationChangedError,
    MigrationFailedError,
    MigrationFileError,
    MigrationGapError,
    MigrationLockError,
    load_migrations,
    migrate,
    status,
)

FIRST = "-- migrate:up\nCREATE TABLE a (x int);\nINSERT INTO a VALUES (1);\n-- migrate:down\nDROP TABLE a;\n"
SECOND = "-- migrate:up\nALTER TABLE a ADD COLUMN y int;\n-- migrate:down\nALTER TABLE a DROP COLUMN y;\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "0001_first.sql").write_text(FIRST)
    (tmp_path / "0002_second.sql").write_text(SECOND)
    return tmp_path


@pytest.fixture
async def connection(empty_database: Database) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(empty_database.dsn)
    yield connection
    await connection.close()


def assert_sentence(error: BaseException) -> None:
    text = str(error)
    assert text.endswith(".")
    assert ": " in text
    assert "\n" not in text


async def test_applies_what_is_pending_once_and_in_order(
    connection: asyncpg.Connection, folder: Path
) -> None:
    assert await migrate(connection, folder) == ["0001_first.sql", "0002_second.sql"]
    assert await migrate(connection, folder) == []
    assert await connection.fetch("SELECT x, y FROM a") == [(1, None)]
    # dbmate's own table, in its form.
    assert await connection.fetch("SELECT * FROM schema_migrations ORDER BY 1") == [
        ("0001",),
        ("0002",),
    ]


async def test_a_new_file_is_applied_to_an_older_database(
    connection: asyncpg.Connection, folder: Path
) -> None:
    await migrate(connection, folder)
    (folder / "0003_third.sql").write_text("-- migrate:up\nCREATE TABLE c ();\n")
    assert await migrate(connection, folder) == ["0003_third.sql"]


async def test_a_failing_file_leaves_nothing_behind_and_keeps_those_before_it(
    connection: asyncpg.Connection, folder: Path
) -> None:
    (folder / "0002_second.sql").write_text(
        "-- migrate:up\nCREATE TABLE b ();\nSELECT no_such_thing;\n-- migrate:down\n"
    )
    with pytest.raises(MigrationFailedError, match=r"0002_second\.sql.*no_such_thing") as raised:
        await migrate(connection, folder)
    assert_sentence(raised.value)
    assert await connection.fetchval("SELECT to_regclass('b')") is None
    assert await connection.fetchval("SELECT count(*) FROM a") == 1
    (folder / "0002_second.sql").write_text(SECOND)
    assert await migrate(connection, folder) == ["0002_second.sql"]


async def test_nodes_that_start_together_apply_each_file_once_between_them(
    empty_database: Database, folder: Path
) -> None:
    connections = [await asyncpg.connect(empty_database.dsn) for _ in range(5)]
    try:
        done = await asyncio.gather(*(migrate(each, folder) for each in connections))
        assert sorted(file for each in done for file in each) == [
            "0001_first.sql",
            "0002_second.sql",
        ]
        assert await connections[0].fetchval("SELECT count(*) FROM a") == 1
    finally:
        for each in connections:
            await each.close()


async def test_waiting_for_another_migrator_has_an_end(
    empty_database: Database, connection: asyncpg.Connection, folder: Path
) -> None:
    other = await asyncpg.connect(empty_database.dsn)
    try:
        async with other.transaction():
            # Hold what a migrator holds, by being one in the middle of its work.
            await other.execute("SELECT pg_advisory_xact_lock($1)", 0x6F757472_69646572)
            with pytest.raises(MigrationLockError) as raised:
                await migrate(connection, folder, lock_seconds=0.05)
        assert_sentence(raised.value)
        assert await migrate(connection, folder) == ["0001_first.sql", "0002_second.sql"]
    finally:
        await other.close()


async def test_the_lock_limit_does_not_stay_on_the_connection(
    connection: asyncpg.Connection, folder: Path
) -> None:
    before = await connection.fetchval("SHOW lock_timeout")
    await migrate(connection, folder, lock_seconds=7)
    assert await connection.fetchval("SHOW lock_timeout") == before


async def test_an_applied_file_must_not_change(
    connection: asyncpg.Connection, folder: Path
) -> None:
    await migrate(connection, folder)
    (folder / "0001_first.sql").write_text(FIRST + "-- a word more\n")
    with pytest.raises(MigrationChangedError, match=r"0001_first\.sql") as raised:
        await migrate(connection, folder)
    assert_sentence(raised.value)
    assert (await status(connection, folder)).problem == str(raised.value)


async def test_other_line_ends_are_no_change(connection: asyncpg.Connection, folder: Path) -> None:
    await migrate(connection, folder)
    (folder / "0001_first.sql").write_bytes(FIRST.replace("\n", "\r\n").encode())
    assert await migrate(connection, folder) == []


async def test_a_database_ahead_of_the_code_is_refused(
    connection: asyncpg.Connection, folder: Path
) -> None:
    await migrate(connection, folder)
    (folder / "0002_second.sql").unlink()
    with pytest.raises(DatabaseTooNewError, match="0002") as raised:
        await migrate(connection, folder)
    assert_sentence(raised.value)


async def test_a_missing_earlier_migration_is_refused(
    connection: asyncpg.Connection, folder: Path
) -> None:
    await migrate(connection, folder)
    await connection.execute("DELETE FROM schema_migrations WHERE version = '0001'")
    with pytest.raises(MigrationGapError, match=r"0001_first\.sql") as raised:
        await migrate(connection, folder)
    assert_sentence(raised.value)


async def test_what_dbmate_applied_is_taken_over_with_its_checksum(
    connection: asyncpg.Connection, folder: Path
) -> None:
    await connection.execute(
        "CREATE TABLE schema_migrations (version varchar(128) PRIMARY KEY);"
        "INSERT INTO schema_migrations VALUES ('0001'); CREATE TABLE a (x int)"
    )
    before = await status(connection, folder)
    assert (before.applied, before.pending, before.problem) == (
        ("0001_first.sql",),
        ("0002_second.sql",),
        None,
    )
    assert await migrate(connection, folder) == ["0002_second.sql"]
    (folder / "0001_first.sql").write_text(FIRST + "\n")
    with pytest.raises(MigrationChangedError):
        await migrate(connection, folder)


async def test_what_dbmate_took_back_is_applied_again(
    connection: asyncpg.Connection, folder: Path
) -> None:
    await migrate(connection, folder)
    await connection.execute(
        "ALTER TABLE a DROP COLUMN y; DELETE FROM schema_migrations WHERE version = '0002'"
    )
    (folder / "0002_second.sql").write_text(SECOND + "-- better\n")
    assert await migrate(connection, folder) == ["0002_second.sql"]
    assert (await status(connection, folder)).problem is None


async def test_status_reads_only(connection: asyncpg.Connection, folder: Path) -> None:
    fresh = await status(connection, folder)
    assert (fresh.applied, fresh.pending) == ((), ("0001_first.sql", "0002_second.sql"))
    assert await connection.fetchval("SELECT to_regclass('schema_migrations')") is None
    await migrate(connection, folder)
    done = await status(connection, folder)
    assert (done.applied, done.pending) == (("0001_first.sql", "0002_second.sql"), ())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("0003_Upper.sql", FIRST),
        ("3_short.sql", FIRST),
        ("0004_gap.sql", FIRST),
        ("0002_double.sql", FIRST),
        ("0003_unmarked.sql", "CREATE TABLE c ();"),
        ("0003_swapped.sql", "-- migrate:down\n-- migrate:up\nSELECT 1;\n"),
        ("0003_option.sql", "-- migrate:up transaction:false\nSELECT 1;\n"),
    ],
)
def test_a_file_that_is_no_migration_is_named(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(MigrationFileError) as raised:
        load_migrations(folder)
    assert_sentence(raised.value)
    # Of two files with one number, the one that comes second is in the way.
    assert (name if name != "0002_double.sql" else "0002_second.sql") in str(raised.value)


async def test_the_services_own_migrations_apply_to_this_server(database: Database) -> None:
    connection = await asyncpg.connect(database.dsn)
    try:
        found = await status(connection)
        assert found.applied
        assert not found.pending
        assert found.problem is None
    finally:
        await connection.close()
