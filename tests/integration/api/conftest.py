from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from tests.support.api import Api, running
from tests.support.postgres import Database


@pytest.fixture
async def api(database: Database) -> AsyncIterator[Api]:
    async with running(database.dsn) as api:
        yield api
