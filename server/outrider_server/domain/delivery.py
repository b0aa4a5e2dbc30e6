"""Deliveries: one event owed to one subscription, and the rows that stand for several of them.

    QUEUED --take--> IN_FLIGHT --outcome--> SETTLED
       |                 |
       +--lane full, paused--> SPILLED (an owed row takes over at the next record)

A delivery that waits or flies at the old end of the window gets an owed row, too, and keeps its state: the row then
stands for it in the log while memory goes on with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from outrider_server.domain.event import Event
from outrider_server.domain.sequence import SHARD_BITS

OWED_SEQUENCES_MAX = 256
"""Most deliveries that one owed row stands for."""


HELD_BACK_US = (1 << 63) - 1
"""The due time of what waits until a person lets it go."""


class DeliveryState(IntEnum):
    """Where a delivery in memory is."""

    QUEUED = 1
    IN_FLIGHT = 2
    SPILLED = 3
    SETTLED = 4


class Cause(IntEnum):
    """Why a delivery is owed rather than in its lane. Stored as its number."""

    LANE_FULL = 1
    PAUSED = 2
    WINDOW_PASSED = 3
    RETRY = 4
    RECOVERED = 5
    BYTE_BUDGET = 6
    HELD_BACK = 7


class OwedRow:
    """A packed row of the log, as its owner holds it while it is claimed.

    `remaining` are the sequences still owed, `waiting` those not in the lane yet (descending, so that the next one is
    popped from the end), `out` the number of its deliveries in memory or being loaded. `dirty`: `remaining` shrank since
    the last record; `planned`: the record under way writes it. `retry`: it waited for a time, not for room.
    """

    __slots__ = (
        "attempt",
        "dirty",
        "id",
        "out",
        "planned",
        "remaining",
        "retry",
        "shard",
        "subscription",
        "tenant",
        "waiting",
    )

    def __init__(
        self,
        shard: int,
        row_id: int,
        tenant: int,
        subscription: int,
        sequences: list[int],
        attempt: int,
    ) -> None:
        self.shard = shard
        self.id = row_id
        self.tenant = tenant
        self.subscription = subscription
        self.attempt = attempt
        self.remaining = set(sequences)
        self.waiting: list[int] = []
        self.out = 0
        self.dirty = False
        self.planned = False
        self.retry = False


class Delivery:
    """One event owed to one subscription, in memory. `attempt` counts the attempts made so far."""

    __slots__ = ("attempt", "event", "owed", "state", "subscription")

    def __init__(
        self, event: Event, subscription: int, attempt: int = 0, owed: OwedRow | None = None
    ) -> None:
        self.event = event
        self.subscription = subscription
        self.attempt = attempt
        self.owed = owed
        self.state = DeliveryState.QUEUED

    @property
    def shard(self) -> int:
        """The shard of its event."""
        return self.event.sequence & ((1 << SHARD_BITS) - 1)


@dataclass(frozen=True, slots=True)
class OwedInsert:
    """A new owed row, to be written by a record. `due_us` 0 means at once."""

    shard: int
    id: int
    tenant: int
    subscription: int
    sequences: tuple[int, ...]
    attempt: int
    due_us: int
    cause: Cause


@dataclass(slots=True)
class AttemptRow:
    """One request and its outcome, to be written by a record."""

    shard: int
    tenant: int
    endpoint: int
    endpoint_version: int
    sequences: tuple[int, ...]
    subscriptions: tuple[int, ...]
    number: int
    verdict: int
    status: int
    error: int
    duration_ms: float
    detail: str
    response: bytes


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """Deliveries that ended without success, to be written by a record. `cancelled` or dead, with the reason."""

    shard: int
    tenant: int
    endpoint: int
    subscription: int
    sequences: tuple[int, ...]
    attempts: int
    cancelled: bool
    reason: str
    status: int = 0
    detail: str = ""
