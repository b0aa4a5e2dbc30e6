"""The machine of obligations against a simple model of the log: whatever happens in whatever order, nothing is lost.

`Log` is the tables, applied as storage does. `World` is that and two nodes, each around an `Obligations`, with the shards
between them: one tenant in each and one that is split over both. Every asynchronous thing (an ingest transaction, a
request, a reading for catch-up, a record, a hand-off, a takeover slice by slice) is a list of steps, between which
anything else may happen. `Machine` lets hypothesis choose. After every step the promises of `World.check` hold; at the
end all faults stop and everything must reach its receiver.

`MODEL_EXAMPLES=20000 pytest tests/properties/test_obligations_model.py` is the long run.
"""

from __future__ import annotations

import copy
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from typing_extensions import override

from outrider_server.domain.delivery import Delivery, OwedInsert, OwedRow
from outrider_server.domain.endpoint import BatchPolicy, DeliveryMode, Endpoint, EndpointState
from outrider_server.domain.event import Event
from outrider_server.domain.outcome import AttemptError, Outcome, Verdict
from outrider_server.domain.sequence import microseconds_of, shard_of
from outrider_server.domain.subscription import Subscription, SubscriptionState
from outrider_server.policy import obligations as module
from outrider_server.policy.checkpoint import Window
from outrider_server.policy.lane import Lane
from outrider_server.policy.obligations import (
    CatchUpQuery,
    FoundRow,
    Limits,
    Look,
    Obligations,
    RecordPlan,
    RetryDue,
    Settled,
    ShardRecord,
    ToLoad,
)

Pair = tuple[int, int]
"""A delivery: (sequence, subscription)."""

START_US = 1_700_000_000_000_000
EVENT_SIZE_MAX = 60
CONCURRENCY = 2
LIMITS = Limits(
    lane_deliveries_max=3,
    lane_bytes_max=100,
    held_bytes_max=260,
    window_us_max=1_000_000,
    window_events_max=8,
)
SHARDS = (3, 7)
SHARDS_OF = {1: (3,), 2: (7,), 3: SHARDS}
SLICE_EVENTS = 2
ENDPOINTS = (
    Endpoint(11, 1, "one", "http://one", ()),
    Endpoint(
        12,
        1,
        "two",
        "http://two",
        (),
        mode=DeliveryMode.BATCH,
        batch=BatchPolicy(2, 70, 5.0),
    ),
    Endpoint(
        21,
        2,
        "three",
        "http://three",
        (),
        mode=DeliveryMode.BATCH,
        batch=BatchPolicy(3, 1000, 0.0),
    ),
    Endpoint(31, 3, "four", "http://four", ()),
)
SUBSCRIPTIONS = (
    Subscription(101, 1, "a", 11, ("*",)),
    Subscription(102, 1, "b", 11, ("*",)),
    Subscription(103, 1, "c", 12, ("*",)),
    Subscription(104, 1, "d", 12, ("*",)),
    Subscription(201, 2, "e", 21, ("*",)),
    Subscription(202, 2, "f", 21, ("*",)),
    Subscription(301, 3, "g", 31, ("*",)),
    Subscription(302, 3, "h", 31, ("*",)),
)


# The log.


@dataclass(slots=True)
class StoredEvent:
    tenant: int
    targets: tuple[int, ...]
    size: int


@dataclass(slots=True)
class StoredRow:
    tenant: int
    subscription: int
    sequences: tuple[int, ...]
    attempt: int
    due_us: int


@dataclass(slots=True)
class Records:
    """What records write: all of it goes back together when an asynchronous commit is lost."""

    checkpoint: dict[int, int]
    record_no: dict[int, int]
    owed: dict[tuple[int, int], StoredRow] = field(default_factory=dict)
    settled: dict[Pair, str] = field(default_factory=dict)
    attempted: set[Pair] = field(default_factory=set)
    ledger: dict[int, Counter[str]] = field(
        default_factory=lambda: {t: Counter() for t in SHARDS_OF}
    )


