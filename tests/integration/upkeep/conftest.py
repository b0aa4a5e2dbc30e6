from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.node import RunningNode, running
from tests.support.postgres import Database


@pytest.fixture
async def node(database: Database, tmp_path: Path) -> AsyncIterator[RunningNode]:
    async with running(database.dsn, tmp_path) as node:
        yield node
