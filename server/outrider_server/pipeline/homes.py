"""Homes: where tenants live, as far as this node knows. Refreshed by looks at the log, and when somebody says it is wrong.

What is known here may be late: the node that is asked always decides by what it holds itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

from outrider_server.domain.sequence import SHARD_COUNT
from outrider_server.policy.assignment import View

TENANTS_MAX = 100_000
"""Tenants remembered; beyond it all are forgotten and asked for again."""

Find = Callable[
    [Collection[str], Collection[int]], Awaitable[list[tuple[int, str, tuple[int, ...]]]]
]
"""(id, name, shards) of the tenants of these names or ids, from the log."""


@dataclass(frozen=True, slots=True)
class Home:
    """A tenant and the shards that its events are spread over, its home first."""

    id: int
    name: str
    shards: tuple[int, ...]


class Homes:
    """Tenants by name and number, and the address of each shard's node."""

    def __init__(self, node: str, find: Find) -> None:
        self._node = node
        self._find = find
        self.by_name: dict[str, Home] = {}
        self.by_id: dict[int, Home] = {}
        self.view = View((), ())
        self._addresses: list[str | None] = [None] * SHARD_COUNT
        self._asking: dict[tuple[tuple[str, ...], tuple[int, ...]], asyncio.Future[set[str]]] = {}

    def looked(self, view: View) -> None:
        """Take over what a look at the log showed."""
        self.view = view
        live = {node.name: node.address for node in view.nodes if node.live}
        for shard in view.shards:
            address = live.get(shard.node) if shard.node is not None else None
            self._addresses[shard.shard] = address if shard.node != self._node else None

    def address_of(self, shard: int) -> str | None:
        """Where the other node that holds a shard listens; None where it is nobody's, or this node's own."""
        return self._addresses[shard]

    def forget(self, names: Collection[str]) -> None:
        """These tenants do not live where it was thought."""
        for name in names:
            home = self.by_name.pop(name, None)
            if home is not None:
                self.by_id.pop(home.id, None)

    async def look_up(self, names: Collection[str] = (), ids: Collection[int] = ()) -> set[str]:
        """Ask the log for tenants that are not known; returns the names that exist. The others stay unknown."""
        key = (tuple(sorted(names)), tuple(sorted(ids)))
        asking = self._asking.get(key)
        if asking is None:
            asking = self._asking[key] = asyncio.ensure_future(self._look_up(names, ids))
            asking.add_done_callback(lambda _: self._asking.pop(key, None))
        return await asyncio.shield(asking)

    async def _look_up(self, names: Collection[str], ids: Collection[int]) -> set[str]:
        found = await self._find(names, ids)
        if len(self.by_name) + len(found) > TENANTS_MAX:
            self.by_name.clear()
            self.by_id.clear()
        for number, name, shards in found:
            self.by_name[name] = self.by_id[number] = Home(number, name, shards)
        return {name for _, name, _ in found}