class Log:
    """The tables."""

    def __init__(self) -> None:
        self.events: dict[int, StoredEvent] = {}
        self.pruned: set[int] = set()
        self.epoch = dict.fromkeys(SHARDS, 0)
        self.records = Records(
            checkpoint=dict.fromkeys(SHARDS, 0),
            record_no=dict.fromkeys(SHARDS, 0),
        )
        self.boundaries: list[Records] = [copy.deepcopy(self.records)]

    def write(self, plan: RecordPlan) -> None:
        """One record transaction."""
        records = self.records
        for shard in plan.shards:
            assert shard.epoch == self.epoch[shard.shard], "fenced"
            self.check_number(shard)
            assert shard.checkpoint >= records.checkpoint[shard.shard], "never back"
            records.record_no[shard.shard] = shard.record_no
            records.checkpoint[shard.shard] = shard.checkpoint
            for name in ("matched", "delivered", "dead", "cancelled"):
                for tenant, count in getattr(shard, name).items():
                    assert shard.shard in SHARDS_OF[tenant]
                    records.ledger[tenant][name] += count
        written = {shard.shard for shard in plan.shards}
        for attempt in plan.attempts:
            assert attempt.shard in written
            for pair in zip(attempt.sequences, attempt.subscriptions, strict=True):
                records.attempted.add(pair)
                if attempt.verdict == Verdict.DELIVERED:
                    self._settle(pair, "delivered")
        for dead in plan.dead_letters:
            assert dead.shard in written
            for sequence in dead.sequences:
                self._settle(
                    (sequence, dead.subscription), "cancelled" if dead.cancelled else dead.reason
                )
        for shard_no, row_id, sequences in plan.owed_updates:
            row = records.owed[shard_no, row_id]
            assert shard_no in written
            assert sequences == tuple(sorted(sequences))
            assert sequences
            assert set(sequences) < set(row.sequences)
            records.owed[shard_no, row_id] = replace(row, sequences=sequences)
        for key in plan.owed_deletes:
            del records.owed[key]
        for insert in plan.owed_inserts:
            assert insert.shard in written
            assert (insert.shard, insert.id) not in records.owed
            assert insert.sequences == tuple(sorted(set(insert.sequences)))
            records.owed[insert.shard, insert.id] = StoredRow(
                insert.tenant, insert.subscription, insert.sequences, insert.attempt, insert.due_us
            )
        self.boundaries = [*self.boundaries[-3:], copy.deepcopy(records)]

    def check_number(self, shard: ShardRecord) -> None:
        """Compare before set."""
        assert shard.record_no == self.records.record_no[shard.shard] + 1, "numbered"

    def _settle(self, pair: Pair, how: str) -> None:
        assert pair not in self.records.settled, "a delivery is settled once"
        self.records.settled[pair] = how

    def lose(self, count: int) -> None:
        """The database came back without the last `count` records, whose commits were asynchronous."""
        kept = max(1, len(self.boundaries) - count)
        self.boundaries = self.boundaries[:kept]
        self.records = copy.deepcopy(self.boundaries[-1])

    def find(
        self, query: CatchUpQuery, now_us: int, rows_max: int
    ) -> tuple[list[FoundRow], int | None, int | None]:
        """Rows for a lane, where they stop, and when the next retry is due."""
        rows = [
            (key, row)
            for key, row in self.records.owed.items()
            if key[0] == query.shard
            and row.subscription in query.subscriptions
            and key[1] not in query.claimed
        ]
        found: list[tuple[tuple[int, int], StoredRow]] = []
        horizon = None
        if query.backlog:
            found = sorted(
                ((key, row) for key, row in rows if row.due_us == 0),
                key=lambda item: (item[1].sequences[0], item[0]),
            )[:rows_max]
            horizon = found[-1][1].sequences[0] if len(found) == rows_max else None
        retry_us = None
        if query.retries:
            retries = sorted(
                ((key, row) for key, row in rows if row.due_us > 0),
                key=lambda item: (item[1].due_us, item[0]),
            )
            due = [item for item in retries if item[1].due_us <= now_us][:rows_max]
            found += due
            rest = retries[len(due) :]
            retry_us = rest[0][1].due_us if rest else None
        return [_found(key, row) for key, row in found], horizon, retry_us

    def find_where(
        self, shards: Collection[int], matches: Callable[[StoredRow], bool], rows_max: int
    ) -> list[FoundRow]:
        rows = [
            _found(key, row)
            for key, row in sorted(self.records.owed.items())
            if key[0] in shards and matches(row)
        ]
        return rows[:rows_max]

    def settled(self, shard: int) -> set[Pair]:
        """What attempts, dead letters and owed rows name. A retried delivery has a row, or went on from there."""
        records = self.records
        owed = {
            (sequence, row.subscription)
            for key, row in records.owed.items()
            for sequence in row.sequences
        }
        named = owed | records.attempted | set(records.settled)
        return {pair for pair in named if shard_of(pair[0]) == shard}

    def load(self, loading: list[ToLoad], bytes_max: int) -> tuple[dict[int, Event], int | None]:
        """Events by sequence, as many as fit (at least one); the last sequence read when there were more."""
        events: dict[int, Event] = {}
        size = 0
        last = None
        for sequence in sorted({item.sequence for item in loading}):
            if sequence in self.pruned:
                last = sequence
                continue
            stored = self.events[sequence]
            size += stored.size
            if events and size > bytes_max:
                return events, last
            events[sequence] = _event(stored, sequence)
            last = sequence
        return events, None


def _found(key: tuple[int, int], row: StoredRow) -> FoundRow:
    return FoundRow(
        key[0], key[1], row.tenant, row.subscription, list(row.sequences), row.attempt, row.due_us
    )


def _event(stored: StoredEvent, sequence: int) -> Event:
    return Event(
        stored.tenant,
        "order.created",
        b"x" * stored.size,
        0,
        sequence=sequence,
        targets=stored.targets,
        size=stored.size,
    )


# The node.


@dataclass(slots=True)
class Transaction:
    """An ingest transaction: assigned, then durable, then the node knows."""

    events: list[Event]
    durable: bool = False


@dataclass(slots=True)
class Request:
    lane: Lane
    deliveries: list[Delivery]


@dataclass(slots=True)
class CatchUp:
    """A reading for a lane, step by step."""

    query: CatchUpQuery | None = None
    found: tuple[list[FoundRow], int | None, int | None] | None = None
    loading: list[ToLoad] | None = None
    events: tuple[dict[int, Event], int | None] | None = None


@dataclass(slots=True)
class Job:
    """Owed rows ended without sending: `subscription` deleted, or what is below `below` expired."""

    look: Look
    shards: tuple[int, ...]
    subscription: int = 0
    below: int | None = None
    rows: list[FoundRow] | None = None


@dataclass(slots=True)
class Leaving:
    """A shard on its way off a node, as `Tenure.release` does it."""

    shard: int
    target: Node
    closed: bool = False


@dataclass(slots=True)
class Coming:
    """A shard on its way onto a node, as `Tenure.adopt` does it: what is known of it already."""

    shard: int
    counted: bool = False
    settled: set[Pair] | None = None
    last: int = 0


