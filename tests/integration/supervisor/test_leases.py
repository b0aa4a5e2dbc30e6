"""What a supervisor writes about its nodes: the dead one's lease ends, by its boot; a database that is away costs a moment."""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import AsyncIterator

import asyncpg
import pytest
from structlog.testing import capture_logs
from tests.support.postgres import Database

from outrider_server.supervisor.leases import DatabaseLeases


@pytest.fixture
async def connection(database: Database) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    made = await asyncpg.connect(database.dsn)
    yield made
    await made.close()


@pytest.fixture
async def leases(database: Database) -> AsyncIterator[DatabaseLeases]:
    made = DatabaseLeases(database.dsn, name="host", boot=str(uuid.uuid4()))
    yield made
    await made.close()


async def add_node(connection: asyncpg.Connection[asyncpg.Record], name: str) -> None:
    await connection.execute(
        "INSERT INTO node (name, boot, address, expires_at)"
        " VALUES ($1, gen_random_uuid(), 'a:1', now() + interval '1 hour')",
        name,
    )


async def live(connection: asyncpg.Connection[asyncpg.Record]) -> set[str]:
    rows = await connection.fetch("SELECT name FROM node WHERE expires_at > now()")
    return {row["name"] for row in rows}


async def test_only_the_dead_nodes_lease_ends(
    connection: asyncpg.Connection[asyncpg.Record], leases: DatabaseLeases
) -> None:
    for name in ("host.1", "host.2", "host.12"):
        await add_node(connection, name)
    await leases.expire("host.1")
    assert await live(connection) == {"host.2", "host.12"}
    await leases.expire("host.3")
    assert await live(connection) == {"host.2", "host.12"}


async def test_a_node_whose_lease_was_ended_can_take_it_again(
    connection: asyncpg.Connection[asyncpg.Record], leases: DatabaseLeases
) -> None:
    await add_node(connection, "host.1")
    await leases.expire("host.1")
    await connection.execute(
        "UPDATE node SET boot = gen_random_uuid(), expires_at = now() + interval '1 hour'"
    )
    assert await live(connection) == {"host.1"}


async def test_nodes_are_said_to_drain_before_they_are_stopped(
    connection: asyncpg.Connection[asyncpg.Record], leases: DatabaseLeases
) -> None:
    for name in ("host.1", "host.2", "other.1"):
        await add_node(connection, name)
    await leases.set_draining(["host.1", "host.2"])
    rows = await connection.fetch("SELECT name FROM node WHERE draining ORDER BY name")
    assert [row["name"] for row in rows] == ["host.1", "host.2"]


async def test_an_older_schema_is_left_alone_without_a_word(empty_database: Database) -> None:
    leases = DatabaseLeases(empty_database.dsn, name="host", boot=str(uuid.uuid4()))
    with capture_logs() as lines:
        await leases.expire("host.1")
        await leases.set_draining(["host.1"])
    await leases.close()
    assert lines == []


async def test_a_lost_connection_is_made_again(
    connection: asyncpg.Connection[asyncpg.Record], leases: DatabaseLeases
) -> None:
    await add_node(connection, "host.1")
    await leases.set_draining([])
    ended = await connection.fetchval(
        "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity"
        " WHERE application_name LIKE 'outrider/host/%/supervisor'"
    )
    assert ended == 1
    await leases.expire("host.1")
    if await live(connection):  # the loss may be noticed only by that statement
        await leases.expire("host.1")
    assert await live(connection) == set()


async def test_a_database_that_does_not_answer_costs_a_bounded_moment() -> None:
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as silent, capture_logs() as lines:
        port = silent.getsockname()[1]
        leases = DatabaseLeases(f"postgresql://u:secret@127.0.0.1:{port}/d", name="host", boot="b")
        began = loop.time()
        await leases.expire("host.1")
        assert loop.time() - began < 5
        await leases.close()
    (line,) = lines
    assert (line["event"], line["node"]) == ("lease.not_expired", "host.1")
    assert "secret" not in str(line)
