"""Owed rows of deleted subscriptions are cancelled page by page, each page in a record, and only those."""

from __future__ import annotations

import asyncpg
from tests.support.node import RunningNode
from tests.support.storage import owed, sequences

from outrider_server.domain.delivery import OwedInsert


async def insert(node: RunningNode, rows: list[OwedInsert]) -> None:
    connection = await asyncpg.connect(node.dsn)
    await connection.copy_records_to_table(
        "owed",
        records=[
            (r.shard, r.id, r.tenant, r.subscription, r.sequences[0], r.sequences, r.attempt, r.due_us, 1)
            for r in rows
        ],
        columns=(
            "shard", "id", "tenant", "subscription", "first_sequence", "sequences", "attempt", "due_us", "cause",
        ),
    )  # fmt: skip
    await connection.close()


async def test_a_start_cancels_what_subscriptions_that_are_gone_are_owed(
    node: RunningNode,
) -> None:
    await node.tenant()
    (tenant,) = await node.fetch("SELECT id, shard FROM tenant")
    await node.stop()
    named = sequences(900, tenant["shard"])
    # More than two pages, some of them retries that are due much later.
    rows = [
        owed(tenant["id"], tenant["shard"], i, 77 + i % 2, *named[2 * i : 2 * i + 2], due_us=i % 3 * 10**18)
        for i in range(450)
    ]  # fmt: skip
    await insert(node, rows)
    await node.fetch(
        "INSERT INTO ledger_sum VALUES ($1, 900, 0, 0, 0)", tenant["id"]
    )  # what matched them
    await node.start()
    balance = await node.balance_when(lambda b: b.cancelled == 900)
    assert balance.owed == 0
    assert not await node.fetch("SELECT FROM owed")
    dead = await node.fetch(
        "SELECT subscription, sum(cardinality(sequences)) AS n FROM dead_letter GROUP BY 1"
    )
    assert {row["subscription"]: row["n"] for row in dead} == {77: 450, 78: 450}