class Node:
    """A node: its memory, and what is under way on it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.log = world.log
        self.machine = world.obligations_class(LIMITS)
        self.transactions: list[Transaction] = []
        self.requests: list[Request] = []
        self.orphans: list[Request] = []  # of shards that were given away by force
        self.catch_ups: dict[Lane, CatchUp] = {}
        self.plan: RecordPlan | None = None
        self.plan_written = False
        self.job: Job | None = None
        self.awake: set[Lane] = set()
        self.timers: dict[Lane, int] = {}
        self.moving: Leaving | Coming | None = None

    def holds(self, shard: int) -> bool:
        window = self.machine.windows.get(shard)
        return window is not None and window.open

    def configure(self, shard: int, tenant: int) -> None:
        world = self.world
        woken = self.machine.configure(
            shard,
            tenant,
            [e for e in world.endpoints.values() if e.tenant == tenant],
            [
                s
                for s in world.subscriptions.values()
                if s.tenant == tenant and s.id not in world.deleted
            ],
            len(SHARDS_OF[tenant]),
        )
        self.awake |= set(woken)
        # A resumed subscription brings events older than what its lane has sent or holds.
        world.mixed |= {_name(lane) for lane in woken}

    # Takeover, slice by slice.

    def take_over(self, shard: int) -> None:
        """The epoch is raised; nobody else writes from here on."""
        assert self.moving is None
        self.log.epoch[shard] += 1
        self.moving = Coming(shard)
        for tenant, shards in SHARDS_OF.items():
            if shard in shards:
                self.configure(shard, tenant)

    def come(self, coming: Coming) -> None:
        """One slice."""
        shard, log, machine = coming.shard, self.log, self.machine
        records = log.records
        mine = sorted(s for s in log.events if shard_of(s) == shard)
        if not coming.counted:
            for subscription in sorted(
                {row.subscription for key, row in records.owed.items() if key[0] == shard}
            ):
                rows = [
                    row
                    for key, row in records.owed.items()
                    if key[0] == shard and row.subscription == subscription
                ]
                self.count(shard, subscription, rows)
            checkpoint = records.checkpoint[shard]
            window = Window(
                shard,
                log.epoch[shard],
                checkpoint,
                records.record_no[shard],
                mine[-1] if mine else 0,
            )
            window.open = False
            machine.restore_window(window, (), set())
            coming.counted, coming.last = True, checkpoint
            return
        page = [s for s in mine if s > coming.last][:SLICE_EVENTS]
        if page:
            if coming.settled is None:
                coming.settled = log.settled(shard)
            coming.last = page[-1]
            machine.restore_window(
                machine.windows[shard],
                [(s, log.events[s].tenant, log.events[s].targets) for s in page],
                coming.settled,
            )
            return
        self.open(shard)

    def count(self, shard: int, subscription: int, rows: list[StoredRow]) -> None:
        self.machine.restore_owed(
            shard,
            subscription,
            rows[0].tenant,
            sum(row.due_us == 0 for row in rows),
            min((row.due_us for row in rows if row.due_us), default=None),
        )

    def open(self, shard: int) -> None:
        """Its first record is written, then it takes events in and catches up."""
        if self.plan is not None:
            return  # there is one record at a time
        while self.record() and self.plan is not None:
            pass
        self.machine.windows[shard].open = True
        self.moving = None
        self.awake |= {lane for lane in self.machine.lanes.values() if lane.shard == shard}

    # Hand-off.

    def begin_leaving(self, shard: int, target: Node) -> None:
        assert self.moving is None
        self.moving = Leaving(shard, target)
        self.machine.pause_shard(shard)

    def leave(self, leaving: Leaving, *, forced: bool = False) -> bool:
        """One step; False when something has to end first. The target takes it over when it is gone."""
        shard, machine, world = leaving.shard, self.machine, self.world
        if not leaving.closed:
            if machine.in_flight_of(shard) and not forced:
                return False
            machine.windows[shard].open = False
            leaving.closed = True
            return True
        if any(shard_of(e.sequence) == shard for t in self.transactions for e in t.events):
            return False
        if self.plan is not None:
            return False
        if not machine.is_clean(shard):
            if not forced:
                return self.record()
            world.may_come_again(shard)
            gone = [r for r in self.requests if r.lane.shard == shard]
            self.requests = [r for r in self.requests if r.lane.shard != shard]
            self.orphans += gone
        else:
            assert not any(r.lane.shard == shard for r in self.requests)
        machine.forget_shard(shard)
        self.moving = None
        self.awake = {lane for lane in self.awake if lane.shard != shard}
        world.homes[shard] = leaving.target
        world.waiting.append(shard)
        return True

    def stay(self, leaving: Leaving) -> None:
        """Its requests do not end: it is not handed off after all."""
        self.moving = None
        self.machine.windows[leaving.shard].open = True
        self.machine.keep_shard(leaving.shard)
        for tenant, shards in SHARDS_OF.items():
            if leaving.shard in shards:
                self.configure(leaving.shard, tenant)

    # Ingest.

    def publish(self, tenant: int, shard: int, matches: list[tuple[int, int]]) -> Transaction:
        """Begin a transaction; `matches` are (bit set of the subscriptions matched, size) of its events."""
        window = self.machine.windows[shard]
        ids = [s.id for s in SUBSCRIPTIONS if s.tenant == tenant and s.id not in self.world.deleted]
        events = []
        for bits, size in matches:
            targets = tuple(s for place, s in enumerate(ids) if bits >> place & 1)
            event = _event(
                StoredEvent(tenant, targets, size), window.clock.take(self.world.now_us, 1)
            )
            self.machine.assigned(
                self.machine.windows[event.sequence & 63], [event], event.sequence
            )
            events.append(event)
        self.transactions.append(Transaction(events))
        return self.transactions[-1]

    def commit(self, transaction: Transaction) -> None:
        """The transaction is durable, but the node does not know yet."""
        transaction.durable = True
        for event in transaction.events:
            assert self.world.homes[shard_of(event.sequence)] is self, "fenced"
            self.log.events[event.sequence] = StoredEvent(event.tenant, event.targets, event.size)

    def told(self, transaction: Transaction) -> None:
        """The node learns that the transaction committed."""
        world = self.world
        self.transactions.remove(transaction)
        woken: set[Lane] = set()
        for event in transaction.events:
            shard = shard_of(event.sequence)
            if event.sequence < world.told_of.get(shard, 0):
                world.late.add(event.sequence)
            world.told_of[shard] = max(event.sequence, world.told_of.get(shard, 0))
            self.machine.committed(event, woken)
        self.awake |= woken

    def abort(self, transaction: Transaction, *, again: bool) -> None:
        """The transaction was rolled back; perhaps the same events are tried once more."""
        self.transactions.remove(transaction)
        shards = [shard_of(event.sequence) for event in transaction.events]
        for event in transaction.events:
            self.machine.aborted(event)
        if again:
            for event, shard in zip(transaction.events, shards, strict=True):
                window = self.machine.windows[shard]
                event.sequence = window.clock.take(self.world.now_us, 1)
                self.machine.assigned(
                    self.machine.windows[event.sequence & 63], [event], event.sequence
                )
            self.transactions.append(Transaction(transaction.events))

    # Requests.

    def ready(self, lane: Lane) -> bool:
        return lane.in_flight < CONCURRENCY and lane.ready_in_us(self.world.now_us) == 0

    def take(self, lane: Lane) -> None:
        world = self.world
        deliveries = self.machine.take(lane)
        assert deliveries, "a lane that is ready has something to send"
        in_flight = {_pair(d) for node in world.nodes for r in node.requests for d in r.deliveries}
        name = _name(lane)
        for delivery in deliveries:
            pair = _pair(delivery)
            assert world.homes[lane.shard] is self, "who does not hold a shard sends nothing of it"
            assert pair not in world.live_settled, "no duplicates without a crash"
            assert pair not in in_flight, "in flight once"
            assert self.machine.routes[lane.shard, delivery.subscription].active
            assert len(delivery.event.data) == delivery.event.size, "its payload is there"
            if delivery.attempt == 0 and delivery.event.sequence not in world.late:
                sequence = delivery.event.sequence
                key = (lane.shard, delivery.subscription)
                assert sequence > world.first_of_subscription.get(key, 0), (
                    "a subscription's first attempts are in order"
                )
                world.first_of_subscription[key] = sequence
                if name not in world.mixed:
                    assert sequence >= world.first_of_lane.get(name, 0), "a lane's, too"
                    world.first_of_lane[name] = sequence
        self.requests.append(Request(lane, deliveries))
        if not lane.queue and not lane.drains() and not self.owes(lane):
            world.mixed.discard(name)
            world.first_of_lane.pop(name, None)
        self.awake.add(lane)

    def owes(self, lane: Lane) -> bool:
        routes = self.machine.routes
        return any(
            key[0] == lane.shard
            and (lane.shard, row.subscription) in routes
            and routes[lane.shard, row.subscription].lane is lane
            for key, row in self.log.records.owed.items()
        )

    def complete(self, request: Request, verdict: Verdict, delay_us: int) -> None:
        world = self.world
        orphan = request in self.orphans
        (self.orphans if orphan else self.requests).remove(request)
        pairs = [_pair(d) for d in request.deliveries]
        if verdict is Verdict.DELIVERED:
            world.got.update(pairs)
            if not orphan:
                world.live_settled.update(pairs)
        status = 200 if verdict is Verdict.DELIVERED else 500
        due_us = world.now_us + delay_us

        def retry_due(attempts: int, event_us: int) -> int | None:
            assert START_US <= event_us <= world.now_us + 1000
            return due_us if attempts < 3 else None

        if verdict is not Verdict.DELIVERED and not orphan:
            for delivery in request.deliveries:
                if verdict is Verdict.DEAD or delivery.attempt + 1 >= 3:
                    world.ended.add(_pair(delivery))
        self.machine.settle(
            request.lane,
            request.deliveries,
            Outcome(verdict, status, AttemptError.NONE, 1.0),
            retry_due,
        )
        if not orphan:
            self.awake.add(request.lane)

    # Catch up.

    def catch_up(self, lane: Lane, rows_max: int, deliveries_max: int) -> bool:
        """One step; False when there is nothing to do."""
        now_us = self.world.now_us
        step = self.catch_ups.get(lane)
        if step is None:
            if not self.holds(lane.shard) or not lane.wants_catch_up(now_us):
                return False
            step = CatchUp(self.machine.catch_up_query(lane, now_us))
            self.catch_ups[lane] = step
            lane.catching_up = True
        elif step.query is not None and step.found is None:
            step.found = self.log.find(step.query, now_us, rows_max)
        elif step.query is not None and step.found is not None:
            self.machine.claim(lane, step.query, *step.found)
            if step.query.retries and step.query.look.retry_us is None:
                assert lane.retry_us == step.found[2], "the next look is when there is something"
            step.query = None
        elif step.loading is None:
            step.loading = self.machine.to_load(lane, deliveries_max)
        elif step.events is None:
            step.events = self.log.load(step.loading, lane.room()[1])
        else:
            self.machine.loaded(lane, step.loading, *step.events)
            del self.catch_ups[lane]
            lane.catching_up = False
            self.awake.add(lane)
        return True

    # Records.

    def record(self) -> bool:
        """One step of a record: plan, commit, learn of it; False when there is nothing to write."""
        if self.plan is None:
            self.plan = self.machine.plan_record(self.world.now_us)
            self.plan_written = False
            self.check_windows()
            return self.plan is not None
        if not self.plan_written:
            self.log.write(self.plan)
            self.plan_written = True
        else:
            plan, self.plan = self.plan, None
            self.awake |= set(self.machine.recorded(plan))
        return True

    # Jobs.

    def begin_expiry(self) -> None:
        """Retention reaches into what is still owed."""
        shards = tuple(self.machine.windows)
        owed = sorted(
            s
            for key, row in self.log.records.owed.items()
            if key[0] in shards
            for s in row.sequences
        )
        if self.job is None and owed:
            self.job = Job(self.machine.look(), shards, below=owed[len(owed) // 2] + 1)

    def begin_cancelling(self) -> None:
        deleted = self.machine.deleted()
        if self.job is None and deleted:
            shard, subscription = deleted[0]
            self.job = Job(self.machine.look(), (shard,), subscription=subscription)

    def work(self) -> None:
        """One step of a job."""
        job = self.job
        if job is None:
            return
        below = job.below
        if job.rows is None:
            if below is None:
                job.rows = self.log.find_where(
                    job.shards, lambda r: r.subscription == job.subscription, 2
                )
            else:
                job.rows = self.log.find_where(job.shards, lambda r: r.sequences[0] < below, 2)
            return
        self.job = None
        if below is not None:
            self.world.expired |= {
                (s, r.subscription) for r in job.rows for s in r.sequences if s < below
            }
        if job.rows:
            self.machine.end_rows(job.look, job.rows, expired_below=below)
        elif below is None:
            self.machine.cancelled_all(job.shards[0], job.subscription, job.look)

    # Promises.

    def check_windows(self) -> None:
        """Only an event that is not committed holds the checkpoint back for longer than the window allows."""
        for window in self.machine.windows.values():
            oldest = next(iter(window._events), None)
            if oldest is not None and oldest.deliveries is not None:
                assert microseconds_of(oldest.sequence) >= self.world.now_us - LIMITS.window_us_max
                assert len(window) <= LIMITS.window_events_max

    def in_memory(self) -> Iterator[Delivery]:
        for lane in self.machine.lanes.values():
            yield from lane.queue
            yield from lane.spill
        yield from self.machine._parked
        for request in self.requests:
            yield from request.deliveries

    def check_memory(self) -> None:
        """Counts are what they count, bounds are kept, no delivery is in memory twice."""
        machine = self.machine
        deliveries = list(self.in_memory())
        still = [d for request in self.orphans for d in request.deliveries]
        held = Counter(id(d.event) for d in (*deliveries, *still))
        in_memory = {id(d.event): d.event for d in (*deliveries, *still)}
        assert machine.held_bytes == sum(event.size for event in in_memory.values())
        assert all(event.held == held[key] for key, event in in_memory.items())
        lanes = set(machine.lanes.values())
        loading = [
            item
            for lane, step in self.catch_ups.items()
            if lane in lanes
            for item in step.loading or ()
        ]
        places = Counter(_pair(d) for d in deliveries)
        places.update((item.sequence, item.row.subscription) for item in loading)
        out = Counter(id(d.owed) for d in deliveries if d.owed is not None)
        out.update(id(item.row) for item in loading)
        counted = set(machine.windows)
        unclaimed = {
            key: (row.subscription, row.due_us)
            for key, row in self.log.records.owed.items()
            if key[0] in counted
        }
        if self.plan is not None and not self.plan_written:
            for insert in self.plan.owed_inserts:
                unclaimed[insert.shard, insert.id] = (insert.subscription, insert.due_us)
        for key in machine._ending:
            unclaimed.pop(key, None)
        for lane in lanes:
            assert lane.queue_bytes == sum(d.event.size for d in lane.queue)
            assert len(lane.queue) <= LIMITS.lane_deliveries_max
            assert lane.queue_bytes <= LIMITS.lane_bytes_max + EVENT_SIZE_MAX
            assert lane.in_flight == sum(r.lane is lane for r in self.requests)
            waiting = []
            for key, row in lane.rows.items():
                unclaimed.pop(key, None)
                assert key == (row.shard, row.id)
                assert row.shard == lane.shard
                assert row.out == out.pop(id(row), 0)
                assert row.waiting == sorted(set(row.waiting), reverse=True)
                assert len(row.remaining) == row.out + len(row.waiting)
                assert row.remaining >= set(row.waiting)
                places.update((sequence, row.subscription) for sequence in row.waiting)
                if row.waiting and machine.routes[row.shard, row.subscription].active:
                    waiting.append(row)
            assert _by_id(waiting) == _by_id(lane.waiting_rows)
            step = self.catch_ups.get(lane, CatchUp())
            assert lane.loading == len(step.loading or ())
        assert not out, "the rows of what is in memory are claimed"
        assert all(count == 1 for count in places.values()), "no delivery is in memory twice"
        backlog = Counter(
            (key[0], subscription)
            for key, (subscription, due_us) in unclaimed.items()
            if not due_us
        )
        for key, route in machine.routes.items():
            assert key == (route.shard, route.subscription)
            assert route.backlog >= 0
            if not route.deleted:
                assert route.backlog == backlog[key]
        fresh = set[tuple[int, int]]()
        if self.plan is not None:
            fresh = {(insert.shard, insert.id) for insert in self.plan.owed_inserts}
        for lane in lanes:
            assert lane.backlog == sum(backlog[lane.shard, s] for s in lane.subscriptions)
            for key, (subscription, due_us) in unclaimed.items():
                if key[0] != lane.shard:
                    continue
                if due_us and subscription in lane.subscriptions and key not in fresh:
                    assert lane.retry_us is not None, "no retry is forgotten"
                    assert lane.retry_us <= due_us
        for mine in (machine.lanes, machine.routes, machine._owed, machine._dead, machine._dirty):
            assert {key[0] for key in mine} <= counted | {self._coming()}, (
                "of others nothing is left"
            )

    def _coming(self) -> int:
        return self.moving.shard if isinstance(self.moving, Coming) else -1

    # The end.

    def is_done(self) -> bool:
        return not (
            any(len(window) for window in self.machine.windows.values())
            or any(True for _ in self.in_memory())
            or self.orphans
            or self.machine.deleted()
            or self.machine.unrecorded()
            or self.plan is not None
            or self.moving is not None
        )

    def sleep(self, lane: Lane) -> None:
        """A lane's loop waits for a wake or for the timer that it sets."""
        self.awake.discard(lane)
        ready = lane.ready_in_us(self.world.now_us)
        timers = [] if ready is None else [self.world.now_us + ready]
        if lane.retry_us is not None:
            timers.append(lane.retry_us)
        self.timers.pop(lane, None)
        if timers:
            self.timers[lane] = min(timers)

    def run_once(self) -> None:
        """What the loops of a node do, each when it was woken or its time came."""
        now_us = self.world.now_us
        for lane in list(self.catch_ups):
            while lane in self.catch_ups:
                self.catch_up(lane, 3, 3)
        for lane in list(self.machine.lanes.values()):
            if lane not in self.awake and self.timers.get(lane, now_us + 1) > now_us:
                continue
            for _ in range(20):
                if self.ready(lane):
                    self.take(lane)
                    self.complete(self.requests[-1], Verdict.DELIVERED, 0)
                elif self.catch_up(lane, 3, 3):
                    while lane in self.catch_ups:
                        self.catch_up(lane, 3, 3)
                else:
                    self.sleep(lane)
                    break
        for request in [*self.requests, *self.orphans]:
            self.complete(request, Verdict.DELIVERED, 0)
        self.begin_cancelling()
        while self.job is not None:
            self.work()
        while self.record() and self.plan is not None:
            pass
        self.world.move_on(self)


