"""Events are appended whole with what makes them durable once, and read back by range."""

from __future__ import annotations

from contextlib import aclosing
from uuid import UUID

import asyncpg
import pytest
from tests.support.storage import (
    attempt,
    dead,
    made_event,
    make_partitions,
    make_tenant,
    owed,
    plan,
    sequences,
    store,
    take,
)

from outrider_server.domain.event import Event
from outrider_server.domain.frame import EventRefusal, FrameResult
from outrider_server.domain.outcome import Verdict
from outrider_server.policy.obligations import ShardRecord
from outrider_server.storage import event_log, records


@pytest.fixture
async def tenant(connection: asyncpg.Connection) -> int:
    await make_partitions(connection)
    return await make_tenant(connection)


async def test_what_is_stored_is_read_back_as_it_was(
    connection: asyncpg.Connection, tenant: int
) -> None:
    first, second = sequences(2)
    full = made_event(
        tenant,
        first,
        3,
        4,
        data='{"ü": "\\u0000"}'.encode(),
        source="a",
        subject="b",
        key="ключ",
        organization="c",
        actor="d",
        idempotency_key="e",
        attributes={"x": "y", "ü": ""},
        over_budget=(9,),
        config_version=7,
    )
    bare = made_event(tenant, second)
    await store(connection, full, bare)
    loaded = await event_log.load_events(connection, tenant, [second, first], 1_000_000)
    assert [e.sequence for e in loaded] == [first, second]
    for e, original in zip(loaded, (full, bare), strict=True):
        for name in (
            "type", "time_us", "data", "source", "subject", "key", "organization", "actor", "attributes",
            "config_version", "size",
        ):  # fmt: skip
            assert getattr(e, name) == getattr(original, name)
    row = await connection.fetchrow("SELECT * FROM event WHERE sequence = $1", first)
    assert (row["shard"], row["targets"], row["over_budget"]) == (5, [3, 4], [9])


async def test_events_are_loaded_up_to_a_budget_and_one_at_least(
    connection: asyncpg.Connection, tenant: int
) -> None:
    named = sequences(5)
    await store(connection, *(made_event(tenant, s, data=b"1" * 100) for s in named))

    async def load(budget: int, wanted: list[int]) -> list[int]:
        found = await event_log.load_events(connection, tenant, wanted, budget)
        return [e.sequence for e in found]

    assert await load(1, named) == named[:1]
    assert await load(100, named) == named[:1]
    assert await load(101, named) == named[:2]
    assert await load(1000, named[2:]) == named[2:]
    assert await load(1000, [1, *named[:1]]) == named[:1]
    assert await event_log.load_events(connection, tenant + 1, named, 1000) == []


async def test_producers_advance_only_forward_and_all_or_none(
    connection: asyncpg.Connection,
) -> None:
    async def advance(*rows: tuple[str, int, int, int]) -> None:
        async with connection.transaction():
            await event_log.set_producers(connection, list(rows))

    await advance(("b", 1, 5, 1), ("a", 1, 5, 1))
    await advance(("a", 1, 5, 3), ("a", 2, 5, 2))
    assert await event_log.read_producer(connection, "a") == {1: (5, 3), 2: (5, 2)}
    for behind in (("a", 1, 5, 3), ("a", 1, 5, 2), ("a", 1, 4, 9)):
        with pytest.raises(event_log.ProducerConflict):
            await advance(behind, ("new", 1, 1, 1))
    assert await event_log.read_producer(connection, "new") == {}
    await advance(("a", 2, 6, 1))
    assert await event_log.read_producer(connection, "a") == {1: (5, 3), 2: (6, 1)}


async def test_a_key_is_found_for_its_tenant_from_a_time_on(
    connection: asyncpg.Connection, tenant: int
) -> None:
    one, two = UUID(int=1), UUID(int=2)
    old, new = sequences(2)
    await event_log.begin(connection, [])
    await event_log.append(connection, [], [(tenant, one, old), (tenant, two, new)], [])
    await event_log.commit(connection)
    wanted = [(tenant, one), (tenant, two), (tenant + 1, one), (tenant, UUID(int=3))]
    assert await event_log.find_idempotent(connection, wanted, old) == {
        (tenant, one): old,
        (tenant, two): new,
    }
    assert await event_log.find_idempotent(connection, wanted, new) == {(tenant, two): new}


async def test_an_answer_is_kept_as_it_was_given(
    connection: asyncpg.Connection, tenant: int
) -> None:
    (at,) = sequences(1)
    result = FrameResult(
        ranges=[("demo", at, 3), ("other", at + 1024, 1)],
        refusals=[EventRefusal(2, "PAYLOAD_NOT_JSON", "ü")],
        duplicates=[(4, at)],
    )
    await event_log.begin(connection, [])
    frame = (at, "p", 1, 7, event_log.encode_answer(result))
    await event_log.append(connection, [], [], [frame])
    await event_log.commit(connection)
    found = await event_log.read_frames(connection, "p", 1, [7, 8])
    result.duplicate = True
    assert found == {7: result}
    assert await event_log.read_frames(connection, "p", 2, [7]) == {}


