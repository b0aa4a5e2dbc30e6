from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest
from tests.support.postgres import Database


@pytest.fixture
async def connection(database: Database) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(
        database.dsn, server_settings={"application_name": "outrider/one/00000000/test"}
    )
    yield connection
    await connection.close()


@pytest.fixture
async def other(database: Database) -> AsyncIterator[asyncpg.Connection]:
    """A second connection."""
    connection = await asyncpg.connect(database.dsn)
    yield connection
    await connection.close()