class World:
    """Two nodes, their log, their receivers and their operator."""

    obligations_class: ClassVar[type[Obligations]] = Obligations
    log_class: ClassVar[type[Log]] = Log
    node_class: ClassVar[type[Node]] = Node

    def __init__(self) -> None:
        self.log = self.log_class()
        self.now_us = START_US
        self.endpoints = {endpoint.id: endpoint for endpoint in ENDPOINTS}
        self.subscriptions = {subscription.id: subscription for subscription in SUBSCRIPTIONS}
        self.deleted: set[int] = set()
        self.got: Counter[Pair] = Counter()
        self.ended: set[Pair] = set()  # by retry policy or refusal: may stand as dead
        self.expired: set[Pair] = set()
        self.late: set[int] = set()  # committed after a later sequence was: no order is promised
        self.told_of: dict[int, int] = {}
        # By shard, whoever holds it: a hand-off in order changes nothing of it.
        self.live_settled: set[Pair] = set()
        self.first_of_subscription: dict[tuple[int, int], int] = {}
        self.first_of_lane: dict[tuple[int, int], int] = {}
        self.mixed: set[tuple[int, int]] = set()  # whose order between subscriptions is disturbed
        self.nodes = [self.node_class(self), self.node_class(self)]
        self.homes = dict.fromkeys(SHARDS, self.nodes[0])
        self.waiting: list[int] = list(SHARDS)  # shards whose node has not begun to take them over
        self.settle_moves()
        self.check()

    # Shards that move.

    def may_come_again(self, shard: int) -> None:
        """What of a shard was sent and is not recorded is sent again, in an order of its own."""
        settled = self.log.records.settled
        self.live_settled = {
            pair for pair in self.live_settled if shard_of(pair[0]) != shard or pair in settled
        }
        for of in (self.first_of_subscription, self.first_of_lane):
            for key in [key for key in of if key[0] == shard]:
                del of[key]
        self.mixed |= {(shard, endpoint) for endpoint in self.endpoints}

    def move_on(self, node: Node) -> bool:
        """One step of what moves to or from a node; False where nothing can go on."""
        moving = node.moving
        if isinstance(moving, Leaving):
            return node.leave(moving)
        if isinstance(moving, Coming):
            node.come(moving)
            return True
        for shard in self.waiting:
            if self.homes[shard] is node:
                self.waiting.remove(shard)
                node.take_over(shard)
                return True
        return False

    def settle_moves(self) -> None:
        """Every takeover goes to its end."""
        while self.waiting or any(isinstance(node.moving, Coming) for node in self.nodes):
            for node in self.nodes:
                if not isinstance(node.moving, Leaving):
                    self.move_on(node)
            self.check()
            if any(isinstance(node.moving, Leaving) for node in self.nodes):
                return

    def crash(self, which: int, lost_records: int, *, elsewhere: bool) -> None:
        """A node dies, or the database comes back without its last records, for all. Receivers have what they have.

        Its shards are taken over by its next boot, or by the other node.
        """
        if lost_records:
            self.log.lose(lost_records)
        for dead in list(self.nodes) if lost_records else [self.nodes[which]]:
            place = self.nodes.index(dead)
            self.nodes[place] = self.node_class(self)
            heir = self.nodes[(place + elsewhere) % 2]
            for shard in SHARDS:
                if self.homes[shard] is dead:
                    self.homes[shard] = heir
                    if shard not in self.waiting:
                        self.waiting.append(shard)
                    self.may_come_again(shard)
            for node in self.nodes:
                if isinstance(node.moving, Leaving) and node.moving.target is dead:
                    node.moving.target = self.nodes[place]

    def configure(self, tenant: int) -> None:
        """A tenant's configuration changed: those who hold something of it know at once."""
        for node in self.nodes:
            for shard in SHARDS_OF[tenant]:
                if shard in node.machine.windows or node._coming() == shard:
                    node.configure(shard, tenant)

    # The operator.

    def pause_subscription(self, subscription: int, *, paused: bool) -> None:
        state = SubscriptionState.PAUSED if paused else SubscriptionState.ACTIVE
        old = self.subscriptions[subscription]
        self.subscriptions[subscription] = replace(old, state=state)
        self.configure(old.tenant)

    def pause_endpoint(self, endpoint: int, *, paused: bool) -> None:
        state = EndpointState.PAUSED if paused else EndpointState.ACTIVE
        old = self.endpoints[endpoint]
        self.endpoints[endpoint] = replace(old, state=state)
        self.configure(old.tenant)

    def delete(self, subscription: int) -> None:
        self.deleted.add(subscription)
        self.configure(self.subscriptions[subscription].tenant)

    def prune(self, sequence: int) -> None:
        """An event's partition was dropped although deliveries of it stand owed."""
        event = self.log.events[sequence]
        if sequence <= self.log.records.checkpoint[shard_of(sequence)]:
            self.log.pruned.add(sequence)
            self.expired |= {(sequence, s) for s in event.targets}

    # Promises.

    def check(self) -> None:
        self.check_log()
        self.check_memory()

    def check_memory(self) -> None:
        for node in self.nodes:
            node.check_memory()
        mine = [set(node.machine.windows) for node in self.nodes]
        assert not mine[0] & mine[1], "a shard is in one memory"

    def check_log(self) -> None:
        """A crash at this moment loses nothing, and the books balance."""
        records = self.log.records
        owed = Counter(
            (sequence, row.subscription)
            for row in records.owed.values()
            for sequence in row.sequences
        )
        expected = {tenant: Counter[str]() for tenant in SHARDS_OF}
        pairs = set()
        for sequence, event in self.log.events.items():
            passed = sequence <= records.checkpoint[shard_of(sequence)]
            for subscription in event.targets:
                pair = (sequence, subscription)
                pairs.add(pair)
                how = records.settled.get(pair)
                assert owed[pair] + (how is not None) <= 1, "owed once, or settled"
                assert owed[pair] or how or not passed, "the checkpoint passes nothing open"
                if how == "delivered":
                    assert self.got[pair], "recorded as delivered means that the receiver has it"
                elif how == "cancelled":
                    assert subscription in self.deleted
                elif how == module.EXPIRED:
                    assert pair in self.expired
                elif how is not None:
                    assert pair in self.ended
                count = expected[event.tenant]
                count["matched"] += passed
                if how is not None:
                    count[how if how in ("delivered", "cancelled") else "dead"] += 1
        assert pairs >= set(owed) | set(records.settled), "nothing is made up"
        assert {t: +c for t, c in records.ledger.items()} == {t: +c for t, c in expected.items()}
        for node in self.nodes:
            for transaction in node.transactions:
                for under_way in transaction.events:
                    sequence = under_way.sequence
                    assert sequence > records.checkpoint[shard_of(sequence)]

    # The end.

    def quiesce(self) -> None:
        """Faults stop: everything reaches its receiver, and the checkpoint the last event."""
        for node in self.nodes:
            for transaction in list(node.transactions):
                if not transaction.durable:
                    node.commit(transaction)
                node.told(transaction)
        for endpoint in self.endpoints:
            self.pause_endpoint(endpoint, paused=False)
        for subscription in self.subscriptions:
            if subscription not in self.deleted:
                self.pause_subscription(subscription, paused=False)
        for _ in range(300):
            if self.is_done():
                break
            for node in self.nodes:
                node.run_once()
                self.check()
            self.now_us += 300_000
        else:
            raise AssertionError("it comes to rest")
        for shard in SHARDS:
            last = max((s for s in self.log.events if shard_of(s) == shard), default=0)
            assert self.log.records.checkpoint[shard] >= last
        for sequence, event in self.log.events.items():
            for subscription in event.targets:
                assert (sequence, subscription) in self.log.records.settled

    def is_done(self) -> bool:
        return (
            not self.log.records.owed
            and not self.waiting
            and all(node.is_done() for node in self.nodes)
        )


