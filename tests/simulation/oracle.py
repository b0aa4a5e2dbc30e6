"""What must hold, watched while the world goes on and once more at its end.

- An acknowledgement names only rows that are stored and durable; a frame that is acknowledged twice names the same ids; an
  event is stored once for each session it was sent in, and once in all where it has an idempotency key.
- An event matches what was configured: no subscription is missed whose creation was answered before the event was sent.
- A request starts only under the lease, by the owner of the shard, for what the log does not say is settled; never twice at
  once in a tenure, never after its 2xx in the same tenure. So what arrives twice is what was in flight or not recorded when a
  tenure ended.
- In a lane of concurrency 1, first starts of one key come in the order of publication.
- The balance is zero at every moment. The store itself tells of writes without a fence or under an old epoch.
- In the end everything that matched is delivered (and a receiver said so), dead (after as many failures as its policy
  allows) or cancelled (because its subscription was deleted), and nobody keeps room that he took.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import orjson
from tests.simulation.node import SimulatedNode
from tests.simulation.store import Store
from tests.simulation.twins import balance

from outrider_server.domain.outcome import Verdict

Named = tuple[int, int]
"""A delivery: (sequence, subscription)."""

FOLLOW_SECONDS = 5.0

_DELIVERY = re.compile(rb'\{"id":"dlv_(\d+)_(\d+)"')


class Violation(Exception):
    """The world broke a promise."""


@dataclass(slots=True)
class Sent:
    """An event that was published: in how many sessions, and when it was first sent."""

    tenant: int
    type: str
    key: str
    idempotent: bool
    poison: bool
    at: float
    sessions: set[tuple[str, int]] = field(default_factory=set)


@dataclass(slots=True)
class Subscribed:
    """What is known of a subscription outside: when its creation and deletion were asked for and answered."""

    id: int
    tenant: int
    endpoint: int
    types: tuple[str, ...]
    created_at: float | None
    deleting: bool = False

    def wants(self, type_: str) -> bool:
        """Whether its patterns match."""
        return any(
            pattern in ("*", type_) or (pattern.endswith(".*") and type_.startswith(pattern[:-1]))
            for pattern in self.types
        )


def deliveries_in(body: bytes) -> list[Named]:
    """The deliveries that a request carries, by their ids."""
    return [
        (int(sequence), int(subscription)) for sequence, subscription in _DELIVERY.findall(body)
    ]


def ids_of(ack: Any, tenants: list[str]) -> list[int | None]:
    """The ids of a frame's events by the rule of the contract; None for a refused one."""
    told = {result.index: result for result in ack.results}
    following = {
        r.tenant: iter(range(r.first, r.first + r.count * r.step, r.step)) for r in ack.ids
    }
    ids: list[int | None] = []
    for index, tenant in enumerate(tenants):
        if index in told:
            ids.append(told[index].id if told[index].HasField("id") else None)
        else:
            ids.append(next(following.get(tenant, iter(())), 0))
    return ids


