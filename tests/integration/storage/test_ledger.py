"""The balance: what matched is delivered, dead, cancelled, owed or in the window, at any moment."""

from __future__ import annotations

import asyncpg
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

from outrider_server.domain.outcome import Verdict
from outrider_server.policy.obligations import ShardRecord
from outrider_server.storage import records
from outrider_server.storage.ledger import Balance, balance


async def test_the_balance_adds_ledger_sums_owed_rows_and_the_window(
    connection: asyncpg.Connection,
) -> None:
    await make_partitions(connection)
    tenant, other = await make_tenant(connection), await make_tenant(connection, "other", 6)
    taken = await take(connection)
    assert await balance(connection) == [
        Balance("demo", 0, 0, 0, 0, 0, 0),
        Balance("other", 0, 0, 0, 0, 0, 0),
    ]
    named = sequences(6)
    await store(
        connection,
        *(made_event(tenant, s, 1, 2) for s in named),
        made_event(other, named[0] + 1, 3),
    )
    assert await balance(connection) == [
        Balance("demo", 12, 0, 0, 0, 0, 12),
        Balance("other", 1, 0, 0, 0, 0, 1),
    ]
    await records.write(
        connection,
        plan(
            # The checkpoint passes the first three events; of the others some is settled already.
            ShardRecord(
                5, taken[5].epoch, 1, named[2], {tenant: 6}, {tenant: 4}, {tenant: 1}, {tenant: 1}
            ),
            attempts=[
                attempt(tenant, 5, (named[0], 1), (named[1], 1), (named[0], 2), (named[3], 2)),
                attempt(tenant, 5, (named[5], 1), verdict=Verdict.RETRY),
            ],
            dead_letters=[
                dead(tenant, 5, 2, named[1]),
                dead(tenant, 5, 1, named[3], cancelled=True),
            ],
            owed_inserts=[
                owed(tenant, 5, 1 << 20, 1, named[2], named[4]),
                owed(tenant, 5, (1 << 20) + 1, 2, named[2]),
            ],
        ),
        lambda _: named[5],
    )
    found = await balance(connection)
    assert found == [
        Balance("demo", 12, 4, 1, 1, 3, 3),
        Balance("other", 1, 0, 0, 0, 0, 1),
    ]
    assert all(row.holds() for row in found)
    await connection.execute("INSERT INTO ledger_sum VALUES ($1, 10, 7, 2, 1)", tenant)
    assert (await balance(connection))[0] == Balance("demo", 22, 11, 3, 2, 3, 3)
    await connection.execute("DELETE FROM owed WHERE subscription = 2")
    assert (await balance(connection))[0].difference() == 1
    assert not (await balance(connection))[0].holds()
