"""What every test may ask for. The Postgres server is started by the first test that needs a database."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

# Before anything imports gRPC: what it prints in a child between fork and exec would stand in that child's first words.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from tests.support.postgres import Database, PostgresServer, session_server

NEED_POSTGRES = frozenset({"postgres_server", "database", "empty_database"})


def pytest_sessionstart() -> None:
    """Say that there is no event loop yet; else asyncio makes one up when the plugin asks, and nobody closes it."""
    asyncio.set_event_loop(None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whoever asks for a database is marked as needing one: `-m "not postgres"` runs the rest."""
    for item in items:
        if NEED_POSTGRES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.postgres)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    with session_server() as server:
        yield server


@pytest.fixture
def database(postgres_server: PostgresServer) -> Iterator[Database]:
    """A migrated database that only this test uses."""
    with postgres_server.migrated() as database:
        yield database


@pytest.fixture
def empty_database(postgres_server: PostgresServer) -> Iterator[Database]:
    """A database without any table."""
    with postgres_server.empty() as database:
        yield database
