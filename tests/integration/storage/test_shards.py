"""Lease, takeover and fence: who holds a shard, and that nobody else writes to it."""

from __future__ import annotations

import asyncio
import time

import asyncpg
import pytest
from tests.support.postgres import Database
from tests.support.storage import BOOT, OTHER_BOOT, take

from outrider_server.domain.delivery import HELD_BACK_US
from outrider_server.storage import shards
from outrider_server.storage.shards import FENCED, LeaseLost


async def test_a_takeover_raises_every_epoch_and_keeps_the_rest(
    connection: asyncpg.Connection,
) -> None:
    first = await take(connection)
    assert sorted(first) == list(range(64))
    await connection.execute("UPDATE shard SET checkpoint = 7 << 10, record_no = 3 WHERE shard = 9")
    second = await take(connection)
    assert {shard: t.epoch - first[shard].epoch for shard, t in second.items()} == dict.fromkeys(
        range(64), 1
    )
    assert (second[9].checkpoint, second[9].record_no) == (7 << 10, 3)


async def holders(connection: asyncpg.Connection) -> dict[str | None, set[int]]:
    found: dict[str | None, set[int]] = {}
    for shard in (await shards.look(connection)).shards:
        found.setdefault(shard.node, set()).add(shard.shard)
    return found


async def test_another_node_gets_nothing_before_the_lease_ends_and_all_after(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    await take(connection)
    assert await take(other, "two", OTHER_BOOT) == {}
    await connection.execute(
        "UPDATE node SET expires_at = now() - interval '1 s' WHERE name = 'one'"
    )
    # Whoever still has a backend of the old owner open loses it.
    assert len(await take(other, "two", OTHER_BOOT)) == 64
    with pytest.raises(
        (asyncpg.PostgresConnectionError, asyncpg.InterfaceError, asyncpg.InternalClientError)
    ):
        await connection.execute("SELECT 1")


async def test_a_shard_that_another_took_meanwhile_is_left_to_it(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    await shards.become(other, "two", OTHER_BOOT, "b:1", 10.0)
    view = await shards.look(other)
    assert {shard.node for shard in view.shards} == {None}
    await take(connection, numbers=range(60))  # between the look and the locks
    taken = await shards.take(
        other, "two", OTHER_BOOT, view.shards, orderly=False, crash_seconds=60
    )
    assert [each.shard for each in taken] == [60, 61, 62, 63]
    assert await holders(connection) == {"one": set(range(60)), "two": set(range(60, 64))}


async def test_the_fence_lets_the_owner_write_and_nobody_else(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    taken = await take(connection)
    await connection.execute(shards.fence_statement([(9, taken[9].epoch), (3, taken[3].epoch)]))
    await connection.execute("COMMIT")
    await connection.execute(shards.fence_statement([]))
    await connection.execute("COMMIT")
    await other.execute("UPDATE shard SET epoch = epoch + 1 WHERE shard = 3")
    with pytest.raises(asyncpg.PostgresError) as caught:
        await connection.execute(shards.fence_statement([(9, taken[9].epoch), (3, taken[3].epoch)]))
    assert caught.value.sqlstate == FENCED
    await connection.execute("ROLLBACK")


async def test_a_takeover_waits_for_transactions_under_the_fence(
    connection: asyncpg.Connection, other: asyncpg.Connection, database: Database
) -> None:
    taken = await take(connection)
    await connection.execute(shards.fence_statement([(9, taken[9].epoch)]))
    # The same boot, so that its own backends are not ended: what counts is the lock.
    taking = asyncio.ensure_future(take(other))
    watcher = await asyncpg.connect(database.dsn)
    deadline = time.monotonic() + 10
    while not await watcher.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
        assert time.monotonic() < deadline
    assert not taking.done()
    await connection.execute("COMMIT")
    assert (await taking)[9].epoch == taken[9].epoch + 1
    await watcher.close()


async def test_only_the_boot_that_holds_the_lease_renews_it(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    await take(connection)
    await shards.renew_lease(connection, "one", BOOT, "b:2", 20.0)
    row = await connection.fetchrow(
        "SELECT address, expires_at - now() > interval '15 s' AS long FROM node"
    )
    assert tuple(row) == ("b:2", True)
    await other.execute("UPDATE node SET boot = $1", OTHER_BOOT)
    with pytest.raises(LeaseLost):
        await shards.renew_lease(connection, "one", BOOT, "b:2", 20.0)
    with pytest.raises(LeaseLost):
        await shards.become(connection, "one", BOOT, "b:2", 20.0, again=True)
    # The end of one that lost it does not end the other's.
    await shards.end(connection, "one", BOOT)
    assert await connection.fetchval("SELECT expires_at > now() FROM node")
    # One that never was the node takes its place.
    await shards.become(connection, "one", BOOT, "b:2", 20.0)
    assert await connection.fetchval("SELECT boot::text FROM node") == BOOT


async def test_a_renewal_tells_the_shards_and_their_epochs(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    taken = await take(connection, numbers={3, 9})
    epochs = {number: each.epoch for number, each in taken.items()}
    assert await shards.renew_lease(connection, "one", BOOT, "a:1", 10.0) == epochs
    await other.execute("UPDATE shard SET node = 'two', epoch = epoch + 1 WHERE shard = 9")
    assert await shards.renew_lease(connection, "one", BOOT, "a:1", 10.0) == {3: epochs[3]}


async def test_a_renewal_tells_others_that_the_node_drains(
    connection: asyncpg.Connection,
) -> None:
    await take(connection)

    async def takes() -> bool:
        return (await shards.look(connection)).nodes[0].takes

    await shards.renew_lease(connection, "one", BOOT, "a:1", 10.0, draining=True)
    assert not await takes()
    # A boot that takes its place does not.
    await shards.become(connection, "one", OTHER_BOOT, "a:1", 10.0)
    assert await takes()


async def test_an_expired_lease_may_be_renewed_while_nobody_took_it(
    connection: asyncpg.Connection,
) -> None:
    taken = await take(connection)
    await connection.execute("UPDATE node SET expires_at = now() - interval '1 h'")
    held = await shards.renew_lease(connection, "one", BOOT, "a:1", 10.0)
    assert held == {number: each.epoch for number, each in taken.items()}
    assert await connection.fetchval("SELECT expires_at > now() FROM node")


async def test_an_end_frees_the_shards_at_once(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    await take(connection)
    await shards.end(connection, "one", BOOT)
    view = await shards.look(connection)
    assert all(shard.dead and not shard.live for shard in view.shards)
    assert len(await take(other, "two", OTHER_BOOT)) == 64


async def test_the_clock_is_the_databases(connection: asyncpg.Connection) -> None:
    before = await connection.fetchval("SELECT clock_timestamp()")
    now_us = await shards.database_clock_us(connection)
    after = await connection.fetchval("SELECT clock_timestamp()")
    assert before.timestamp() <= now_us / 1e6 + 1e-5
    assert now_us / 1e6 <= after.timestamp() + 1e-5


async def test_an_incumbent_is_one_with_a_lease_and_connections(
    connection: asyncpg.Connection, other: asyncpg.Connection, database: Database
) -> None:
    async def incumbent(boot: str = OTHER_BOOT) -> bool:
        return await shards.has_incumbent(other, "one", boot)

    assert not await incumbent()
    await take(connection)
    assert await incumbent()  # by its connection's name, `connection` is of this boot
    assert not await incumbent(BOOT)
    await other.execute("UPDATE node SET expires_at = now() - interval '1 s'")
    assert not await incumbent()
    await other.execute("UPDATE node SET expires_at = now() + interval '1 h'")
    assert await incumbent()
    await other.execute("UPDATE node SET boot = '22222222-0000-0000-0000-000000000003'")
    assert not await incumbent()
    await other.execute("UPDATE node SET boot = $1", BOOT)
    await connection.close()
    async with asyncio.timeout(10):
        while await incumbent():  # a backend ends a moment after its connection
            await asyncio.sleep(0.01)


async def test_a_look_tells_who_holds_what_and_under_which_lease(
    connection: asyncpg.Connection,
) -> None:
    first = await shards.look(connection)
    assert [shard.shard for shard in first.shards] == list(range(64))
    assert {(shard.node, shard.live, shard.dead) for shard in first.shards} == {
        (None, False, False)
    }
    assert first.nodes == ()
    taken = await take(connection, numbers={3, 9})
    held = await shards.look(connection)
    (node,) = held.nodes
    assert (node.name, node.address, node.live, node.draining) == ("one", "a:1", True, False)
    assert 8 < node.seconds <= 10
    assert node.started_at is not None
    for number in (3, 9):
        shard = held.shards[number]
        assert (shard.node, shard.live, shard.dead) == ("one", True, False)
        assert shard.epoch == taken[number].epoch
    assert held.shards[4].node is None
    # The same lease is told the same; a renewed one, or another boot's, otherwise.
    assert (await shards.look(connection)).shards == held.shards
    leases = {held.shards[3].lease}
    for change in (
        "expires_at = expires_at + interval '1 us'",
        "expires_at = now() - interval '1 s'",
        f"boot = '{OTHER_BOOT}'",
    ):
        await connection.execute(f"UPDATE node SET {change}")
        leases.add((await shards.look(connection)).shards[3].lease)
    assert len(leases) == 4
    late = (await shards.look(connection)).shards[3]
    assert (late.live, late.dead) == (False, False)
    await connection.execute("UPDATE node SET expires_at = '-infinity'")
    over = (await shards.look(connection)).shards[3]
    assert (over.live, over.dead) == (False, True)


# Takeover while the holder is only late.


async def waits_for_a_lock(watcher: asyncpg.Connection, count: int = 1) -> None:
    async with asyncio.timeout(10):
        while await watcher.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted") < count:
            await asyncio.sleep(0.001)


async def test_a_renewal_that_waits_for_a_takeover_sees_its_shards_gone(
    database: Database, other: asyncpg.Connection
) -> None:
    """Its lease is over and it comes back at the very moment: it must not think that it holds what was taken."""
    # Not named as a node's: nobody ends this connection, as nobody ends one of a machine that is cut off.
    holder = await asyncpg.connect(database.dsn)
    watcher = await asyncpg.connect(database.dsn)
    epochs = {n: each.epoch for n, each in (await take(holder, numbers=range(4))).items()}
    await holder.execute("UPDATE node SET expires_at = now() - interval '1 s'")
    await shards.become(other, "two", OTHER_BOOT, "b:1", 10.0)
    view = await shards.look(other)
    wanted = [shard for shard in view.shards if shard.shard in (1, 2)]
    # A transaction of the old owner keeps the takeover waiting, with the lease held still.
    blocker = await asyncpg.connect(database.dsn)
    await blocker.execute(shards.fence_statement([(1, epochs[1])]))
    taking = asyncio.ensure_future(
        shards.take(other, "two", OTHER_BOOT, wanted, orderly=False, crash_seconds=60)
    )
    await waits_for_a_lock(watcher)
    renewing = asyncio.ensure_future(shards.renew_lease(holder, "one", BOOT, "a:1", 10.0))
    await waits_for_a_lock(watcher, 2)
    assert not renewing.done()
    await blocker.execute("COMMIT")
    assert [each.shard for each in await taking] == [1, 2]
    assert await renewing == {0: epochs[0], 3: epochs[3]}
    assert (await shards.look(watcher)).shards[0].live
    for each in (holder, watcher, blocker):
        await each.close()


async def test_a_takeover_that_waits_for_a_renewal_takes_nothing(
    database: Database, other: asyncpg.Connection
) -> None:
    holder = await asyncpg.connect(database.dsn)
    watcher = await asyncpg.connect(database.dsn)
    await take(holder)
    await holder.execute("UPDATE node SET expires_at = now() - interval '1 s'")
    await shards.become(other, "two", OTHER_BOOT, "b:1", 10.0)
    view = await shards.look(other)
    async with holder.transaction():
        held = await shards.renew_lease(holder, "one", BOOT, "a:1", 10.0)
        taking = asyncio.ensure_future(
            shards.take(other, "two", OTHER_BOOT, view.shards, orderly=False, crash_seconds=60)
        )
        await waits_for_a_lock(watcher)
        assert not taking.done()
    assert await taking == []
    assert await shards.renew_lease(holder, "one", BOOT, "a:1", 10.0) == held
    for each in (holder, watcher):
        await each.close()


async def test_a_takeover_does_not_end_the_connections_of_one_who_renewed(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    """`connection` is named as node one's."""
    await take(connection)
    await connection.execute("UPDATE node SET expires_at = now() - interval '1 s'")
    view = await shards.look(other)
    await shards.renew_lease(connection, "one", BOOT, "a:1", 10.0)
    await shards.become(other, "two", OTHER_BOOT, "b:1", 10.0)
    assert (
        await shards.take(other, "two", OTHER_BOOT, view.shards, orderly=False, crash_seconds=60)
        == []
    )
    assert await connection.fetchval("SELECT 1") == 1


async def test_nodes_that_take_from_each_other_at_once_do_not_wait_in_a_circle(
    database: Database, connection: asyncpg.Connection
) -> None:
    """Three nodes, all late, each takes what it can of the others'."""
    names = ("a", "b", "c")
    links = [await asyncpg.connect(database.dsn) for _ in names]
    for index, (name, link) in enumerate(zip(names, links, strict=True)):
        await take(link, name, BOOT, range(index * 20, index * 20 + 20))
    await connection.execute("UPDATE node SET expires_at = now() - interval '1 s'")
    view = await shards.look(connection)
    async with asyncio.timeout(10):
        taken = await asyncio.gather(
            *(
                shards.take(link, name, BOOT, view.shards, orderly=False, crash_seconds=60)
                for name, link in zip(names, links, strict=True)
            )
        )
    # No lease is alive, so the last one has all; what counts is that the log knows one holder each.
    last = await holders(connection)
    assert sum(len(numbers) for numbers in last.values()) == 64
    epochs = {s.shard: s.epoch for s in (await shards.look(connection)).shards}
    newest: dict[int, int] = {}
    for each in [each for some in taken for each in some]:
        newest[each.shard] = max(each.epoch, newest.get(each.shard, 0))
    assert newest == epochs
    for link in links:
        await link.close()


# Hand-off.


async def test_a_shard_is_given_to_the_node_named_which_takes_it_with_another_epoch(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    mine = await take(connection)
    await take(other, "two", OTHER_BOOT, ())
    given = [(9, mine[9].epoch, "two"), (3, mine[3].epoch, None), (4, mine[4].epoch - 1, "two")]
    assert sorted(await shards.release(connection, "one", given)) == [3, 9]
    held = await shards.renew_lease(connection, "one", BOOT, "a:1", 10.0)
    assert sorted(held) == sorted(set(range(64)) - {3, 9})
    view = await shards.look(other)
    assert [view.shards[n].node for n in (3, 4, 9)] == [None, "one", "two"]
    # It is nobody's yet: neither the old owner nor the new one may think that it holds it.
    assert await shards.renew_lease(other, "two", OTHER_BOOT, "b:1", 10.0) == {}
    taken = await take(other, "two", OTHER_BOOT)
    assert {number: each.epoch for number, each in taken.items()} == {
        3: mine[3].epoch + 1,
        9: mine[9].epoch + 1,
    }
    with pytest.raises(asyncpg.PostgresError) as caught:
        await connection.execute(shards.fence_statement([(9, mine[9].epoch)]))
    assert caught.value.sqlstate == FENCED
    await connection.execute("ROLLBACK")
    # What is not its own any more it cannot give a second time.
    assert await shards.release(connection, "one", given) == []
    assert await holders(connection) == {"one": set(range(64)) - {3, 9}, "two": {3, 9}}


async def test_a_shard_given_to_a_node_that_dies_before_it_took_it_is_taken_by_others(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    mine = await take(connection)
    await take(other, "two", OTHER_BOOT, ())
    await shards.release(connection, "one", [(9, mine[9].epoch, "two")])
    assert await take(connection, numbers={9}) == {}, "it is alive, and the shard is its"
    await shards.end(other, "two", OTHER_BOOT)
    assert set(await take(connection, numbers={9})) == {9}


async def test_everybody_is_told_when_shards_change_hands(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    told = asyncio.Queue[str]()
    await other.add_listener(shards.CHANNEL, hear := lambda *given: told.put_nowait(given[2]))

    async def heard() -> str:
        async with asyncio.timeout(10):
            return await told.get()

    mine = await take(connection)
    assert await heard() == shards.CHANNEL
    assert await shards.release(connection, "one", []) == []
    assert await take(connection, numbers=()) == {}
    assert await other.fetchval("SELECT 1") == 1
    assert told.empty()
    await shards.release(connection, "one", [(9, mine[9].epoch, None)])
    assert await heard() == shards.CHANNEL
    await shards.end(connection, "one", BOOT)
    assert await heard() == shards.CHANNEL
    await other.remove_listener(shards.CHANNEL, hear)


async def test_nodes_that_are_long_gone_are_forgotten_unless_they_hold_shards(
    connection: asyncpg.Connection,
) -> None:
    for name, numbers in (("gone", ()), ("holds", {3}), ("late", ())):
        await take(connection, name, OTHER_BOOT, numbers)
    await connection.execute("UPDATE node SET expires_at = now() - interval '25 h'")
    await connection.execute(
        "UPDATE node SET expires_at = now() - interval '23 h' WHERE name = 'late'"
    )
    await take(connection, "one", BOOT, {5})
    await shards.end(connection, "one", BOOT)
    names = [node.name for node in (await shards.look(connection)).nodes]
    assert names == ["holds", "late", "one"]


# Owners that crash over a shard.


async def crash(connection: asyncpg.Connection, name: str) -> None:
    """A node ends, and whoever watched it says so."""
    await connection.execute("UPDATE node SET expires_at = '-infinity' WHERE name = $1", name)


async def crashes(connection: asyncpg.Connection, shard: int = 5) -> tuple[int, bool]:
    view = (await shards.look(connection)).shards[shard]
    return view.crashes, view.held_back


async def takes_and_crashes(
    connection: asyncpg.Connection, times: int, *, seconds: float = 60.0, shard: int = 5
) -> list[bool]:
    """Nodes that each take a shard, say when something of it waits, and end; for each whether what it owed was held back."""
    held = []
    for number in range(times):
        name = f"n{number % 2}"
        (taken,) = (
            await take(connection, name, OTHER_BOOT, {shard}, crash_seconds=seconds)
        ).values()
        held.append(taken.held_back)
        if taken.held_back:
            await shards.mark_held_back(connection, [shard])
        await crash(connection, name)
    return held


@pytest.fixture
async def owing(connection: asyncpg.Connection) -> list[tuple[int, int]]:
    """Rows of shards 5 and 6, some due at once and some later: (shard, when due)."""
    rows = [(5, 0), (5, 100), (6, 0), (6, 100)]
    await connection.copy_records_to_table(
        "owed",
        records=[(s, n, 1, 7, 1024 + s, [1024 + s], 1, due, 1) for n, (s, due) in enumerate(rows)],
        columns=(
            "shard", "id", "tenant", "subscription", "first_sequence", "sequences", "attempt", "due_us", "cause",
        ),
    )  # fmt: skip
    return rows


async def due(connection: asyncpg.Connection) -> list[tuple[int, int]]:
    return [
        tuple(row) for row in await connection.fetch("SELECT shard, due_us FROM owed ORDER BY id")
    ]


async def test_a_shard_whose_owners_keep_crashing_comes_up_with_what_it_owes_held_back(
    connection: asyncpg.Connection, owing: list[tuple[int, int]]
) -> None:
    # The first takes it from nobody; then three follow on one that crashed.
    assert await takes_and_crashes(connection, 3) == [False, False, False]
    assert await crashes(connection) == (2, False)
    assert await due(connection) == owing
    assert await takes_and_crashes(connection, 1) == [True]
    assert await crashes(connection) == (0, True)
    assert await due(connection) == [
        (5, HELD_BACK_US),
        (5, HELD_BACK_US),
        (6, 0),
        (6, 100),
    ]
    # It may crash again: what came since is held back as well.
    await connection.execute("UPDATE owed SET due_us = 7 WHERE shard = 5 AND id = 1")
    assert await takes_and_crashes(connection, 3) == [False, False, True]
    assert (await due(connection))[:2] == [(5, HELD_BACK_US)] * 2


async def test_what_is_due_later_than_in_a_minute_keeps_its_time(
    connection: asyncpg.Connection, owing: list[tuple[int, int]]
) -> None:
    """It was not under way when the owners ended, and may wait for days yet."""
    now_us = await shards.database_clock_us(connection)
    soon_us, later_us = now_us + 40_000_000, now_us + 600_000_000
    await connection.execute("UPDATE owed SET due_us = $1 WHERE id IN (0, 2)", soon_us)
    await connection.execute("UPDATE owed SET due_us = $1 WHERE id IN (1, 3)", later_us)
    assert (await takes_and_crashes(connection, 4))[-1]
    assert await due(connection) == [(5, HELD_BACK_US), (5, later_us), (6, soon_us), (6, later_us)]
    # Once it is due, it may be what they crash over.
    await connection.execute("UPDATE owed SET due_us = $1 WHERE id = 1", now_us)
    assert (await takes_and_crashes(connection, 3))[-1]
    assert (await due(connection))[:2] == [(5, HELD_BACK_US)] * 2
    assert await shards.let_go(connection) == [5]
    assert await due(connection) == [(5, 0), (5, 0), (6, soon_us), (6, later_us)]


async def test_a_crash_long_after_the_takeover_does_not_count(
    connection: asyncpg.Connection, owing: list[tuple[int, int]]
) -> None:
    for _ in range(6):
        await takes_and_crashes(connection, 1)
        await connection.execute("UPDATE shard SET taken_at = taken_at - interval '61 s'")
    assert (await crashes(connection))[0] <= 1
    assert await takes_and_crashes(connection, 6, seconds=0.0) == [False] * 6
    assert not (await crashes(connection))[1]
    assert await due(connection) == owing


async def test_shards_that_were_released_do_not_count(
    connection: asyncpg.Connection, owing: list[tuple[int, int]]
) -> None:
    await takes_and_crashes(connection, 2)
    for number in range(6):
        name = f"m{number}"
        taken = await take(connection, name, OTHER_BOOT, {5}, crash_seconds=60.0)
        assert not taken[5].held_back
        assert await shards.release(connection, name, [(5, taken[5].epoch, None)]) == [5]
        await shards.end(connection, name, OTHER_BOOT)
    assert await crashes(connection) == (0, False)
    assert await due(connection) == owing
    # And it ended the row of crashes that there was.
    assert await takes_and_crashes(connection, 3) == [False] * 3


async def test_a_node_that_takes_its_own_up_again_in_order_did_not_crash(
    connection: asyncpg.Connection, owing: list[tuple[int, int]]
) -> None:
    """Its connection broke, or its database restarted."""
    for _ in range(6):
        taken = await take(connection, numbers={5}, orderly=True, crash_seconds=60.0)
        assert not taken[5].held_back
    assert await crashes(connection) == (0, False)
    # In another's name it does: that one may have crashed.
    for number in range(3):
        await crash(connection, "one")
        await crash(connection, f"m{number - 1}")
        taken = await take(
            connection, f"m{number}", OTHER_BOOT, {5}, orderly=True, crash_seconds=60.0
        )
    assert taken[5].held_back
    assert (await due(connection))[:2] == [(5, HELD_BACK_US)] * 2


async def test_a_process_that_starts_again_under_its_name_did_crash(
    connection: asyncpg.Connection,
) -> None:
    held = []
    for number in range(4):
        taken = await take(
            connection,
            "one",
            f"{number:08}-0000-0000-0000-000000000001",
            {5},
            crash_seconds=60.0,
        )
        held.append(taken[5].held_back)
    assert held == [False, False, False, True]


async def test_crashes_are_counted_by_shard(connection: asyncpg.Connection) -> None:
    await takes_and_crashes(connection, 3, shard=5)
    await takes_and_crashes(connection, 1, shard=6)
    taken = await take(connection, "last", OTHER_BOOT, {5, 6, 7}, crash_seconds=60.0)
    assert {number: each.held_back for number, each in taken.items()} == {
        5: True,
        6: False,
        7: False,
    }


async def test_what_is_held_back_is_let_go_once_and_its_owner_takes_it_anew(
    connection: asyncpg.Connection, other: asyncpg.Connection, owing: list[tuple[int, int]]
) -> None:
    await takes_and_crashes(connection, 4)
    taken = await take(connection, numbers={5, 6}, crash_seconds=60.0)
    await connection.execute(
        "INSERT INTO owed (shard, id, tenant, subscription, first_sequence, sequences, attempt, due_us, cause)"
        " VALUES (5, 9, 1, 7, 1029, '{1029}', 1, 55, 1)"
    )
    assert await shards.let_go(other, 6) == []
    assert await shards.let_go(other, 5) == [5]
    assert await due(connection) == [(5, 0), (5, 0), (6, 0), (6, 100), (5, 55)]
    assert await crashes(connection) == (0, False)
    assert await shards.let_go(other, 5) == []
    # The owner counts its rows in memory: it must read them anew.
    with pytest.raises(asyncpg.PostgresError) as caught:
        await connection.execute(shards.fence_statement([(5, taken[5].epoch)]))
    assert caught.value.sqlstate == FENCED
    await connection.execute("ROLLBACK")
    known = await shards.renew_lease(connection, "one", BOOT, "a:1", 10.0)
    assert 5 not in known
    assert known[6] == taken[6].epoch
    again = await take(connection, numbers={5}, crash_seconds=60.0)
    assert not again[5].held_back
    assert again[5].epoch > taken[5].epoch
    assert await crashes(connection) == (0, False), "it was no crash"


async def test_what_is_let_go_waits_for_a_record_that_is_under_way(
    connection: asyncpg.Connection, other: asyncpg.Connection, owing: list[tuple[int, int]]
) -> None:
    await takes_and_crashes(connection, 4)
    taken = await take(connection, numbers={5}, crash_seconds=60.0)
    await connection.execute(shards.fence_statement([(5, taken[5].epoch)]))
    await other.execute("SET lock_timeout = '50ms'")
    with pytest.raises(asyncpg.LockNotAvailableError):
        await shards.let_go(other, 5)
    await connection.execute("COMMIT")
    assert (await crashes(connection))[1]
    assert await shards.let_go(other, 5) == [5]


async def test_all_that_is_held_back_is_let_go_at_once(
    connection: asyncpg.Connection, owing: list[tuple[int, int]]
) -> None:
    for shard in (5, 6):
        await takes_and_crashes(connection, 4, shard=shard)
    assert [each for _, each in await due(connection)] == [HELD_BACK_US] * 4
    assert await shards.let_go(connection) == [5, 6]
    assert await due(connection) == [(5, 0), (5, 0), (6, 0), (6, 0)]
    assert await shards.let_go(connection) == []


async def test_what_is_held_back_is_let_go_though_its_owner_crashed_before_it_said_so(
    connection: asyncpg.Connection, owing: list[tuple[int, int]]
) -> None:
    """Or it would wait for ever, and nobody would know."""
    await takes_and_crashes(connection, 3)
    taken = await take(connection, "last", OTHER_BOOT, {5}, crash_seconds=60.0)
    assert taken[5].held_back
    await crash(connection, "last")
    await take(connection, numbers={5}, crash_seconds=60.0)
    assert await shards.let_go(connection) == [5]
    assert await due(connection) == [(5, 0), (5, 0), (6, 0), (6, 100)]
