"""The values that `policy.obligations` gives out and takes in: bounds, record plans, readings of owed rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from outrider_server.domain.delivery import AttemptRow, DeadLetter, OwedInsert, OwedRow
from outrider_server.policy.lane import Lane


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of what is held in memory."""

    lane_deliveries_max: int = 10_000
    lane_bytes_max: int = 64 * 1024 * 1024
    held_bytes_max: int = 512 * 1024 * 1024
    window_us_max: int = 5_000_000
    window_events_max: int = 200_000


@dataclass(slots=True)
class ShardRecord:
    """One shard's part of a record: compare-and-set of its number, its checkpoint, its ledger row.

    The counts are per tenant; `matched` counts the targets of the events that the checkpoint passes in this record.
    """

    shard: int
    epoch: int
    record_no: int
    checkpoint: int
    matched: dict[int, int] = field(default_factory=dict)
    delivered: dict[int, int] = field(default_factory=dict)
    dead: dict[int, int] = field(default_factory=dict)
    cancelled: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class RecordPlan:
    """What one record transaction writes; `rows` are the rows in memory that it writes, shrinks or deletes."""

    shards: list[ShardRecord]
    attempts: list[AttemptRow]
    dead_letters: list[DeadLetter]
    owed_inserts: list[OwedInsert]
    owed_updates: list[tuple[int, int, tuple[int, ...]]]
    owed_deletes: list[tuple[int, int]]
    claimed: set[tuple[int, int]]
    rows: list[OwedRow]


@dataclass(slots=True, eq=False, weakref_slot=True)
class Look:
    """A reading of owed rows that is under way: what happened since it began, which its result may not show.

    `left`: shards that were handed off since: what it finds of them may be long gone, though they came back.
    `changed`: rows that records shrank or deleted; `inserted`: (shard, subscription) pairs that got rows. For a lane: `retry_us`,
    the earliest retry that came up, and `overtaken`, whether rows came up that belong before those it may find.
    A reader that gives up just drops it.
    """

    lane: Lane | None = None
    left: set[int] = field(default_factory=set)
    changed: set[tuple[int, int]] = field(default_factory=set)
    inserted: set[tuple[int, int]] = field(default_factory=set)
    retry_us: int | None = None
    overtaken: bool = False


@dataclass(frozen=True, slots=True)
class CatchUpQuery:
    """What a lane wants to read: unclaimed rows of these subscriptions in its shard, those in `claimed` left out."""

    shard: int
    subscriptions: list[int]
    claimed: list[int]
    backlog: bool
    retries: bool
    look: Look


@dataclass(frozen=True, slots=True)
class FoundRow:
    """An owed row as read from the log."""

    shard: int
    id: int
    tenant: int
    subscription: int
    sequences: list[int]
    attempt: int
    due_us: int


@dataclass(frozen=True, slots=True)
class ToLoad:
    """One delivery of a claimed row whose event is to be read."""

    row: OwedRow
    sequence: int


@dataclass(slots=True)
class Settled:
    """What became of a failed request's deliveries. `due_us`: when the first of them is tried again."""

    retried: int = 0
    dead: int = 0
    due_us: int | None = None
