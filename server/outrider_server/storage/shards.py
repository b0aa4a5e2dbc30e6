"""Shards and the nodes that hold them: leases, takeover, hand-off, fence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import asyncpg

from outrider_server.domain.delivery import HELD_BACK_US
from outrider_server.policy.assignment import NodeView, ShardView, View
from outrider_server.storage.database import BOOT_MARK_LENGTH, Connection, boot_mark
from outrider_server.storage.queries import load

FENCED = "OR001"
"""SQLSTATE that fence() raises when another node took a shard over."""


CHANNEL = "outrider_shards"
"""Told when shards change hands, so that nobody waits for the next look."""

CRASHES_MAX = 3
"""Owners in a row that may end over a shard without releasing it, before what it owes is held back (see `take`)."""


@dataclass(frozen=True, slots=True)
class TakenShard:
    """A shard as it stood at takeover; `epoch` is the new one. `held_back`: its owners kept crashing."""

    shard: int
    epoch: int
    checkpoint: int
    record_no: int
    held_back: bool = False


class LeaseLost(Exception):
    """Another boot of this node's name holds the lease."""

    def __init__(self, node: str) -> None:
        super().__init__(
            f"another process runs as node {node!r}: give this one another node_name, or stop that one first"
        )


def fence_statement(epochs: Iterable[tuple[int, int]]) -> str:
    """`BEGIN` and the fence of these (shard, epoch) pairs as one simple query: one round trip.

    Only integers enter the text.
    """
    pairs = sorted(epochs)
    shards = ",".join(str(int(shard)) for shard, _ in pairs)
    numbers = ",".join(str(int(epoch)) for _, epoch in pairs)
    return f"BEGIN; SELECT fence('{{{shards}}}'::smallint[], '{{{numbers}}}'::bigint[])"


def is_fenced(error: BaseException) -> bool:
    """Whether fence() refused a write: another took a shard over, which says nothing against what the shard owes."""
    return isinstance(error, asyncpg.PostgresError) and error.sqlstate == FENCED


async def is_held(connection: Connection, shard: int, epoch: int) -> bool:
    """Whether a shard is still held under this epoch; until the transaction ends it stays so."""
    try:
        async with connection.transaction():
            await connection.execute("SELECT fence($1::smallint[], $2::bigint[])", [shard], [epoch])
    except asyncpg.PostgresError as error:
        if is_fenced(error):
            return False
        raise
    return True


async def database_clock_us(connection: Connection) -> int:
    """The database's time, in microseconds since 1970."""
    return int(
        await connection.fetchval(
            "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
        )
    )


async def has_incumbent(connection: Connection, node: str, boot: str) -> bool:
    """Whether another boot of this name holds a lease and still has connections."""
    return bool(await connection.fetchval(load("has_incumbent"), node, boot, BOOT_MARK_LENGTH))


async def look(connection: Connection) -> View:
    """Who holds what at the moment."""
    nodes = await connection.fetch(load("read_nodes"))
    rows = await connection.fetch(load("read_shards"))
    return View(
        tuple(
            ShardView(
                row["shard"],
                row["epoch"],
                row["node"],
                row["live"],
                row["dead"],
                (row["node"], row["boot"], row["expires_at"]),
                row["crashes"],
                row["held_back"],
            )
            for row in rows
        ),
        tuple(
            NodeView(
                row["name"],
                row["address"],
                row["live"],
                row["draining"],
                row["started_at"],
                row["seconds"],
            )
            for row in nodes
        ),
    )


async def become(
    connection: Connection,
    node: str,
    boot: str,
    address: str,
    lease_seconds: float,
    *,
    again: bool = False,
) -> None:
    """Take the lease of `node`; a later boot replaces an earlier one.

    `again`: this boot was the node before; raises `LeaseLost` when another took its place since, or two processes of one
    name would replace each other for ever.
    """
    name = await connection.fetchval(load("take_node"), node, boot, lease_seconds, address, again)
    if name is None:
        raise LeaseLost(node)


