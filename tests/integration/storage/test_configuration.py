"""Configuration, read back as matching and delivery use it."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from tests.support import postgres
from tests.support.api import new_sealer

from outrider_server.domain.endpoint import (
    BatchPolicy,
    DeliveryMode,
    EndpointState,
    RateLimit,
    RetryPolicy,
)
from outrider_server.domain.sequence import SHARD_COUNT
from outrider_server.domain.subscription import SubscriptionState
from outrider_server.secrets.errors import SealBrokenError, UnknownKeyError
from outrider_server.secrets.keys import KeyEncryptionKey, KeyRing
from outrider_server.secrets.sealing import Sealer
from outrider_server.storage import endpoints, event_types, subscriptions, tenants
from outrider_server.storage.configuration import holds_sealed, load_shards, load_tenant
from outrider_server.storage.database import Connection, Database
from outrider_server.storage.endpoints import EndpointSpec, SigningSecret, StoredEndpoint
from outrider_server.storage.event_types import EventTypeSpec
from outrider_server.storage.subscriptions import SubscriptionSpec
from outrider_server.storage.tenants import LockedTenant

SPEC = EndpointSpec(url="https://example.com/x", secrets=(SigningSecret(b"s" * 32),))
SEALER = new_sealer()
ALL = range(SHARD_COUNT)


@pytest.fixture
async def storage(database: postgres.Database) -> AsyncIterator[Database]:
    async with Database(database.dsn, node="test", boot="0") as storage:
        yield storage


async def new_tenant(connection: Connection, name: str) -> int:
    made = await tenants.create(connection, name, "", strict_types=False)
    assert made is not None
    return made.id


async def lock(connection: Connection, tenant: int) -> LockedTenant:
    locked = await tenants.lock(connection, tenant)
    assert locked is not None
    return locked


async def new_endpoint(
    storage: Database, tenant: int, name: str, spec: EndpointSpec = SPEC
) -> StoredEndpoint:
    async with storage.transaction() as connection:
        made = await endpoints.create(
            connection, SEALER, await lock(connection, tenant), name, spec
        )
    assert made is not None
    return made


async def test_empty_database_has_no_configuration(storage: Database) -> None:
    async with storage.connection() as connection:
        assert await load_shards(connection, SEALER, ALL) == []
        assert await load_tenant(connection, SEALER, 1) is None


async def test_everything_comes_back_as_it_was_given(storage: Database) -> None:
    spec = EndpointSpec(
        url="https://example.com/x",
        secrets=(SigningSecret(b"n" * 32), SigningSecret(b"o" * 32)),
        headers=(("a", "1"),),
        mode=DeliveryMode.BATCH,
        batch=BatchPolicy(5, 6, 7.5),
        retry=RetryPolicy(1.5, 2.5, 3.5, 0.0, 4, 5.5),
        concurrency=9,
        attempt_timeout_seconds=1.25,
        rate_limit=RateLimit(10, 1_500_000, 2),
        display_name="E",
    )
    async with storage.transaction() as connection:
        tenant = await new_tenant(connection, "a")
        locked = await lock(connection, tenant)
        endpoint = await endpoints.create(connection, SEALER, locked, "e", spec)
        assert endpoint is not None
        assert endpoint.spec == spec
        subscription = await subscriptions.create(
            connection, locked, "s", endpoint.id, SubscriptionSpec(("x.*", "y"), "a > 1", b"ast")
        )
        assert subscription is not None
        _ = await event_types.create(connection, locked, "x.y", EventTypeSpec())
        _ = await new_tenant(connection, "b")
    async with storage.connection() as connection:
        first, second = await load_shards(connection, SEALER, ALL)
        assert await load_tenant(connection, SEALER, tenant) == first
    (loaded,) = first.endpoints
    assert loaded.secrets == (b"n" * 32, b"o" * 32)
    assert (loaded.url, loaded.headers, loaded.mode) == (spec.url, spec.headers, spec.mode)
    assert (loaded.batch, loaded.retry) == (spec.batch, spec.retry)
    assert (loaded.concurrency, loaded.attempt_timeout_seconds) == (9, 1.25)
    assert loaded.rate_limit == RateLimit(10, 1_500_000, 2)
    (matched,) = first.subscriptions
    assert (matched.endpoint, matched.types, matched.filter_text, matched.filter_ast) == (
        loaded.id,
        ("x.*", "y"),
        "a > 1",
        b"ast",
    )
    assert first.event_types == {"x.y"}
    assert (first.tenant.name, first.tenant.config_version) == ("a", 2)
    assert (second.tenant.name, second.endpoints, second.subscriptions) == ("b", (), ())


async def test_a_shards_tenants_are_those_that_have_anything_there(storage: Database) -> None:
    async with storage.transaction() as connection:
        ids = {name: await new_tenant(connection, name) for name in ("a", "b", "c", "gone")}
        for name, shards, former in (
            ("a", [4], []),
            ("b", [5, 4, 9], []),
            ("c", [6], [4, 7]),
            ("gone", [4], []),
        ):
            await connection.execute(
                "UPDATE tenant SET shard = $2, shards = $3, former_shards = $4,"
                " frozen_until = CASE WHEN $5 THEN timestamptz '2026-11-24 12:00:00Z' END WHERE id = $1",
                ids[name],
                shards[0],
                shards,
                former,
                name == "b",
            )
    for name in ("a", "b"):
        await new_endpoint(storage, ids[name], "e")

    async def names(*shards: int) -> list[str]:
        async with storage.connection() as connection:
            return [each.tenant.name for each in await load_shards(connection, SEALER, shards)]

    assert await names(4) == ["a", "b", "c", "gone"]
    assert await names(9) == ["b"]
    assert await names(7, 5) == ["b", "c"]
    assert await names(8) == await names() == []
    async with storage.connection() as connection:
        await connection.execute("UPDATE tenant SET deleted_at = now() WHERE id = $1", ids["gone"])
        loaded = {c.tenant.name: c for c in await load_shards(connection, SEALER, {4})}
        assert loaded == {name: await load_tenant(connection, SEALER, ids[name]) for name in "abc"}
    split = loaded["b"].tenant
    assert (split.shard, split.shards, split.former_shards, split.frozen_until_us) == (
        5,
        (5, 4, 9),
        (),
        1_795_521_600_000_000,
    )
    moved = loaded["c"].tenant
    assert (moved.spread, moved.everywhere, moved.frozen_until_us) == ((6,), (6, 4, 7), 0)
    # Of others nothing is read.
    assert [[e.tenant for e in loaded[name].endpoints] for name in "abc"] == [
        [ids["a"]],
        [ids["b"]],
        [],
    ]


async def test_an_endpoint_of_an_earlier_version_has_no_rate_limit(storage: Database) -> None:
    async with storage.transaction() as connection:
        tenant = await new_tenant(connection, "a")
    made = await new_endpoint(storage, tenant, "e", replace(SPEC, rate_limit=RateLimit(5)))
    async with storage.transaction() as connection:
        await connection.execute("UPDATE endpoint SET settings = settings - 'rate_limit'")
        read = await endpoints.get(connection, SEALER, tenant, "e")
    assert read is not None
    assert read.spec == replace(made.spec, rate_limit=None)


async def test_ended_secrets_are_left_out_and_their_tenants_found(storage: Database) -> None:
    now_us = time.time_ns() // 1000
    ended, lives = now_us - 3_600_000_000, now_us + 3_600_000_000
    spec = replace(
        SPEC,
        secrets=(
            SigningSecret(b"1" * 32),
            SigningSecret(b"2" * 32, lives),
            SigningSecret(b"3" * 32, ended),
        ),
    )
    async with storage.transaction() as connection:
        tenant, other = await new_tenant(connection, "a"), await new_tenant(connection, "b")
    _ = await new_endpoint(storage, tenant, "e", spec)
    _ = await new_endpoint(storage, other, "e")
    async with storage.connection() as connection:
        configuration = await load_tenant(connection, SEALER, tenant)
        assert configuration is not None
        assert configuration.endpoints[0].secrets == (b"1" * 32, b"2" * 32)
        for after, until, found in (
            (ended - 1, ended, [tenant]),
            (ended, now_us, []),
            (ended, lives, [tenant]),
            (lives, lives + 1, []),
        ):
            assert await endpoints.find_ended_secrets(connection, after, until) == found


async def test_deleted_is_left_out_and_paused_is_in(storage: Database) -> None:
    async with storage.transaction() as connection:
        tenant = await new_tenant(connection, "a")
    made = [await new_endpoint(storage, tenant, name) for name in ("x", "y")]
    async with storage.transaction() as connection:
        locked = await lock(connection, tenant)
        for endpoint, state in zip(
            made, (EndpointState.DELETED, EndpointState.PAUSED), strict=True
        ):
            _ = await endpoints.update(connection, SEALER, locked, endpoint, state, endpoint.spec)
        gone, paused = [
            await subscriptions.create(
                connection, locked, name, made[1].id, SubscriptionSpec(("*",))
            )
            for name in ("g", "p")
        ]
        assert gone is not None
        assert paused is not None
        for subscription, to in (
            (gone, SubscriptionState.DELETED),
            (paused, SubscriptionState.PAUSED),
        ):
            _ = await subscriptions.update(connection, locked, subscription, to, subscription.spec)
    async with storage.connection() as connection:
        configuration = await load_tenant(connection, SEALER, tenant)
    assert configuration is not None
    assert [(e.name, e.state) for e in configuration.endpoints] == [("y", EndpointState.PAUSED)]
    assert [(s.name, s.state) for s in configuration.subscriptions] == [
        ("p", SubscriptionState.PAUSED)
    ]
    async with storage.transaction() as connection:
        await tenants.delete(connection, await lock(connection, tenant))
        assert await tenants.lock(connection, tenant) is None
    async with storage.connection() as connection:
        assert await load_tenant(connection, SEALER, tenant) is None


async def test_changes_of_a_tenant_follow_each_other_and_others_go_on(storage: Database) -> None:
    async with storage.transaction() as connection:
        tenant, other = await new_tenant(connection, "a"), await new_tenant(connection, "b")
    async with storage.transaction() as first:
        _ = await lock(first, tenant)
        async with storage.transaction() as second:
            _ = await lock(second, other)
            _ = await second.execute("SET LOCAL lock_timeout = '50ms'")
            with pytest.raises(Exception, match="lock timeout"):
                _ = await lock(second, tenant)


async def test_sealed_value_opens_nowhere_else(storage: Database) -> None:
    async with storage.transaction() as connection:
        tenant = await new_tenant(connection, "a")
    made = [await new_endpoint(storage, tenant, name) for name in ("x", "y")]
    async with storage.connection() as connection:
        other_key = Sealer(KeyRing((KeyEncryptionKey.of(os.urandom(32)),)), os.urandom)
        with pytest.raises(UnknownKeyError):
            _ = await load_shards(connection, other_key, ALL)
        _ = await connection.execute(
            "UPDATE endpoint SET sealed = (SELECT sealed FROM endpoint WHERE id = $1) WHERE id = $2",
            made[0].id,
            made[1].id,
        )
        with pytest.raises(SealBrokenError):
            _ = await load_shards(connection, SEALER, ALL)


async def test_it_is_known_whether_anything_is_sealed(storage: Database) -> None:
    async with storage.transaction() as connection:
        tenant = await new_tenant(connection, "a")
        assert not await holds_sealed(connection)
    await new_endpoint(storage, tenant, "x")
    async with storage.connection() as connection:
        assert await holds_sealed(connection)
        await connection.execute("UPDATE endpoint SET state = 4, deleted_at = now()")
        assert not await holds_sealed(connection)


async def test_thousands_of_rows_load_in_four_statements(storage: Database) -> None:
    """Set-based, so that the number of statements does not grow with the configuration."""
    async with storage.transaction() as connection:
        ids = [await new_tenant(connection, f"t{index}") for index in range(5)]
    first = await new_endpoint(storage, ids[0], "e")
    async with storage.transaction() as connection:
        _ = await connection.execute(
            "INSERT INTO subscription (tenant, name, endpoint, types, filter, filter_ast) "
            "SELECT $1, 's' || n, $2, ARRAY['x.*'], 'a > 1', 'ast'::bytea FROM generate_series(1, 5000) AS n",
            ids[0],
            first.id,
        )
    statements: list[str] = []
    async with storage.connection() as connection:
        _ = await load_shards(connection, SEALER, ALL)  # the driver asks about smallint[] once
        connection.add_query_logger(lambda record: statements.append(record.query))
        configurations = await load_shards(connection, SEALER, ALL)
    assert len(configurations[0].subscriptions) == 5000
    assert len([text for text in statements if "FROM" in text]) == 4