def _name(lane: Lane) -> tuple[int, int]:
    return lane.shard, lane.endpoint.id


def _pair(delivery: Delivery) -> Pair:
    return delivery.event.sequence, delivery.subscription


def _by_id(rows: list[OwedRow]) -> list[tuple[int, int]]:
    return sorted((row.shard, row.id) for row in rows)


# Hypothesis chooses.

pick = st.integers(0, 5)
places = st.sampled_from([(1, 3), (1, 3), (2, 7), (3, 3), (3, 7)])
"""A tenant, and the shard of it that an event goes to."""


class Machine(RuleBasedStateMachine):
    """Whatever may happen to two nodes, in any order. Without `moves` the first has all, and no tenant is split."""

    world_class: ClassVar[type[World]] = World
    moves: ClassVar[bool] = True

    @initialize()
    def begin(self) -> None:
        self.world = self.world_class()

    def choose(self, things: Any, place: int) -> Any:
        things = list(things)
        return things[place % len(things)]

    def lanes(self) -> list[tuple[Node, Lane]]:
        return [
            (node, lane)
            for node in self.world.nodes
            for lane in node.machine.lanes.values()
            if self.moves or len(SHARDS_OF[lane.endpoint.tenant]) == 1
        ]

    def node(self, which: int) -> Node:
        return self.world.nodes[which if self.moves else 0]

    def place(self, place: tuple[int, int]) -> tuple[int, int]:
        return place if self.moves or len(SHARDS_OF[place[0]]) == 1 else (1, 3)

    def under_way(self) -> list[tuple[Node, Transaction]]:
        return [(node, each) for node in self.world.nodes for each in node.transactions]

    def requests(self) -> list[tuple[Node, Request]]:
        return [
            (node, each) for node in self.world.nodes for each in (*node.requests, *node.orphans)
        ]

    @rule(
        place=places,
        matches=st.lists(
            st.tuples(st.integers(0, 15), st.integers(1, EVENT_SIZE_MAX)), min_size=1, max_size=4
        ),
    )
    def publish_and_commit(self, place: tuple[int, int], matches: list[tuple[int, int]]) -> None:
        world = self.world
        place = self.place(place)
        node = world.homes[place[1]]
        if node.holds(place[1]):
            transaction = node.publish(*place, matches)
            node.commit(transaction)
            node.told(transaction)
            world.check()

    @precondition(lambda self: len(self.under_way()) < 2)
    @rule(
        place=places,
        matches=st.lists(
            st.tuples(st.integers(0, 15), st.integers(1, EVENT_SIZE_MAX)), min_size=1, max_size=3
        ),
    )
    def publish(self, place: tuple[int, int], matches: list[tuple[int, int]]) -> None:
        place = self.place(place)
        node = self.world.homes[place[1]]
        if node.holds(place[1]):
            node.publish(*place, matches)
            self.world.check()

    @precondition(lambda self: self.under_way())
    @rule(place=pick, how=st.sampled_from(["commit", "commit", "abort", "again"]))
    def go_on_with_a_transaction(self, place: int, how: str) -> None:
        node, transaction = self.choose(self.under_way(), place)
        if transaction.durable:
            node.told(transaction)
        elif how == "commit":
            node.commit(transaction)
        else:
            node.abort(transaction, again=how == "again")
        self.world.check()

    @precondition(lambda self: any(node.ready(lane) for node, lane in self.lanes()))
    @rule(place=pick, times=st.integers(1, 3))
    def take(self, place: int, times: int) -> None:
        for _ in range(times):
            ready = [(node, lane) for node, lane in self.lanes() if node.ready(lane)]
            if ready:
                node, lane = self.choose(ready, place)
                node.take(lane)
                self.world.check()

    @precondition(lambda self: self.requests())
    @rule(
        place=pick,
        verdict=st.sampled_from(
            [Verdict.DELIVERED, Verdict.DELIVERED, Verdict.RETRY, Verdict.RETRY, Verdict.DEAD]
        ),
        delay_us=st.sampled_from([1, 100_000, 2_000_000]),
    )
    def complete(self, place: int, verdict: Verdict, delay_us: int) -> None:
        node, request = self.choose(self.requests(), place)
        node.complete(request, verdict, delay_us)
        self.world.check()

    @precondition(lambda self: self.lanes())
    @rule(place=pick, rows_max=st.integers(1, 3), deliveries_max=st.integers(1, 4), steps=pick)
    def catch_up(self, place: int, rows_max: int, deliveries_max: int, steps: int) -> None:
        for _ in range(steps + 1):
            node, lane = self.choose(self.lanes(), place)
            node.catch_up(lane, rows_max, deliveries_max)
            self.world.check()

    @rule(steps=st.sampled_from([1, 2, 3, 3, 3]), which=st.integers(0, 1))
    def record(self, steps: int, which: int) -> None:
        for _ in range(steps):
            self.node(which).record()
            self.world.check()

    @rule(us=st.sampled_from([0, 1, 5_000, 200_000, 1_500_000]))
    def time_passes(self, us: int) -> None:
        self.world.now_us += us
        self.world.check()

    @precondition(lambda self: self.lanes())
    @rule(place=pick, relieve=st.booleans())
    def a_loop_turns(self, place: int, relieve: bool) -> None:
        """Bytes are relieved, or a lane's loop finds nothing to do and waits for a wake or a timer."""
        world = self.world
        node, lane = self.choose(self.lanes(), place)
        machine = node.machine
        if relieve:
            machine.relieve()
            queued = any(lane.queue for lane in machine.lanes.values())
            assert machine.held_bytes <= LIMITS.held_bytes_max or not queued
            world.check()
        elif not node.ready(lane) and (
            lane in node.catch_ups or not lane.wants_catch_up(world.now_us)
        ):
            node.sleep(lane)

    @rule(place=st.integers(0, 7), endpoint=st.booleans(), paused=st.booleans())
    def pause_or_resume(self, place: int, endpoint: bool, paused: bool) -> None:
        world = self.world
        ids = [s for s in world.subscriptions if s not in world.deleted]
        if endpoint:
            world.pause_endpoint(self.choose(world.endpoints, place), paused=paused)
        else:
            world.pause_subscription(self.choose(ids, place), paused=paused)
        world.check()

    @rule(expiry=st.booleans(), steps=st.integers(1, 3), which=st.integers(0, 1))
    def job(self, expiry: bool, steps: int, which: int) -> None:
        node = self.node(which)
        for _ in range(steps):
            if node.job is not None:
                node.work()
            elif expiry:
                node.begin_expiry()
            else:
                node.begin_cancelling()
            self.world.check()

    @precondition(lambda self: self.moves)
    @rule(
        shard=st.sampled_from(SHARDS),
        to_itself=st.sampled_from([False, False, False, True]),
        steps=st.sampled_from([0, 0, 3, 8]),
    )
    def begin_a_hand_off(self, shard: int, to_itself: bool, steps: int) -> None:
        """To itself: given to nobody, and taken by the one who had it."""
        world = self.world
        node = world.homes[shard]
        if node.moving is None and node.holds(shard):
            other = world.nodes[1 - world.nodes.index(node)]
            node.begin_leaving(shard, node if to_itself else other)
            world.check()
            for _ in range(steps):
                world.move_on(node)
                world.check()

    @precondition(
        lambda self: self.world.waiting or any(n.moving is not None for n in self.world.nodes)
    )
    @rule(which=st.integers(0, 1), steps=st.integers(1, 6), how=st.integers(0, 7))
    def a_move_goes_on(self, which: int, steps: int, how: int) -> None:
        """Some steps of it. Rarely it is given up, or a shard goes by force, whatever is under way."""
        world = self.world
        for _ in range(steps):
            node = world.nodes[which]
            moving = node.moving
            if isinstance(moving, Leaving) and how == 0:
                node.stay(moving)
            elif isinstance(moving, Leaving) and how == 1:
                node.leave(moving, forced=True)
            else:
                world.move_on(node)
            world.check()

    @rule(place=pick, lost_records=st.sampled_from([0, 0, 1, 2]), what=st.integers(0, 8))
    def trouble(self, place: int, lost_records: int, what: int) -> None:
        """Rarely: what ends a run's more ordinary troubles comes too often otherwise."""
        world = self.world
        if what == 0:
            elsewhere = self.moves and place > 2
            world.crash(place % 2 if self.moves else 0, lost_records, elsewhere=elsewhere)
            if place % 3:
                world.settle_moves()
        elif what == 1 and len(world.deleted) < 4:
            ids = [s for s in world.subscriptions if s not in world.deleted]
            world.delete(self.choose(ids, place))
        elif what == 2 and world.log.records.owed:
            world.prune(self.choose(world.log.records.owed.values(), place).sequences[0])
        world.check()

    @override
    def teardown(self) -> None:
        if sys.exc_info()[0] is None:
            self.world.quiesce()


