"""Everything this node owes: the one place where deliveries become open, owed and settled.

The invariant it keeps: owed = (targets of events above the checkpoint) - (what settled attempts, dead letters and owed
rows name there) + owed rows. So whoever reads the log after a crash finds exactly what is still to be sent.

How: every delivery is settled once, in `_close`, and every change is collected until `plan_record` turns it into one
`RecordPlan`, which is written in one transaction; `recorded` tells that it was. There is one plan at a time. A plan that
fails has no way back: the node forgets this object and reads the log anew (see `pipeline.tenure`).

Pure: no clock, no I/O, no randomness. Times are microseconds since 1970 of the database's clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from outrider_server.domain.delivery import (
    OWED_SEQUENCES_MAX,
    AttemptRow,
    Cause,
    DeadLetter,
    Delivery,
    DeliveryState,
    OwedInsert,
    OwedRow,
)
from outrider_server.domain.endpoint import Endpoint, EndpointState
from outrider_server.domain.event import Event
from outrider_server.domain.outcome import Outcome, Verdict
from outrider_server.domain.sequence import SHARD_BITS, microseconds_of, shard_of
from outrider_server.domain.subscription import Subscription, SubscriptionState
from outrider_server.policy.checkpoint import Window
from outrider_server.policy.lane import Lane

OWED_ID_BITS = 20
"""An owed row's id is its record's number above this many bits, and its place in the record below."""

_SHARD_MASK = (1 << SHARD_BITS) - 1

RetryDue = Callable[[int, int], int | None]
"""(attempts made, when the event came, in us) -> when the next attempt is due, in us, or None when the policy ended."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of what is held in memory."""

    lane_deliveries_max: int = 10_000
    lane_bytes_max: int = 64 * 1024 * 1024
    held_bytes_max: int = 512 * 1024 * 1024
    window_us_max: int = 5_000_000
    window_events_max: int = 200_000


class Route:
    """A subscription's way to its lane. `backlog`: unclaimed rows of it that wait for room, not for a time."""

    __slots__ = ("active", "backlog", "deleted", "lane", "subscription", "tenant")

    def __init__(self, subscription: int, tenant: int, lane: Lane | None) -> None:
        self.subscription = subscription
        self.tenant = tenant
        self.lane = lane
        self.active = False
        self.deleted = lane is None
        self.backlog = 0


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
    """What one record transaction writes."""

    shards: list[ShardRecord]
    attempts: list[AttemptRow]
    dead_letters: list[DeadLetter]
    owed_inserts: list[OwedInsert]
    owed_updates: list[tuple[int, int, tuple[int, ...]]]
    owed_deletes: list[tuple[int, int]]
    claimed: set[tuple[int, int]]
    gone: list[tuple[Lane, OwedRow]]


@dataclass(frozen=True, slots=True)
class CatchUpQuery:
    """What a lane wants to read: unclaimed rows of these subscriptions, those with a row id in `claimed` left out."""

    subscriptions: list[int]
    claimed: list[int]
    backlog: bool
    retries: bool


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


class _Books:
    """Counts per shard and tenant since the last record."""

    __slots__ = ("cancelled", "dead", "delivered")

    def __init__(self) -> None:
        self.delivered: dict[int, int] = {}
        self.dead: dict[int, int] = {}
        self.cancelled: dict[int, int] = {}