@pytest.mark.parametrize(
    "poison",
    [
        {"key": "a\0"},
        {"subject": "\ud800"},
        {"attributes": {"a": "\udfff"}},
        {"time_us": 2**63},
        {"config_version": -(2**63) - 1},
    ],
    ids=lambda fields: next(iter(fields)),
)
async def test_a_row_that_postgres_refuses_is_told_and_found(
    connection: asyncpg.Connection, tenant: int, poison: dict[str, object]
) -> None:
    named = sequences(9)
    events = [made_event(tenant, s) for s in named]
    for place in (3, 8):
        for name, value in poison.items():
            setattr(events[place], name, value)
    await event_log.begin(connection, [])
    with pytest.raises(event_log.DataRefused):
        await event_log.append(connection, events, [], [])
    await event_log.rollback(connection)
    assert await event_log.refused_alone(connection, events) == [events[3], events[8]]
    assert await event_log.refused_alone(connection, events[:3]) == []
    assert await event_log.refused_alone(connection, []) == []
    assert await connection.fetchval("SELECT count(*) FROM event") == 0
    await store(connection, *(e for i, e in enumerate(events) if i not in {3, 8}))
    assert await connection.fetchval("SELECT count(*) FROM event") == 7


async def test_an_error_that_is_not_the_datas_is_not_called_so(
    connection: asyncpg.Connection, tenant: int
) -> None:
    (sequence,) = sequences(1)
    await store(connection, made_event(tenant, sequence))
    await event_log.begin(connection, [])
    with pytest.raises(asyncpg.UniqueViolationError):
        await event_log.append(connection, [made_event(tenant, sequence)], [], [])
    await event_log.rollback(connection)


async def test_the_window_is_what_lies_above_the_checkpoint_less_what_is_settled(
    connection: asyncpg.Connection, tenant: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = sequences(6)
    other = await make_tenant(connection, "other")
    elsewhere = await make_tenant(connection, "elsewhere", shard=6)
    events = [made_event(tenant if i % 2 else other, s, 1, 2) for i, s in enumerate(named)]
    await store(connection, *events, made_event(elsewhere, named[0] + 1, 1))
    window = [(e.sequence, e.tenant, [1, 2]) for e in events[2:]]
    monkeypatch.setattr(event_log, "WINDOW_PAGE_EVENTS", 3)

    async def pages(shard: int, after: int) -> list[list[tuple[int, int, list[int]]]]:
        read = event_log.read_window(connection, shard, [tenant, other], after)
        return [page async for page in read]

    assert await pages(5, named[1]) == [window[:3], window[3:]]
    assert await pages(5, named[-1]) == []
    # Who stops in the middle leaves the connection free.
    async with aclosing(event_log.read_window(connection, 5, [tenant, other], named[1])) as stopped:
        async for page in stopped:
            assert page == window[:3]
            break
    assert not connection.is_in_transaction()
    # A split tenant has events in several shards: each window is its shard's.
    split = made_event(tenant, named[2] + 1, 3)
    await store(connection, split)
    assert await pages(5, named[1]) == [window[:3], window[3:]]
    assert await pages(6, named[1]) == [[(split.sequence, tenant, [3])]]
    taken = await take(connection)
    await records.write(
        connection,
        plan(
            ShardRecord(5, taken[5].epoch, 1, named[1]),
            attempts=[
                attempt(tenant, 5, (named[1], 1), (named[2], 1)),
                attempt(tenant, 5, (named[2], 2), verdict=Verdict.RETRY),
            ],
            dead_letters=[
                dead(tenant, 5, 1, named[3]),
                dead(tenant, 5, 2, named[3], cancelled=True),
            ],
            owed_inserts=[owed(tenant, 5, 1 << 20, 2, named[4], named[5])],
        ),
        lambda _: named[5],
    )
    assert await event_log.read_settled(connection, 5, named[2]) == {
        (named[2], 1),
        (named[3], 1),
        (named[3], 2),
        (named[4], 2),
        (named[5], 2),
    }
    assert await event_log.read_settled(connection, 6, named[2]) == set()


async def test_deleted_tenants_are_read_too(connection: asyncpg.Connection, tenant: int) -> None:
    gone = await make_tenant(connection, "gone", shard=7)
    await connection.execute("UPDATE tenant SET deleted_at = now() WHERE id = $1", gone)
    assert sorted(await event_log.read_tenants(connection, [5, 7])) == [(tenant, 5), (gone, 7)]
    assert await event_log.read_tenants(connection, [7]) == [(gone, 7)]


async def test_a_tenant_is_read_for_each_shard_that_holds_something_of_it(
    connection: asyncpg.Connection, tenant: int
) -> None:
    await connection.execute(
        "UPDATE tenant SET shards = '{5,9,12}', former_shards = '{14}' WHERE id = $1", tenant
    )
    assert sorted(await event_log.read_tenants(connection, [9, 12, 13, 14])) == [
        (tenant, 9),
        (tenant, 12),
        (tenant, 14),
    ]


def test_no_text_is_written_as_null() -> None:
    row = dict(zip(event_log.EVENT_COLUMNS, event_log._row(Event(1, "a", b"1", 0)), strict=True))
    assert [name for name, value in row.items() if value is None] == [
        "source",
        "subject",
        "key",
        "organization",
        "actor",
        "idempotency_key",
        "attributes",
        "over_budget",
    ]