async def take(
    connection: Connection,
    node: str,
    boot: str,
    wanted: Iterable[ShardView],
    *,
    orderly: bool,
    crash_seconds: float,
) -> list[TakenShard]:
    """Take those of the `wanted` shards that are still free, this node's own, or of an expired lease.

    First the leases of their holders are held still, so that none is renewed meanwhile, and the connections of those
    that are over are ended; then the epochs are raised under the exclusive locks that the old owners' fences share.
    `orderly`: this boot held its own shards before and lost them to no fault of theirs. Owners that end within
    `crash_seconds` of their takeover count as crashed over a shard (0: never); after `CRASHES_MAX` of them what it owes
    within the next minute is held back, and later retries keep their time.
    Lock order: nodes by name, shards ascending.
    """
    views = list(wanted)
    numbers = sorted(view.shard for view in views)
    if not numbers:
        return []
    holders = sorted({view.node for view in views if view.node not in (None, node)})
    async with connection.transaction():
        await connection.execute(load("lock_nodes"), holders)
        await connection.execute(load("terminate_backends"), holders, node, boot_mark(boot))
        await connection.execute(load("lock_shards"), numbers)
        taken = await connection.fetch(load("take_shards"), numbers, node, orderly, crash_seconds)
        crashed = [row["shard"] for row in taken if row["crashes"] >= CRASHES_MAX]
        if crashed:
            await connection.execute(load("hold_back"), crashed, HELD_BACK_US)
        await connection.execute("SELECT pg_notify($1, '')", CHANNEL)
    return [
        TakenShard(
            row["shard"],
            row["epoch"],
            row["checkpoint"],
            row["record_no"],
            row["shard"] in crashed,
        )
        for row in sorted(taken, key=lambda row: int(row["shard"]))
    ]


async def mark_held_back(connection: Connection, held_back: list[int]) -> None:
    """Note that something of these shards waits for a person."""
    await connection.execute(load("mark_held_back"), held_back)


async def renew_lease(
    connection: Connection,
    node: str,
    boot: str,
    address: str,
    lease_seconds: float,
    *,
    draining: bool = False,
) -> dict[int, int]:
    """Renew the lease; returns the epochs of the shards that the node holds.

    Asked for after the renewal: a takeover that was under way has ended by then. Raises `LeaseLost` when another boot of
    this name took the lease.
    """
    row = await connection.fetchrow(
        load("renew_lease"), node, boot, lease_seconds, address, draining
    )
    if row is None:
        raise LeaseLost(node)
    return {row["shard"]: row["epoch"] for row in await connection.fetch(load("held_shards"), node)}


async def release(
    connection: Connection, node: str, given: Iterable[tuple[int, int, str | None]]
) -> list[int]:
    """Give (shard, epoch, to whom) up in order, and tell everybody; returns those that were still this node's."""
    columns = [list(column) for column in zip(*sorted(given), strict=True)]
    if not columns:
        return []
    async with connection.transaction():
        rows = await connection.fetch(load("release_shards"), *columns, node)
        await connection.execute("SELECT pg_notify($1, '')", CHANNEL)
    return [row["shard"] for row in rows]


async def end(connection: Connection, node: str, boot: str) -> None:
    """End the lease now."""
    await connection.execute(load("release_node"), node, boot)
    await connection.execute("SELECT pg_notify($1, '')", CHANNEL)


async def let_go(connection: Connection, shard: int | None = None) -> list[int]:
    """Let what a shard (None: any) holds back be sent; its owner takes it anew. Returns those that held something back."""
    async with connection.transaction():
        rows = await connection.fetch(load("find_held_back"), shard, HELD_BACK_US)
        held_back = [row["shard"] for row in rows]
        if held_back:
            await connection.execute(load("lock_shards"), held_back)
            await connection.execute(load("let_go"), held_back, HELD_BACK_US)
            await connection.execute(load("raise_epochs"), held_back)
    return held_back
