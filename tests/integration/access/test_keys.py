"""The ring of keys on a real database."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from tests.support import postgres

from outrider_server.access.keys import KeyRing, NewKey, create_admin_key, create_key, make_text
from outrider_server.domain.access import Role
from outrider_server.domain.errors import AlreadyExists, InvalidArgument, Unauthenticated
from outrider_server.storage.database import Connection, Database, StorageUnavailable


class CountingDatabase(Database):
    """Counts how often it is asked."""

    asked = 0

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        self.asked += 1
        async with super().connection() as connection:
            yield connection


@pytest.fixture
async def storage(database: postgres.Database) -> AsyncIterator[CountingDatabase]:
    async with CountingDatabase(database.dsn, node="test", boot="0") as storage:
        yield storage


async def new_key(storage: Database, name: str) -> NewKey:
    async with storage.transaction() as connection:
        made = await create_key(
            connection, os.urandom, tenant=None, name=name, role=Role.SYSTEM_ADMIN
        )
    assert made is not None
    return made


async def execute(storage: Database, statement: str) -> None:
    async with storage.connection() as connection:
        _ = await connection.execute(statement)


async def reason_of(ring: KeyRing, text: str) -> str:
    with pytest.raises(Unauthenticated) as caught:
        _ = await ring.authenticate(text)
    return caught.value.reason


async def test_key_is_looked_up_once(storage: CountingDatabase) -> None:
    made = await new_key(storage, "a")
    ring = KeyRing(storage)
    before = storage.asked
    caller = await ring.authenticate(made.text)
    assert (caller.key_id, caller.role, caller.tenant) == ("/a", Role.SYSTEM_ADMIN, None)
    assert await ring.authenticate(made.text) is caller
    assert storage.asked == before + 1


async def test_mistyped_key_costs_no_look_up_and_an_unknown_one_is_invalid(
    storage: CountingDatabase,
) -> None:
    ring = KeyRing(storage)
    text = make_text("a", os.urandom)
    before = storage.asked
    assert await reason_of(ring, text[:-1]) == "INVALID_API_KEY"
    assert storage.asked == before
    assert await reason_of(ring, text) == "INVALID_API_KEY"
    assert storage.asked == before + 1


async def test_one_query_learns_of_every_key_that_ended(storage: CountingDatabase) -> None:
    names = ("holds", "revoked", "expired", "gone")
    made = {name: await new_key(storage, name) for name in names}
    ring = KeyRing(storage)
    callers = {name: await ring.authenticate(key.text) for name, key in made.items()}
    assert await ring.revalidate() == frozenset()
    await execute(storage, "UPDATE api_key SET revoked_at = now() WHERE id = '/revoked'")
    await execute(storage, "UPDATE api_key SET expires_at = now() WHERE id = '/expired'")
    await execute(storage, "DELETE FROM api_key WHERE id = '/gone'")
    assert ring.is_valid(callers["revoked"])
    before = storage.asked
    assert await ring.revalidate() == {"/revoked", "/expired", "/gone"}
    assert storage.asked == before + 1
    assert await ring.revalidate() == frozenset()
    assert {name for name in names if ring.is_valid(callers[name])} == {"holds"}
    assert await reason_of(ring, made["revoked"].text) == "REVOKED_API_KEY"
    assert await reason_of(ring, made["expired"].text) == "INVALID_API_KEY"
    assert ring.why_ended(callers["revoked"]).reason == "REVOKED_API_KEY"
    assert ring.why_ended(callers["expired"]).reason == "INVALID_API_KEY"
    with pytest.raises(Unauthenticated):
        ring.require_valid(callers["gone"])
    ring.require_valid(callers["holds"])


async def test_end_told_of_by_this_node_counts_at_once_and_is_reported(
    storage: CountingDatabase,
) -> None:
    made = await new_key(storage, "a")
    ring = KeyRing(storage)
    caller = await ring.authenticate(made.text)
    ring.end("/unknown")
    ring.end(caller.key_id)
    assert not ring.is_valid(caller)
    assert await ring.revalidate() == {caller.key_id}


async def test_held_key_is_checked_however_many_others_come(storage: CountingDatabase) -> None:
    ring = KeyRing(storage, remembered_max=2)
    made = await new_key(storage, "held")
    caller = await ring.authenticate(made.text)
    with ring.hold(caller):
        for index in range(4):
            _ = await ring.authenticate((await new_key(storage, f"k{index}")).text)
        await execute(storage, "UPDATE api_key SET revoked_at = now() WHERE id = '/held'")
        assert await ring.revalidate() == {"/held"}
        assert not ring.is_valid(caller)
    # No trace is left of a key that is neither held nor remembered.
    assert ring._ended == {}
    assert len(ring._callers) == 2
    assert await reason_of(ring, made.text) == "REVOKED_API_KEY"


async def test_key_revoked_while_it_is_looked_up_is_not_remembered(
    storage: CountingDatabase,
) -> None:
    """The row is read before the revocation, and arrives after this node was told of it."""
    made = await new_key(storage, "a")
    read, go_on = asyncio.Event(), asyncio.Event()

    class SlowDatabase(CountingDatabase):
        @asynccontextmanager
        async def connection(self) -> AsyncIterator[Connection]:
            async with storage.connection() as connection:
                yield connection
            if not read.is_set():
                read.set()
                await go_on.wait()

    ring = KeyRing(SlowDatabase("postgresql://127.0.0.1:1/none", node="test", boot="0"))
    asking = asyncio.ensure_future(ring.authenticate(made.text))
    await read.wait()
    await execute(storage, "UPDATE api_key SET revoked_at = now()")
    ring.end("/a")
    go_on.set()
    with pytest.raises(Unauthenticated) as caught:
        _ = await asking
    assert caught.value.reason == "REVOKED_API_KEY"


async def test_keys_in_memory_go_on_while_the_database_is_away(storage: CountingDatabase) -> None:
    made, other = await new_key(storage, "a"), await new_key(storage, "b")
    ring = KeyRing(storage)
    caller = await ring.authenticate(made.text)
    await storage.close()
    assert await ring.authenticate(made.text) is caller
    assert ring.is_valid(caller)
    with pytest.raises(StorageUnavailable):
        _ = await ring.revalidate()
    with pytest.raises(StorageUnavailable):
        _ = await ring.authenticate(other.text)


async def test_admin_key_opens_an_installation(storage: CountingDatabase) -> None:
    async with storage.transaction() as connection:
        text = await create_admin_key(connection, os.urandom)
        named = await create_admin_key(connection, os.urandom, name="ops")
    for key in (text, named):
        caller = await KeyRing(storage).authenticate(key)
        assert (caller.role, caller.tenant) == (Role.SYSTEM_ADMIN, None)
    async with storage.transaction() as connection:
        with pytest.raises(AlreadyExists, match="ops"):
            _ = await create_admin_key(connection, os.urandom, name="ops")


async def test_a_system_admins_key_with_an_unusable_id_is_not_stored(
    storage: CountingDatabase,
) -> None:
    async with storage.transaction() as connection:
        with pytest.raises(InvalidArgument):
            _ = await create_admin_key(connection, os.urandom, name="A B")
        assert await connection.fetchval("SELECT count(*) FROM api_key") == 0