def run(machine: type[Machine], examples: int, **more: Any) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=50,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            **more,
        ),
    )


@pytest.mark.timeout(0)
def test_whatever_happens_nothing_is_lost_and_everything_arrives() -> None:
    run(Machine, int(os.environ.get("MODEL_EXAMPLES", "300")), print_blob=True)


# Tests of the test: bugs that it must find.


class PassesOpen(Obligations):
    """The checkpoint moves past deliveries that are open."""

    @override
    def committed(self, event: Event, woken: set[Lane]) -> None:
        super().committed(event, woken)
        event.open = 0


class DeletesClaimed(Obligations):
    """Claiming a row deletes it, before anything of it was sent."""

    @override
    def claim(
        self,
        lane: Lane,
        query: CatchUpQuery,
        rows: Iterable[FoundRow],
        horizon: int | None,
        retry_us: int | None,
    ) -> None:
        before = set(lane.rows)
        super().claim(lane, query, rows, horizon, retry_us)
        for key in set(lane.rows) - before:
            lane.rows[key].remaining.clear()
            self._mark_dirty(lane.rows[key])


class LosesDeletions(Obligations):
    """What an owed row stood for is settled, and the row stays."""

    @override
    def plan_record(self, now_us: int) -> RecordPlan | None:
        plan = super().plan_record(now_us)
        if plan is not None:
            plan.owed_deletes.clear()
        return plan


