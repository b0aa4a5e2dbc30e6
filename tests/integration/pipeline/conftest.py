from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.node import RunningNode, running
from tests.support.postgres import Database
from tests.support.receiver import Receiver


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver() as receiver:
        yield receiver


@pytest.fixture
async def node(database: Database, tmp_path: Path) -> AsyncIterator[RunningNode]:
    async with running(database.dsn, tmp_path) as node:
        yield node


@pytest.fixture
async def small_lanes(database: Database, tmp_path: Path) -> AsyncIterator[RunningNode]:
    """A node whose lanes hold ten deliveries."""
    async with running(database.dsn, tmp_path, lane_deliveries_max=10) as node:
        yield node
