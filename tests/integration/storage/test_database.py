"""The pool, dedicated connections, and what counts as a database that is away."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import NoReturn
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import asyncpg
import pytest
from tests.support import postgres

from outrider_server.storage.database import (
    APPLICATION_NAME_LENGTH_MAX,
    CannotConnect,
    Database,
    StorageUnavailable,
    application_name,
    boot_mark,
    connect,
    is_connection_lost,
    is_unavailable,
    translated,
)

BOOT = "0123456789abcdef0123456789abcdef"


async def test_connections_say_who_they_are(database: postgres.Database) -> None:
    own = await connect(database.dsn, "record", node="n", boot=BOOT)
    try:
        async with Database(database.dsn, node="n", boot=BOOT) as pool, pool.connection() as one:
            for connection, name in (
                (own, "outrider/n/01234567/record"),
                (one, "outrider/n/01234567/api"),
            ):
                assert await connection.fetchval("SHOW application_name") == name
                assert await connection.fetchval("SHOW timezone") == "UTC"
    finally:
        await own.close()


def test_long_names_lose_nothing_but_the_roles_end() -> None:
    name = application_name("n" * 40, BOOT, "record")
    assert len(name) <= APPLICATION_NAME_LENGTH_MAX
    assert name.startswith(f"outrider/{'n' * 40}/{boot_mark(BOOT)}/")
    for wrong in ("n" * 41, "a/b"):
        with pytest.raises(ValueError, match="node"):
            _ = application_name(wrong, BOOT, "record")


async def test_ended_backend_is_a_lost_connection(database: postgres.Database) -> None:
    connection = await connect(database.dsn, "record", node="n", boot=BOOT)
    pid = await connection.fetchval("SELECT pg_backend_pid()")
    async with Database(database.dsn, node="m", boot=BOOT) as pool:
        async with pool.connection() as other:
            _ = await other.execute("SELECT pg_terminate_backend($1)", pid)
        with pytest.raises(Exception) as caught:  # noqa: PT011 - which one it is depends on what arrives first
            _ = await connection.fetchval("SELECT 1")
        assert is_connection_lost(caught.value)
        with pytest.raises(asyncpg.InterfaceError) as again:
            _ = await connection.fetchval("SELECT 1")
        assert is_connection_lost(again.value)
        # The pool gets over it by itself.
        async with pool.connection() as other:
            mine = await other.fetchval("SELECT pg_backend_pid()")
        killer = await connect(database.dsn, "x", node="n", boot=BOOT)
        _ = await killer.execute("SELECT pg_terminate_backend($1, 1000)", mine)
        await killer.close()
        async with asyncio.timeout(10):
            while True:
                try:
                    async with pool.connection() as other:
                        assert await other.fetchval("SELECT 1") == 1
                        break
                except StorageUnavailable:
                    continue


async def test_errors_of_a_statement_stay_what_they_are(database: postgres.Database) -> None:
    async with Database(database.dsn, node="n", boot=BOOT) as pool:
        for statement, arguments in (("SELEC", ()), ("SELECT $1::int", ("x",)), ("SELECT 1/0", ())):
            with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError)) as caught:
                async with pool.connection() as connection:
                    _ = await connection.fetch(statement, *arguments)
            assert not is_unavailable(caught.value), statement


async def test_slow_statement_ends_at_its_limit_and_the_connection_lives(
    database: postgres.Database,
) -> None:
    async with Database(
        database.dsn, node="n", boot=BOOT, connections_max=1, statement_seconds_max=0.05
    ) as pool:
        with pytest.raises(StorageUnavailable) as caught:
            async with pool.connection() as connection:
                _ = await connection.fetch("SELECT pg_sleep(30)")
        assert (caught.value.reason, caught.value.retry_after_seconds) == ("STORAGE_UNAVAILABLE", 1)
        assert not is_connection_lost(caught.value.__cause__ or ValueError())
        async with pool.connection() as connection:
            assert await connection.fetchval("SELECT 1") == 1


async def test_pool_is_bounded_and_waiting_for_it_too(database: postgres.Database) -> None:
    async with (
        Database(
            database.dsn, node="n", boot=BOOT, connections_max=1, wait_seconds_max=0.05
        ) as pool,
        pool.connection(),
    ):
        with pytest.raises(StorageUnavailable):
            async with pool.connection():
                pass


async def test_pool_opens_without_a_database_and_then_says_so() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    dsn = f"postgresql://u:p@127.0.0.1:{port}/none"
    async with Database(dsn, node="n", boot=BOOT) as pool:
        with pytest.raises(StorageUnavailable):
            async with pool.connection():
                pass
        assert "p@" not in repr(pool)
    with pytest.raises(StorageUnavailable):
        _ = await connect(dsn, "record", node="n", boot=BOOT)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"database": "nowhere"}, 'database "nowhere" does not exist'),
        ({"password": "wrong-s3cret"}, "password authentication failed"),
        ({"host": "/nowhere-at-all"}, "No such file or directory"),
        ({"host": "a..b"}, ""),
        ({"host": "127.0.0.1", "port": "notaport"}, "notaport"),
    ],
)
async def test_a_connection_that_cannot_be_made_says_where_to_and_why_but_no_password(
    database: postgres.Database, change: dict[str, str], says: str
) -> None:
    parts = urlsplit(database.dsn)
    query = dict(parse_qsl(parts.query))
    given = {
        "host": parts.hostname or query.get("host", ""),
        "port": str(parts.port or query.get("port", 5432)),
        "user": unquote(parts.username or ""),
        "password": unquote(parts.password or ""),
        "database": database.name,
        **change,
    }
    if "password" in change and not parts.password:
        pytest.skip("this server asks for no password")
    who = f"{quote(given['user'], safe='')}:{quote(given['password'], safe='')}"
    dsn = (
        f"postgresql://{who}@/{given['database']}?host={quote(given['host'])}&port={given['port']}"
    )
    with pytest.raises(CannotConnect) as caught:
        _ = await connect(dsn, "record", node="n", boot=BOOT)
    text = str(caught.value)
    assert text.startswith(
        f"cannot connect to {given['host']}:{given['port']}/{given['database']}: "
    )
    assert says in caught.value.why
    assert caught.value.why
    assert "\n" not in text
    assert given["password"] not in text


@pytest.mark.parametrize(
    ("dsn", "place"),
    [
        ("postgresql://u:s3cret@127.0.0.1:1/d", "127.0.0.1:1/d"),
        ("postgresql://u:s3/cret@127.0.0.1:1/d", "the database"),
        ("postgresql://u:s3[cret@127.0.0.1:1/d", "the database"),
    ],
)
async def test_a_password_that_is_not_escaped_is_not_shown_as_a_place(dsn: str, place: str) -> None:
    with pytest.raises(CannotConnect) as caught:
        _ = await connect(dsn, "record", node="n", boot=BOOT)
    assert caught.value.place == place
    assert "cret" not in str(caught.value)


async def test_an_unknown_host_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> NoReturn:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(
        CannotConnect, match=r"^cannot connect to db:1/d: Name or service not known$"
    ):
        _ = await connect("postgresql://u:p@db:1/d", "record", node="n", boot=BOOT)


async def test_dry_run_and_failed_transactions_leave_nothing(database: postgres.Database) -> None:
    insert = "INSERT INTO tenant (name, shard, shards) VALUES ('a', 0, '{0}')"
    async with Database(database.dsn, node="n", boot=BOOT) as pool:
        async with pool.transaction(dry_run=True) as connection:
            _ = await connection.execute(insert)
        with contextlib.suppress(ZeroDivisionError):
            async with pool.transaction() as connection:
                _ = await connection.execute(insert)
                raise ZeroDivisionError
        async with pool.connection() as connection:
            assert await connection.fetchval("SELECT count(*) FROM tenant") == 0
        async with pool.transaction() as connection:
            _ = await connection.execute(insert)
        async with pool.connection() as connection:
            assert await connection.fetchval("SELECT count(*) FROM tenant") == 1


@pytest.mark.parametrize(
    ("error", "lost", "unavailable"),
    [
        (asyncpg.AdminShutdownError(), True, True),
        (asyncpg.CrashShutdownError(), True, True),
        (asyncpg.CannotConnectNowError(), True, True),
        (asyncpg.ConnectionDoesNotExistError(), True, True),
        (ConnectionResetError(), True, True),
        (asyncpg.InterfaceError("connection is closed"), True, True),
        (asyncpg.InterfaceError("another operation is in progress"), False, False),
        (asyncpg.TooManyConnectionsError(), False, True),
        (asyncpg.DiskFullError(), False, True),
        (asyncpg.DeadlockDetectedError(), False, True),
        (asyncpg.QueryCanceledError(), False, True),
        (asyncpg.ReadOnlySQLTransactionError(), False, True),
        (TimeoutError(), False, True),
        (asyncpg.UniqueViolationError(), False, False),
        (asyncpg.DataError("connection is closed"), False, False),
        (ValueError("closed"), False, False),
    ],
)
def test_errors_are_told_apart(error: Exception, lost: bool, unavailable: bool) -> None:
    assert is_connection_lost(error) == lost
    assert is_unavailable(error) == unavailable
    with pytest.raises(StorageUnavailable if unavailable else type(error)), translated():
        raise error