class Oracle:
    """Knows what was published, configured, sent and received; `violate` ends the run."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.sent: dict[int, Sent] = {}
        self.subscriptions: dict[int, Subscribed] = {}
        self.attempts_max: dict[int, int] = {}
        self.single: set[int] = set()
        self.split: set[int] = set()
        self.received: dict[Named, int] = defaultdict(int)
        self.failures: dict[Named, int] = defaultdict(int)
        self.thawed: dict[str, tuple[float, float]] = {}
        self._acked: dict[tuple[str, int, int], list[int | None]] = {}
        self._open: set[tuple[str, int, Named]] = set()
        self._done: set[tuple[str, int, Named]] = set()
        self._first: dict[tuple[int, str], int] = {}
        self._started: set[Named] = set()
        self.acks = 0
        self.requests = 0
        self.repeated = 0

    def violate(self, text: str) -> None:
        """A promise is broken."""
        self.store.loop.note("VIOLATION", text)
        self.store.loop.halt(Violation(text))

    # Publishing.

    def acked(self, producer: str, session: int, frame: Any, ack: Any, numbers: list[int]) -> None:
        """The node says that a frame is durable."""
        self.acks += 1
        ids = ids_of(ack, [event.tenant or frame.tenant for event in frame.events])
        for event, number, sequence in zip(frame.events, numbers, ids, strict=True):
            self.acked_event(number, sequence, event.idempotency_key)
        key = (producer, session, frame.number)
        if self._acked.setdefault(key, ids) != ids:
            self.violate(f"frame {key} was acknowledged with {self._acked[key]}, then with {ids}")

    def acked_event(self, number: int, sequence: int | None, idempotency_key: str) -> None:
        """The node says that an event is durable."""
        sent = self.sent[number]
        if sequence is None:
            if not sent.poison:
                self.violate(f"event {number} was refused for good")
            return
        row = self.store.tables["event"].get((sent.tenant, sequence))
        if row is None or not self.store.is_durable("event", (sent.tenant, sequence)):
            self.violate(f"event {number} was acknowledged as {sequence}, which is not durable")
            return
        if orjson.loads(row["data"])["n"] != number:
            self.violate(f"event {number} was acknowledged as {sequence}, which is another one")

    # Delivering.

    def started(self, node: SimulatedNode, endpoint: int, named: list[Named]) -> None:
        """A request starts."""
        self.requests += 1
        now = self.store.now()
        thawed_at, frozen_at = self.thawed.get(node.life.name, (-1.0, -1.0))
        # A process that is stopped between its look at the clock and its request cannot know it.
        excused = thawed_at == now and node.checked_at == frozen_at
        if not excused and not node.lease.holds():
            self.violate(f"{node.life.name} starts a request after its lease ended")
        tenure = (node.life.name, node.tenures)
        shards, settled = self.store.tables["shard"], self.store.tables["settled"]
        for each in named:
            if not excused:
                if each in settled:
                    self.violate(f"{node.life.name} sends {each}, which the log says is settled")
                holder = shards[each[0] & 1023].node
                if holder != node.name:
                    self.violate(f"{node.life.name} sends {each} of a shard that {holder} holds")
            if (*tenure, each) in self._open:
                self.violate(f"{node.life.name} sends {each} twice at once")
            if (*tenure, each) in self._done:
                self.violate(f"{node.life.name} sends {each} again after its 2xx")
            self._open.add((*tenure, each))
            if each in self._started:
                self.repeated += 1
                continue
            self._started.add(each)
            self._in_order(each, endpoint)

    def _in_order(self, each: Named, endpoint: int) -> None:
        sequence, subscription = each
        if endpoint not in self.single or self.store.held_back:
            return  # what waits for a person comes when that person lets it go
        tenant = self.subscriptions[subscription].tenant
        row = self.store.tables["event"].get((tenant, sequence))
        if row is None:
            self.violate(f"{each} is sent and not stored")
            return
        lane = (subscription, row["key"] or "")
        if sequence < self._first.get(lane, 0):
            self.violate(f"{each} is sent after a later event of key {lane[1]}")
        self._first[lane] = sequence

    def ended(self, node: SimulatedNode, tenure: int, named: list[Named], verdict: Verdict) -> None:
        """A request's outcome reached its node."""
        for each in named:
            key = (node.life.name, tenure, each)
            self._open.discard(key)
            if verdict is Verdict.DELIVERED:
                self._done.add(key)
            else:
                self.failures[each] += 1

    # Any time, and in the end.

    def look(self) -> None:
        """What holds at every moment."""
        for tenant, of in balance(self.store).items():
            if of.difference():
                self.violate(f"the balance of tenant {tenant} is off by {of.difference()}: {of}")

    def is_settled(self) -> bool:
        """Whether nothing is open or owed any more."""
        tables = self.store.tables
        return not tables["owed"] and all(
            sequence <= tables["shard"][sequence & 1023].checkpoint
            for _, sequence in tables["event"]
        )

    def end(self, nodes: list[SimulatedNode]) -> None:
        """Everything is quiet: whether all was kept."""
        self.look()
        tables = self.store.tables
        rows: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for row in tables["event"].values():
            number = orjson.loads(row["data"])["n"]
            rows[number].append(row)
            self._matched(number, row)
            for subscription in row["targets"]:
                self._ended_well((row["sequence"], subscription))
        for number, sent in self.sent.items():
            stored = len(rows[number])
            if stored > (1 if sent.idempotent else len(sent.sessions)):
                self.violate(f"event {number} is stored {stored} times")
        for ids in self._acked.values():
            for sequence in ids:
                if sequence and not any(key[1] == sequence for key in tables["event"]):
                    self.violate(f"event {sequence} was acknowledged and is gone")
        for node in nodes:
            if node.leaks():
                self.violate(
                    f"{node.life.name} keeps {node.leaks()} bytes of room that nobody uses"
                )

    def _matched(self, number: int, row: dict[str, Any]) -> None:
        sent = self.sent[number]
        # Who holds a shard of a tenant that lives elsewhere learns of changes a little later.
        grace = FOLLOW_SECONDS if sent.tenant in self.split else 0.0
        for subscription in self.subscriptions.values():
            wanted = subscription.tenant == sent.tenant and subscription.wants(sent.type)
            told = subscription.id in row["targets"]
            if told and not wanted:
                self.violate(f"event {number} matched subscription {subscription.id}")
            if (
                wanted
                and not told
                and not subscription.deleting
                and subscription.created_at is not None
                and subscription.created_at + grace < sent.at
            ):
                self.violate(f"event {number} missed subscription {subscription.id}")

    def _ended_well(self, each: Named) -> None:
        verdict = self.store.tables["settled"].get(each)
        subscription = self.subscriptions[each[1]]
        if verdict is None:
            self.violate(f"{each} is lost")
        elif verdict == 1:
            if not self.received[each]:
                self.violate(f"{each} is noted as delivered, and nobody got it")
        elif verdict == 4:
            if not subscription.deleting:
                self.violate(f"{each} was cancelled, and nobody asked for that")
        elif self.failures[each] < self.attempts_max[subscription.endpoint]:
            self.violate(f"{each} is dead after {self.failures[each]} failures")
