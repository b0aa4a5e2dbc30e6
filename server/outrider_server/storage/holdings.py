"""Who holds what, for people: nodes with their leases, shards with what waits in them."""

from __future__ import annotations

from dataclasses import dataclass

from outrider_server.domain.delivery import HELD_BACK_US
from outrider_server.policy.assignment import NodeView
from outrider_server.storage import shards
from outrider_server.storage.database import Connection
from outrider_server.storage.queries import load


@dataclass(frozen=True, slots=True)
class Holding:
    """A shard: its owner and epoch, the events in its window, the deliveries it owes and those held back of them.

    `lag_seconds`: the age of the oldest delivery that waits for nothing but its turn; None where none does.
    """

    shard: int
    node: str | None
    epoch: int
    crashes: int
    window: int
    owed: int
    held_back: int
    lag_seconds: float | None


async def read(connection: Connection) -> tuple[tuple[NodeView, ...], list[Holding]]:
    """Every node and every shard."""
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        nodes = (await shards.look(connection)).nodes
        rows = await connection.fetch(load("read_holdings"), HELD_BACK_US)
    return nodes, [Holding(*row) for row in rows]