class Obligations:
    """The deliveries of a node, from commit to record."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.windows: dict[int, Window] = {}
        self.lanes: dict[int, Lane] = {}
        self.routes: dict[int, Route] = {}
        self.held_bytes = 0
        self.spilled: dict[Cause, int] = dict.fromkeys(Cause, 0)
        self._spilling: set[Lane] = set()
        self._parked: list[Delivery] = []
        self._owed: dict[tuple[int, int, int, int, int, Cause], list[int]] = {}
        self._dead: dict[tuple[int, int, int, int, int, bool, str, int, str], list[int]] = {}
        self._dirty: dict[tuple[int, int], OwedRow] = {}
        self._attempts: list[AttemptRow] = []
        self._books: dict[int, _Books] = {}
        self._plan: RecordPlan | None = None

    # What is sent where: configuration.

    def configure(
        self, tenant: int, endpoints: Iterable[Endpoint], subscriptions: Iterable[Subscription]
    ) -> list[Lane]:
        """Take over a tenant's whole configuration; return the lanes that may have something to send now.

        A subscription or endpoint that is gone from it was deleted: its queued deliveries are cancelled here, its owed
        rows by `cancel` page by page (`deleted` names the subscriptions).
        """
        woken: list[Lane] = []
        for endpoint in endpoints:
            lane = self.lanes.get(endpoint.id)
            if lane is None:
                lane = Lane(endpoint, self.limits.lane_deliveries_max, self.limits.lane_bytes_max)
                self.lanes[endpoint.id] = lane
            lane.endpoint = endpoint
            lane.paused = endpoint.state is not EndpointState.ACTIVE
        present = set()
        for subscription in subscriptions:
            present.add(subscription.id)
            lane = self.lanes[subscription.endpoint]
            route = self.routes.get(subscription.id)
            if route is None:
                route = self.routes[subscription.id] = Route(subscription.id, tenant, lane)
            active = subscription.state is SubscriptionState.ACTIVE and not lane.paused
            if active and not route.active:
                self._activate(route, lane)
                woken.append(lane)
            elif route.active and not active:
                self._deactivate(route, lane)
        for route in self.routes.values():
            if route.tenant == tenant and route.subscription not in present and not route.deleted:
                self._delete(route)
        return woken

    def deleted(self) -> list[int]:
        """Subscriptions whose owed rows are to be cancelled."""
        return [
            route.subscription for route in self.routes.values() if route.deleted and route.backlog
        ]

    def _activate(self, route: Route, lane: Lane) -> None:
        route.active = True
        lane.backlog += route.backlog
        lane.retry_us = 0  # there may be retries: the first look tells when the next is due
        if any(delivery.subscription == route.subscription for delivery in self._parked):
            lane.owing = True

    def _deactivate(self, route: Route, lane: Lane) -> None:
        """Take a subscription's deliveries out of its lane: fresh ones will be owed, owed ones go back to their rows."""
        route.active = False
        lane.backlog -= route.backlog
        for delivery in self._take_out(lane, route.subscription):
            if delivery.owed is None:
                delivery.state = DeliveryState.SPILLED
                self._parked.append(delivery)
            else:
                self._put_back(lane, delivery)
        for key, row in list(lane.rows.items()):
            if (
                row.subscription == route.subscription
                and row.out == 0
                and not row.dirty
                and row.remaining
            ):
                self._forget(lane, key, row)
                route.backlog += not row.retry

    def _delete(self, route: Route) -> None:
        """Cancel a subscription's queued deliveries; those in flight end by themselves."""
        lane = route.lane
        if lane is None:
            return
        if route.active:
            lane.backlog -= route.backlog
        route.active = False
        route.deleted = True
        route.backlog += 1  # at least one look for owed rows, whatever was counted
        for delivery in self._take_out(lane, route.subscription):
            self._cancel(delivery, lane.endpoint.id)
        parked, self._parked = self._parked, []
        for delivery in parked:
            if delivery.subscription == route.subscription:
                self._cancel(delivery, lane.endpoint.id)
            else:
                self._parked.append(delivery)
        for row in [row for row in lane.waiting_rows if row.subscription == route.subscription]:
            for sequence in row.waiting:
                row.remaining.discard(sequence)
                self._note_dead(
                    row.shard,
                    row.tenant,
                    lane.endpoint.id,
                    row.subscription,
                    row.attempt,
                    "subscription deleted",
                    sequence,
                )
            row.waiting = []
            lane.waiting_rows.remove(row)
            self._mark_dirty(row)

    def _take_out(self, lane: Lane, subscription: int) -> list[Delivery]:
        """Remove a subscription's deliveries from the queue and the spill of a lane."""
        taken = [d for d in (*lane.queue, *lane.spill) if d.subscription == subscription]
        if taken:
            queued = [d for d in lane.queue if d.subscription != subscription]
            lane.queue.clear()
            lane.queue.extend(queued)
            lane.queue_bytes = sum(d.event.size for d in queued)
            spilled = [d for d in lane.spill if d.subscription != subscription]
            lane.spill.clear()
            lane.spill.extend(spilled)
        return taken

    def _put_back(self, lane: Lane, delivery: Delivery) -> None:
        """Return an owed delivery that is not in flight to its row, to be loaded again."""
        row = delivery.owed
        assert row is not None
        row.out -= 1
        if not row.waiting:
            lane.waiting_rows.append(row)
        row.waiting.append(delivery.event.sequence)
        row.waiting.sort(reverse=True)
        delivery.state = DeliveryState.SETTLED
        self._let_go(delivery.event)

    def _forget(self, lane: Lane, key: tuple[int, int], row: OwedRow) -> None:
        """Give up the claim on a row that nothing in memory refers to."""
        del lane.rows[key]
        if row.waiting:
            lane.waiting_rows.remove(row)

    # From ingest: an event gets its sequence, then commits.

    def assigned(self, event: Event) -> None:
        """An event got its sequence; until `committed` or `aborted` the checkpoint stays below it."""
        event.open = 1 + len(event.targets)
        self.windows[event.sequence & _SHARD_MASK].append(event)

    def aborted(self, event: Event) -> None:
        """The event's transaction was rolled back: there is no such event."""
        event.targets = ()
        event.open = 0
        event.deliveries = ()

    def committed(self, event: Event, woken: set[Lane]) -> None:
        """The event is durable: queue its deliveries, and add the lanes that got one to `woken`."""
        event.open -= 1
        if not event.targets:
            event.deliveries = ()
            return
        deliveries = []
        for subscription in event.targets:
            delivery = Delivery(event, subscription)
            deliveries.append(delivery)
            route = self.routes.get(subscription)
            self._hold(event)
            if route is None or route.lane is None or route.deleted:
                self._cancel(delivery, 0)
                continue
            lane = route.lane
            if not route.active:
                delivery.state = DeliveryState.SPILLED
                self._parked.append(delivery)
            elif lane.drains() or not lane.has_room():
                delivery.state = DeliveryState.SPILLED
                lane.spill.append(delivery)
                self._spilling.add(lane)
            else:
                lane.queue.append(delivery)
                lane.queue_bytes += event.size
                woken.add(lane)
        event.deliveries = deliveries

    def relieve(self) -> None:
        """Bring the bytes held under their bound: the lanes that hold most become owed first."""
        while self.held_bytes > self.limits.held_bytes_max:
            lane = max(self.lanes.values(), key=lambda lane: lane.queue_bytes, default=None)
            if lane is None or not lane.queue:
                return
            before = self.held_bytes
            for delivery in lane.queue:
                if delivery.owed is None:
                    self._owe_spilled(delivery, Cause.BYTE_BUDGET)
                    lane.owing = True
                else:
                    self._put_back(lane, delivery)
            lane.queue.clear()
            lane.queue_bytes = 0
            if self.held_bytes >= before:
                return

    # To the endpoint and back.

    def take(self, lane: Lane) -> list[Delivery]:
        """What the lane's next request carries; empty when there is nothing to send."""
        if not lane.queue and lane.spill:
            self._reclaim(lane)
        return lane.take()

    def settle(
        self, lane: Lane, deliveries: Sequence[Delivery], outcome: Outcome, retry_due: RetryDue
    ) -> None:
        """A request of `lane` ended: settle what it carried, or owe it for a retry, or bury it."""
        lane.in_flight -= 1
        endpoint = lane.endpoint
        first = deliveries[0]
        shard = first.event.sequence & _SHARD_MASK
        tenant = first.event.tenant
        books = self._books_of(shard)
        number = 0
        for delivery in deliveries:
            delivery.attempt += 1
            number = max(number, delivery.attempt)
        self._attempts.append(
            AttemptRow(
                shard,
                tenant,
                endpoint.id,
                endpoint.version,
                tuple([d.event.sequence for d in deliveries]),
                tuple([d.subscription for d in deliveries]),
                number,
                outcome.verdict,
                outcome.status,
                outcome.error,
                outcome.duration_ms,
                outcome.detail,
                outcome.response,
            )
        )
        if outcome.verdict is Verdict.DELIVERED:
            for delivery in deliveries:
                self._close(delivery)
            books.delivered[tenant] = books.delivered.get(tenant, 0) + len(deliveries)
            return
        due_of: dict[int, int | None] = {}
        for delivery in deliveries:
            self._fail(lane, delivery, outcome, retry_due, due_of)

    def _fail(
        self,
        lane: Lane,
        delivery: Delivery,
        outcome: Outcome,
        retry_due: RetryDue,
        due_of: dict[int, int | None],
    ) -> None:
        event = delivery.event
        route = self.routes.get(delivery.subscription)
        if route is None or route.deleted:
            self._cancel(delivery, lane.endpoint.id)
            return
        # What failed together is due together, so that it stays one batch and few rows.
        if delivery.attempt not in due_of:
            due_of[delivery.attempt] = retry_due(delivery.attempt, microseconds_of(event.sequence))
        due = due_of[delivery.attempt] if outcome.verdict is Verdict.RETRY else None
        shard = event.sequence & _SHARD_MASK
        self._close(delivery)
        if due is None:
            reason = (
                "retry policy ended" if outcome.verdict is Verdict.RETRY else "refused for good"
            )
            key = (
                shard, event.tenant, lane.endpoint.id, delivery.subscription, delivery.attempt, False, reason,
                outcome.status, outcome.detail,
            )  # fmt: skip
            self._dead.setdefault(key, []).append(event.sequence)
            books = self._books_of(shard)
            books.dead[event.tenant] = books.dead.get(event.tenant, 0) + 1
            return
        self._owe(
            shard,
            event.tenant,
            delivery.subscription,
            delivery.attempt,
            due,
            Cause.RETRY,
            event.sequence,
        )

    def _close(self, delivery: Delivery) -> None:
        """A delivery's fate is known and goes into the next record: it is open no longer.

        The one place where a delivery leaves memory.
        """
        event = delivery.event
        row = delivery.owed
        delivery.state = DeliveryState.SETTLED
        if row is None:
            event.open -= 1
        else:
            row.out -= 1
            row.remaining.discard(event.sequence)
            self._mark_dirty(row)
        self._let_go(event)

    def _cancel(self, delivery: Delivery, endpoint: int) -> None:
        event = delivery.event
        shard = event.sequence & _SHARD_MASK
        self._close(delivery)
        self._note_dead(
            shard,
            event.tenant,
            endpoint,
            delivery.subscription,
            delivery.attempt,
            "subscription deleted",
            event.sequence,
        )

    def _note_dead(
        self,
        shard: int,
        tenant: int,
        endpoint: int,
        subscription: int,
        attempts: int,
        reason: str,
        sequence: int,
    ) -> None:
        key = (shard, tenant, endpoint, subscription, attempts, True, reason, 0, "")
        self._dead.setdefault(key, []).append(sequence)
        books = self._books_of(shard)
        books.cancelled[tenant] = books.cancelled.get(tenant, 0) + 1

    def _hold(self, event: Event) -> None:
        if event.held == 0:
            self.held_bytes += event.size
        event.held += 1

    def _let_go(self, event: Event) -> None:
        event.held -= 1
        if event.held == 0:
            self.held_bytes -= event.size
            event.data = b""
            event.envelope = None

    def _mark_dirty(self, row: OwedRow) -> None:
        row.dirty = True
        self._dirty[row.shard, row.id] = row

    def _books_of(self, shard: int) -> _Books:
        books = self._books.get(shard)
        if books is None:
            books = self._books[shard] = _Books()
        return books

    # Owed: what memory has no room for, and what comes back from there.

    def _owe(
        self,
        shard: int,
        tenant: int,
        subscription: int,
        attempt: int,
        due_us: int,
        cause: Cause,
        sequence: int,
    ) -> None:
        self._owed.setdefault((shard, tenant, subscription, attempt, due_us, cause), []).append(
            sequence
        )

    def _owe_spilled(self, delivery: Delivery, cause: Cause) -> None:
        event = delivery.event
        self._close(delivery)
        self._owe(
            event.sequence & _SHARD_MASK,
            event.tenant,
            delivery.subscription,
            delivery.attempt,
            0,
            cause,
            event.sequence,
        )
        self.spilled[cause] += 1

    def _reclaim(self, lane: Lane) -> None:
        """Take spilled deliveries back into a lane that has room again, before anything was written for them."""
        if lane.backlog or lane.waiting_rows or lane.owing or lane.paused:
            return
        while lane.spill and lane.has_room():
            lane.push(lane.spill.popleft())

    def catch_up_query(self, lane: Lane, now_us: int) -> CatchUpQuery | None:
        """What to read for a lane; None when no reading is needed (rows may still wait to be loaded)."""
        backlog, retries = lane.wants_backlog(), lane.wants_retries(now_us)
        if not backlog and not retries:
            return None
        subscriptions = [
            r.subscription for r in self.routes.values() if r.lane is lane and r.active
        ]
        return CatchUpQuery(subscriptions, [row_id for _, row_id in lane.rows], backlog, retries)

    def claim(
        self,
        lane: Lane,
        query: CatchUpQuery,
        rows: Iterable[FoundRow],
        horizon: int | None,
        retry_us: int | None,
    ) -> None:
        """Take in what a `catch_up_query` found.

        `horizon`: where the rows stopped because there are more, the first sequence of the last one; else None.
        `retry_us`: when the next retry not found yet is due (with `query.retries`).
        """
        if query.backlog:
            lane.horizon = horizon
        if query.retries:
            lane.retry_us = retry_us
        for found in rows:
            key = (found.shard, found.id)
            route = self.routes.get(found.subscription)
            if key in lane.rows or route is None or not route.active or route.lane is not lane:
                continue
            row = OwedRow(
                found.shard,
                found.id,
                found.tenant,
                found.subscription,
                found.sequences,
                found.attempt,
            )
            row.retry = found.due_us > 0
            row.waiting = sorted(found.sequences, reverse=True)
            lane.rows[key] = row
            lane.waiting_rows.append(row)
            if found.due_us == 0:
                route.backlog -= 1
                lane.backlog -= 1

    def to_load(self, lane: Lane, deliveries_max: int) -> list[ToLoad]:
        """Deliveries of claimed rows, in sequence order, for which the lane has room; their events are to be read."""
        room = min(lane.room()[0], deliveries_max)
        loading: list[ToLoad] = []
        rows = [row for row in lane.waiting_rows if self.routes[row.subscription].active]
        while len(loading) < room and rows:
            row = min(rows, key=_next_sequence)
            if lane.horizon is not None and row.waiting[-1] > lane.horizon:
                break
            loading.append(ToLoad(row, row.waiting.pop()))
            if not row.waiting:
                rows.remove(row)
                lane.waiting_rows.remove(row)
        return loading

    def loaded(
        self, lane: Lane, loading: Sequence[ToLoad], events: dict[int, Event], last: int | None
    ) -> None:
        """The events of `loading` were read, up to the sequence `last` (None: all of them); queue their deliveries.

        What lies beyond `last` waits again. An event at or below it that was not found is gone with its partition.
        """
        for item in loading:
            row = item.row
            route = self.routes[row.subscription]
            event = events.get(item.sequence)
            if route.deleted:
                row.remaining.discard(item.sequence)
                self._note_dead(
                    row.shard, row.tenant, lane.endpoint.id, row.subscription, row.attempt, "subscription deleted",
                    item.sequence,
                )  # fmt: skip
                self._mark_dirty(row)
            elif not route.active or (event is None and last is not None and item.sequence > last):
                if not row.waiting:
                    lane.waiting_rows.append(row)
                row.waiting.append(item.sequence)
                row.waiting.sort(reverse=True)
            elif event is None:
                self._expire(row, lane.endpoint.id, item.sequence)
            else:
                delivery = Delivery(event, row.subscription, row.attempt, row)
                row.out += 1
                self._hold(event)
                lane.push(delivery)

    def _expire(self, row: OwedRow, endpoint: int, sequence: int) -> None:
        key = (
            row.shard,
            row.tenant,
            endpoint,
            row.subscription,
            row.attempt,
            False,
            "expired",
            0,
            "",
        )
        self._dead.setdefault(key, []).append(sequence)
        books = self._books_of(row.shard)
        books.dead[row.tenant] = books.dead.get(row.tenant, 0) + 1
        row.remaining.discard(sequence)
        self._mark_dirty(row)

    def end_rows(self, rows: Iterable[FoundRow], *, expired: bool) -> int:
        """Settle whole unclaimed rows without sending: expired (dead) or of deleted subscriptions (cancelled).

        Rows that are claimed, or whose subscription lives on, are passed over (save when expired). Returns how many
        deliveries were settled.
        """
        ended = 0
        for found in rows:
            key = (found.shard, found.id)
            route = self.routes.get(found.subscription)
            lane = route.lane if route is not None else None
            if key in self._dirty or (lane is not None and key in lane.rows):
                continue
            if not expired and route is not None and not route.deleted:
                continue
            row = OwedRow(
                found.shard,
                found.id,
                found.tenant,
                found.subscription,
                found.sequences,
                found.attempt,
            )
            endpoint = lane.endpoint.id if lane is not None else 0
            if lane is not None:
                lane.rows[key] = row  # claimed until the record that deletes it
            for sequence in found.sequences:
                if expired:
                    self._expire(row, endpoint, sequence)
                else:
                    row.remaining.discard(sequence)
                    self._note_dead(
                        row.shard,
                        row.tenant,
                        endpoint,
                        row.subscription,
                        row.attempt,
                        "subscription deleted",
                        sequence,
                    )
                ended += 1
            self._mark_dirty(row)
            if expired and route is not None and found.due_us == 0 and route.backlog:
                route.backlog -= 1
                if route.active and lane is not None:
                    lane.backlog -= 1
        return ended

    def cancelled_all(self, subscription: int) -> None:
        """No owed row of a deleted subscription was found any more."""
        self.routes[subscription].backlog = 0

    # Records.

    def plan_record(self, now_us: int) -> RecordPlan | None:
        """Everything since the last record as one plan; None when there is nothing to write.

        Call `recorded` when it is durable, before the next plan.
        """
        assert self._plan is None, "one record at a time"
        self._owe_spills()
        for lane in self.lanes.values():
            lane.owing = False  # from here on `backlog` counts those rows
        inserts: list[OwedInsert] = []
        counters: dict[int, int] = {}
        claimed = self._owe_old_ends(now_us, inserts, counters)
        for (shard, tenant, subscription, attempt, due_us, cause), sequences in self._owed.items():
            sequences.sort()
            for start in range(0, len(sequences), OWED_SEQUENCES_MAX):
                chunk = tuple(sequences[start : start + OWED_SEQUENCES_MAX])
                row_id = self._next_id(shard, counters)
                inserts.append(
                    OwedInsert(shard, row_id, tenant, subscription, chunk, attempt, due_us, cause)
                )
                self._count_unclaimed(subscription, due_us)
        updates, deletes, gone = self._dirty_rows()
        dead = [
            DeadLetter(shard, tenant, endpoint, subscription, tuple(seqs), attempts, cancelled, reason, status, detail)
            for (shard, tenant, endpoint, subscription, attempts, cancelled, reason, status, detail), seqs
            in self._dead.items()
        ]  # fmt: skip
        attempts, self._attempts = self._attempts, []
        touched = (
            set(counters) | set(self._books) | {a.shard for a in attempts} | {d.shard for d in dead}
        )
        touched |= {shard for shard, _, _ in updates} | {shard for shard, _ in deletes}
        shards = self._shard_records(touched)
        self._owed, self._dead, self._dirty, self._books = {}, {}, {}, {}
        if not shards:
            return None
        self._plan = RecordPlan(shards, attempts, dead, inserts, updates, deletes, claimed, gone)
        return self._plan

    def recorded(self, plan: RecordPlan) -> list[Lane]:
        """The plan is durable. Returns the lanes that got rows, which may want to catch up."""
        assert plan is self._plan, "this plan is not the one under way"
        self._plan = None
        for lane, row in plan.gone:
            lane.rows.pop((row.shard, row.id), None)
        woken: dict[Lane, None] = {}
        for insert in plan.owed_inserts:
            route = self.routes.get(insert.subscription)
            if route is None or route.lane is None or (insert.shard, insert.id) in plan.claimed:
                continue
            lane = route.lane
            lane.unrecorded = 0
            if insert.due_us and (lane.retry_us is None or insert.due_us < lane.retry_us):
                lane.retry_us = insert.due_us
            woken[lane] = None
        return list(woken)

    def unrecorded(self) -> int:
        """Outcomes that no record holds yet: bounded by the sender, which stops above its limit."""
        return len(self._attempts)

    def _owe_spills(self) -> None:
        for lane in self._spilling:
            self._reclaim(lane)
            while lane.spill:
                self._owe_spilled(lane.spill.popleft(), Cause.LANE_FULL)
        self._spilling.clear()
        for delivery in self._parked:
            self._owe_spilled(delivery, Cause.PAUSED)
        self._parked.clear()

    def _owe_old_ends(
        self, now_us: int, inserts: list[OwedInsert], counters: dict[int, int]
    ) -> set[tuple[int, int]]:
        """Write owed rows for what is still open at the old end of the windows; memory goes on with it, as claimed."""
        before_us = now_us - self.limits.window_us_max
        events_max = self.limits.window_events_max // max(
            1, sum(1 for w in self.windows.values() if len(w))
        )
        old: dict[tuple[int, int, int, int], list[Delivery]] = {}
        for shard, window in self.windows.items():
            for event in window.old_end(before_us, events_max):
                if event.open == 0:
                    continue
                for delivery in event.deliveries:
                    if delivery.owed is None and delivery.state in (
                        DeliveryState.QUEUED,
                        DeliveryState.IN_FLIGHT,
                    ):
                        old.setdefault(
                            (shard, event.tenant, delivery.subscription, delivery.attempt), []
                        ).append(delivery)
        claimed: set[tuple[int, int]] = set()
        for (shard, tenant, subscription, attempt), deliveries in old.items():
            lane = self.routes[subscription].lane
            assert lane is not None
            for start in range(0, len(deliveries), OWED_SEQUENCES_MAX):
                chunk = deliveries[start : start + OWED_SEQUENCES_MAX]
                sequences = [d.event.sequence for d in chunk]
                row_id = self._next_id(shard, counters)
                row = OwedRow(shard, row_id, tenant, subscription, sequences, attempt)
                row.out = len(chunk)
                lane.rows[shard, row_id] = row
                claimed.add((shard, row_id))
                for delivery in chunk:
                    delivery.owed = row
                    delivery.event.open -= 1
                inserts.append(
                    OwedInsert(
                        shard,
                        row_id,
                        tenant,
                        subscription,
                        tuple(sequences),
                        attempt,
                        0,
                        Cause.WINDOW_PASSED,
                    )
                )
                self.spilled[Cause.WINDOW_PASSED] += len(chunk)
        return claimed

    def _next_id(self, shard: int, counters: dict[int, int]) -> int:
        place = counters.get(shard, 0)
        counters[shard] = place + 1
        return ((self.windows[shard].record_no + 1) << OWED_ID_BITS) + place

    def _count_unclaimed(self, subscription: int, due_us: int) -> None:
        """A row is about to be written that nothing in memory stands for."""
        route = self.routes.get(subscription)
        if route is None or due_us:
            return
        route.backlog += 1
        if route.active and route.lane is not None:
            route.lane.backlog += 1
            route.lane.unrecorded += 1

    def _dirty_rows(
        self,
    ) -> tuple[
        list[tuple[int, int, tuple[int, ...]]], list[tuple[int, int]], list[tuple[Lane, OwedRow]]
    ]:
        updates: list[tuple[int, int, tuple[int, ...]]] = []
        deletes: list[tuple[int, int]] = []
        gone: list[tuple[Lane, OwedRow]] = []
        for (shard, row_id), row in self._dirty.items():
            row.dirty = False
            if row.remaining:
                updates.append((shard, row_id, tuple(sorted(row.remaining))))
                continue
            deletes.append((shard, row_id))
            route = self.routes.get(row.subscription)
            if route is not None and route.lane is not None:
                # It stays claimed until the deletion is durable, or a reader could find it once more.
                gone.append((route.lane, row))
        return updates, deletes, gone

    def _shard_records(self, touched: set[int]) -> list[ShardRecord]:
        records = []
        for shard, window in self.windows.items():
            matched: dict[int, int] = {}
            moved = window.pass_closed(matched)
            if not moved and shard not in touched:
                continue
            window.record_no += 1
            books = self._books.get(shard) or _Books()
            records.append(
                ShardRecord(
                    shard,
                    window.epoch,
                    window.record_no,
                    window.checkpoint,
                    matched,
                    books.delivered,
                    books.dead,
                    books.cancelled,
                )
            )
        return records

    # Start and takeover.

    def restore_window(
        self,
        window: Window,
        events: Iterable[tuple[int, int, Sequence[int]]],
        settled: set[tuple[int, int]],
    ) -> None:
        """Take a shard over: `events` are (sequence, tenant, targets) above the checkpoint in sequence order, `settled`
        the (sequence, subscription) pairs that attempts, dead letters and owed rows name.

        What is left becomes owed in the first record, so a start needs no memory for payloads and moves the checkpoint
        to the end of the window at once; the lanes then catch up like after any other backlog.
        """
        self.windows[window.shard] = window
        for sequence, tenant, targets in events:
            event = Event(
                tenant, "", b"", 0, sequence=sequence, targets=tuple(targets), deliveries=()
            )
            window.append(event)
            for subscription in targets:
                if (sequence, subscription) not in settled:
                    self._owe(
                        shard_of(sequence), tenant, subscription, 0, 0, Cause.RECOVERED, sequence
                    )

    def restore_owed(
        self, subscription: int, tenant: int, backlog: int, retry_us: int | None
    ) -> None:
        """Owed rows stand in the log: `backlog` rows that wait for room, and retries of which one is due at `retry_us`."""
        route = self.routes.get(subscription)
        if route is None:
            route = self.routes[subscription] = Route(subscription, tenant, None)
            route.backlog += 1
        route.backlog += backlog
        if route.lane is not None and route.active:
            route.lane.backlog += backlog
            if retry_us is not None and (
                route.lane.retry_us is None or retry_us < route.lane.retry_us
            ):
                route.lane.retry_us = retry_us


def _next_sequence(row: OwedRow) -> int:
    return row.waiting[-1]
