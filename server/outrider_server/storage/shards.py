"""Shards and the node that holds them: lease, takeover, fence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from outrider_server.storage.database import BOOT_MARK_LENGTH, Connection, boot_mark
from outrider_server.storage.queries import load

FENCED = "OR001"
"""SQLSTATE that fence() raises when another node took a shard over."""


@dataclass(frozen=True, slots=True)
class TakenShard:
    """A shard as it stood at takeover; `epoch` is the new one."""

    shard: int
    epoch: int
    checkpoint: int
    record_no: int


@dataclass(frozen=True, slots=True)
class FreeShards:
    """What a node may take: whether any shard is its own or nobody's, and the leases of others that have expired."""

    unowned: bool
    expired: frozenset[tuple[object, ...]]


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


async def find_free(connection: Connection, node: str) -> FreeShards:
    """What `node` may take now."""
    rows = await connection.fetch(load("find_free_shards"), node)
    leases = [tuple(row) for row in rows]
    return FreeShards(
        unowned=any(lease[0] is None for lease in leases),
        expired=frozenset(lease for lease in leases if lease[0] is not None),
    )


async def take_over(
    connection: Connection,
    node: str,
    boot: str,
    address: str,
    lease_seconds: float,
    *,
    again: bool = False,
) -> list[TakenShard]:
    """Become `node`, and take every shard that is free, its own, or of an expired lease.

    A later boot replaces an earlier one. `again`: this boot was the node before; raises `LeaseLost` when another took
    its place since, or two processes of one name would replace each other for ever.

    First the old owners' connections are ended, then the epochs raised under the exclusive locks that their fences
    share. Lock order: shards ascending.
    """
    async with connection.transaction():
        name = await connection.fetchval(
            load("take_node"), node, boot, lease_seconds, address, again
        )
    if name is None:
        raise LeaseLost(node)
    rows = await connection.fetch(load("free_shards"), node)
    holders = sorted({row["node"] for row in rows if row["node"] is not None} | {node})
    await connection.execute(load("terminate_backends"), holders, boot_mark(boot))
    shards = [row["shard"] for row in rows]
    async with connection.transaction():
        await connection.execute(load("lock_shards"), shards)
        taken = await connection.fetch(load("take_shards"), shards, node)
    return [TakenShard(*row) for row in sorted(taken, key=lambda row: int(row["shard"]))]


async def renew_lease(
    connection: Connection, node: str, boot: str, address: str, lease_seconds: float
) -> None:
    """Renew the lease; raises `LeaseLost` when another boot of this name took it."""
    if await connection.fetchrow(load("renew_lease"), node, boot, lease_seconds, address) is None:
        raise LeaseLost(node)


async def release(connection: Connection, node: str, boot: str) -> None:
    """End the lease now."""
    await connection.execute(load("release_node"), node, boot)
