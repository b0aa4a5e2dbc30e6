"""What the node is told of changes, whichever way they end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from tests.support import postgres
from tests.support.api import endpoint_request, running, subscription_request

from outrider.v1 import tenant_service_pb2
from outrider_server.api.tenancy import Tenancy, not_found
from outrider_server.domain.errors import Unavailable
from outrider_server.domain.tenant import Tenant
from outrider_server.storage.database import Database, StorageUnavailable
from outrider_server.storage.queries import load

TENANT = Tenant(7, "demo", 5, config_version=1)


def epoch(shard: int) -> int | None:
    return 0 if shard == TENANT.shard else None


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
        async with Tenancy(storage, changed, epoch).work(dry_run=False) as work:
            await work.changes(TENANT)
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

    tenancy = Tenancy(storage, changed, epoch)
    async with tenancy.work(dry_run=True) as work:
        await work.changes(TENANT)
    assert heard == []
    async with tenancy.work(dry_run=False) as work:
        await work.changes(TENANT)
        assert heard == []
    assert heard == [7]


async def test_failing_node_is_an_error_of_the_call(storage: Database) -> None:
    async def changed(tenant: int) -> None:
        raise StorageUnavailable

    with pytest.raises(StorageUnavailable):
        async with Tenancy(storage, changed, epoch).work(dry_run=False) as work:
            await work.changes(TENANT)


async def test_nothing_is_committed_for_a_tenant_whose_shard_another_node_holds(
    database: postgres.Database,
) -> None:
    held = True
    async with running(database.dsn, epoch=lambda _: 0 if held else None) as api:
        acme = await api.tenant("acme")
        await acme.call("CreateEndpoint", endpoint_request("acme", "hook"))
        heard = list(api.changed)
        held = False
        for caller, method, request in (
            (acme, "CreateEndpoint", endpoint_request("acme", "other")),
            (acme, "CreateSubscription", subscription_request("acme", "hook", "s")),
            (
                api.admin,
                "CreateTenant",
                tenant_service_pb2.CreateTenantRequest(tenant_id="late", tenant={}),
            ),
            (
                api.admin,
                "DeleteTenant",
                tenant_service_pb2.DeleteTenantRequest(name="tenants/acme"),
            ),
        ):
            refusal = await caller.refused(method, request)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "NOT_READY")
            assert refusal.retry_seconds == 1.0
        assert api.changed == heard
        async with api.database.connection() as connection:
            for table, count in (("tenant", 1), ("endpoint", 1), ("subscription", 0)):
                assert await connection.fetchval(f"SELECT count(*) FROM {table}") == count
        held = True
        await acme.call("CreateSubscription", subscription_request("acme", "hook", "s"))


async def test_a_refused_change_tells_nobody(storage: Database) -> None:
    heard: list[int] = []

    async def changed(tenant: int) -> None:
        heard.append(tenant)

    with pytest.raises(Unavailable):
        async with Tenancy(storage, changed, lambda _: None).work(dry_run=False) as work:
            await work.changes(TENANT)
    assert heard == []


async def test_a_change_under_an_epoch_that_is_over_is_refused_and_not_committed(
    database: postgres.Database,
) -> None:
    """This node still believes that it holds the shard, but another took it."""
    async with running(database.dsn) as api:
        acme = await api.tenant("acme")
        heard = list(api.changed)
        async with api.database.connection() as connection:
            await connection.execute("UPDATE shard SET epoch = epoch + 1")
        refusal = await acme.refused("CreateEndpoint", endpoint_request("acme", "hook"))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "NOT_READY")
        assert api.changed == heard
        async with api.database.connection() as connection:
            assert await connection.fetchval("SELECT count(*) FROM endpoint") == 0


async def test_a_takeover_waits_for_a_change_that_is_under_way(storage: Database) -> None:
    """So whoever takes the shard over reads the configuration as the change left it."""

    async def changed(tenant: int) -> None:
        pass

    async with storage.connection() as other:
        async with Tenancy(storage, changed, epoch).work(dry_run=False) as work:
            await work.changes(TENANT)
            await other.execute("SET lock_timeout = '50ms'")
            with pytest.raises(Exception, match="lock timeout"):
                await other.execute(load("lock_shards"), [TENANT.shard])
            # Other shards have nothing to do with it.
            await other.execute(load("lock_shards"), [TENANT.shard + 1])
        await other.execute(load("lock_shards"), [TENANT.shard])


async def test_a_tenant_is_made_on_a_shard_that_this_node_holds(
    database: postgres.Database,
) -> None:
    held = {3, 9}
    async with running(database.dsn, epoch=lambda shard: 0 if shard in held else None) as api:
        for name in ("a", "b", "c"):
            await api.tenant(name)
        async with api.database.connection() as connection:
            rows = await connection.fetch("SELECT shard, shards FROM tenant ORDER BY name")
        assert [tuple(row) for row in rows] == [(3, [3]), (9, [9]), (3, [3])]
        held.clear()
        request = tenant_service_pb2.CreateTenantRequest(tenant_id="d", tenant={})
        refusal = await api.admin.refused("CreateTenant", request)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "NOT_READY")
