"""What the node is told of changes, whichever way they end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from tests.support import postgres

from outrider_server.api.tenancy import Tenancy, not_found
from outrider_server.storage.database import Database, StorageUnavailable


@pytest.fixture
async def storage(database: postgres.Database) -> AsyncIterator[Database]:
    async with Database(database.dsn, node="test", boot="0") as storage:
        yield storage


@pytest.mark.parametrize(
    ("end", "told"),
    [
        (None, [7]),
        (StorageUnavailable(), [7]),  # it may have been committed
        (asyncio.CancelledError(), [7]),  # so may a call that its caller gave up
        (not_found("tenants/x"), []),
        (RuntimeError("a bug"), []),
    ],
)
async def test_node_is_told_of_all_that_may_have_been_committed(
    storage: Database, end: BaseException | None, told: list[int]
) -> None:
    heard: list[int] = []

    async def changed(tenant: int) -> None:
        heard.append(tenant)

    raised: BaseException | None = None
    try:
        async with Tenancy(storage, changed).work(dry_run=False) as work:
            work.tenant = 7
            if end is not None:
                raise end
    except BaseException as error:  # noqa: BLE001 - the point is which one
        raised = error
    assert raised is end
    assert heard == told


async def test_node_is_told_before_the_change_ends_and_not_of_dry_runs(storage: Database) -> None:
    heard: list[int] = []

    async def changed(tenant: int) -> None:
        await asyncio.sleep(0)
        heard.append(tenant)

    tenancy = Tenancy(storage, changed)
    async with tenancy.work(dry_run=True) as work:
        work.tenant = 7
    assert heard == []
    async with tenancy.work(dry_run=False) as work:
        work.tenant = 7
        assert heard == []
    assert heard == [7]


async def test_failing_node_is_an_error_of_the_call(storage: Database) -> None:
    async def changed(tenant: int) -> None:
        raise StorageUnavailable

    with pytest.raises(StorageUnavailable):
        async with Tenancy(storage, changed).work(dry_run=False) as work:
            work.tenant = 7