class ForgetsRetries(Obligations):
    """A resumed subscription's retries are not looked for."""

    @override
    def configure(
        self,
        shard: int,
        tenant: int,
        endpoints: Collection[Endpoint],
        subscriptions: Iterable[Subscription],
        parts: int = 1,
    ) -> list[Lane]:
        woken = super().configure(shard, tenant, endpoints, subscriptions, parts)
        for lane in woken:
            lane.retry_us = None
        return woken


class ReleasesEarly(Obligations):
    """A settled row can be claimed again before its deletion is durable."""

    @override
    def plan_record(self, now_us: int) -> RecordPlan | None:
        plan = super().plan_record(now_us)
        for lane in self.lanes.values():
            for key in plan.owed_deletes if plan is not None else ():
                lane.rows.pop(key, None)
        return plan


class FailureIsSuccess(Obligations):
    """A request without an answer counts as delivered."""

    @override
    def settle(
        self,
        lane: Lane,
        deliveries: Sequence[Delivery],
        outcome: Outcome,
        retry_due: RetryDue,
    ) -> Settled:
        return super().settle(
            lane, deliveries, replace(outcome, verdict=Verdict.DELIVERED), retry_due
        )


class TwoTransactions(Log):
    """A record's owed rows are written after the transaction that moves its checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.later: list[OwedInsert] = []

    @override
    def write(self, plan: RecordPlan) -> None:
        now, self.later = self.later, plan.owed_inserts
        super().write(replace(plan, owed_inserts=now))


class Unnumbered(Log):
    """Any record is taken, whatever it continues."""

    @override
    def check_number(self, shard: ShardRecord) -> None:
        pass


class OutlivesLoss(World):
    """The nodes go on after their database lost the last records. Only their numbers could tell them."""

    @override
    def crash(self, which: int, lost_records: int, *, elsewhere: bool) -> None:
        if lost_records:
            self.log.lose(lost_records)
        else:
            super().crash(which, 0, elsewhere=elsewhere)


class CleanTooEarly(Obligations):
    """A shard is handed off while outcomes of it are in no record."""

    @override
    def is_clean(self, shard: int) -> bool:
        return self._plan is None and not any(
            lane.in_flight for lane in self.lanes.values() if lane.shard == shard
        )


class ForgetsParked(Obligations):
    """What waited when a shard was paused is dropped, and its events count as closed."""

    @override
    def pause_shard(self, shard: int) -> None:
        super().pause_shard(shard)
        for delivery in self._parked:
            delivery.event.open -= 1
            self._let_go(delivery.event)
        self._parked.clear()


class BlindNode(Node):
    """Owed rows that stand in the log are not counted at a takeover."""

    @override
    def count(self, shard: int, subscription: int, rows: list[StoredRow]) -> None:
        pass


class RestoresNotOwed(World):
    """See `BlindNode`."""

    node_class = BlindNode


class HastyNode(Node):
    """Events are taken in, and sent, before the window was read."""

    @override
    def come(self, coming: Coming) -> None:
        super().come(coming)
        self.machine.windows[coming.shard].open = True


class TakesInTooEarly(World):
    """See `HastyNode`."""

    node_class = HastyNode


BUGS: list[tuple[type[World], type[Obligations], type[Log]]] = [
    (World, PassesOpen, Log),
    (World, DeletesClaimed, Log),
    (World, LosesDeletions, Log),
    (World, ForgetsRetries, Log),
    (World, ReleasesEarly, Log),
    (World, FailureIsSuccess, Log),
    (World, Obligations, TwoTransactions),
    (OutlivesLoss, Obligations, Unnumbered),
]
MOVING_BUGS: list[tuple[type[World], type[Obligations], type[Log]]] = [
    (World, CleanTooEarly, Log),
    (World, ForgetsParked, Log),
    (RestoresNotOwed, Obligations, Log),
    (TakesInTooEarly, Obligations, Log),
]
ALL_BUGS = BUGS + MOVING_BUGS


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "classes", ALL_BUGS, ids=[" ".join(c.__name__ for c in classes) for classes in ALL_BUGS]
)
def test_the_model_finds_a_planted_bug(
    classes: tuple[type[World], type[Obligations], type[Log]],
) -> None:
    world, obligations, log = classes

    class Planted(world):  # type: ignore[misc, valid-type]
        obligations_class = obligations
        log_class = log

        @override
        def check_memory(self) -> None:
            """Asked only where waiting for the bug to show outside takes too long."""
            if obligations is ForgetsRetries:
                super().check_memory()

    class PlantedMachine(Machine):
        world_class = Planted
        moves = classes in MOVING_BUGS

    with pytest.raises((AssertionError, KeyError)):
        run(PlantedMachine, 2000, phases=[Phase.generate], derandomize=True)
