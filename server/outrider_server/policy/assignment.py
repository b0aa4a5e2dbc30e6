"""Assignment: which shards a node takes, and which it gives away.

Rules:
- Live nodes share the shards evenly. A node takes what is free up to its fair share at once; what is free beyond it only
  after a while, so that nodes which start together each find their share.
- A lease of others counts as over when it was seen expired, unchanged, for a whole renewal: who is only late, or comes
  back with its database, keeps what it has. A lease that was ended (`dead`) needs no waiting.
- A node with more than its share gives one shard at a time to the node with the fewest.

Pure: times are seconds of the caller's monotonic clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b

from outrider_server.domain.sequence import SHARD_COUNT

GRACE_RENEWALS = 2
"""For so many renewals a free shard is left to nodes that have less than their share."""


@dataclass(frozen=True, slots=True)
class ShardView:
    """A shard and the lease it is held under. `node` None: nobody's. `lease` changes when its holder renews it."""

    shard: int
    epoch: int
    node: str | None
    live: bool
    dead: bool
    lease: tuple[object, ...] = ()
    crashes: int = 0
    held_back: bool = False


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node. `seconds`: how long its lease still holds."""

    name: str
    address: str
    live: bool
    draining: bool = False
    started_at: datetime | None = None
    seconds: float = 0.0

    @property
    def takes(self) -> bool:
        """Whether it can be given shards."""
        return self.live and not self.draining


@dataclass(frozen=True, slots=True)
class View:
    """Who holds what at a moment."""

    shards: tuple[ShardView, ...]
    nodes: tuple[NodeView, ...]

    def others(self, node: str) -> list[NodeView]:
        """The nodes beside `node` that can be given shards."""
        return [other for other in self.nodes if other.takes and other.name != node]


class Assignment:
    """One node's part in who holds what. `workers`: how many nodes its supervisor starts."""

    def __init__(self, node: str, workers: int, renew_seconds: float) -> None:
        self._node = node
        self._workers = workers
        self._renew_seconds = renew_seconds
        self._over: dict[int, tuple[tuple[object, ...], float]] = {}
        self._free: dict[int, float] = {}

    def share(self, view: View) -> int:
        """How many shards this node should hold at most."""
        nodes = max(1 + len(view.others(self._node)), self._workers)
        return -(-SHARD_COUNT // nodes)

    def to_take(self, view: View, now: float, held: Collection[int]) -> list[ShardView]:
        """What to take now. Call it at every look: it remembers since when a shard is free."""
        own: list[ShardView] = []
        free: list[ShardView] = []
        for shard in view.shards:
            if shard.shard in held:
                self._forget(shard.shard)
            elif shard.node == self._node:
                own.append(shard)
            elif self._is_free(shard, now):
                free.append(shard)
                self._free.setdefault(shard.shard, now)
            else:
                self._free.pop(shard.shard, None)
        room = max(0, self.share(view) - len(held) - len(own))
        # Nodes that start together must not all want the same ones first.
        free.sort(key=lambda shard: blake2b(f"{self._node}/{shard.shard}".encode()).digest())
        taken = own + free[:room]
        grace = GRACE_RENEWALS * self._renew_seconds
        taken += [shard for shard in free[room:] if now - self._free[shard.shard] >= grace]
        return taken

    def to_give(
        self, view: View, held: Collection[int], avoid: Collection[int] = ()
    ) -> tuple[int, str] | None:
        """A shard to hand off, and to whom; None when the shares are even, or every shard is one to `avoid`."""
        others = view.others(self._node)
        counts = Counter(shard.node for shard in view.shards if shard.node is not None)
        if not others:
            return None
        target = min(others, key=lambda other: (counts[other.name], other.name))
        given = max((shard for shard in held if shard not in avoid), default=None)
        if given is None or len(held) - counts[target.name] < 2:
            return None
        return given, target.name

    def spread(self, view: View, held: Collection[int]) -> dict[int, str | None]:
        """To whom each shard goes when this node drains; None: to nobody, there is no other."""
        counts = Counter(shard.node for shard in view.shards if shard.node is not None)
        names = [other.name for other in view.others(self._node)]
        given: dict[int, str | None] = {}
        for shard in sorted(held):
            target = min(names, key=lambda name: (counts[name], name), default=None)
            given[shard] = target
            if target is not None:
                counts[target] += 1
        return given

    def waits_for(self, view: View, held: Collection[int]) -> str:
        """Why a node without shards has none, in words; empty when nothing is amiss."""
        if held or any(shard.live for shard in view.shards if shard.node != self._node):
            return ""
        return "another node holds the shards"

    def _is_free(self, shard: ShardView, now: float) -> bool:
        if shard.node is None or shard.dead:
            return True
        if shard.live:
            self._over.pop(shard.shard, None)
            return False
        lease, since = self._over.get(shard.shard, (None, now))
        if lease != shard.lease:
            self._over[shard.shard] = (shard.lease, now)
            return False
        return now - since >= self._renew_seconds

    def _forget(self, shard: int) -> None:
        self._over.pop(shard, None)
        self._free.pop(shard, None)
