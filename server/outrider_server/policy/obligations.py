"""Everything this node owes: the one place where deliveries become open, owed and settled.

The invariant it keeps: owed = (targets of events above the checkpoint) - (what settled attempts, dead letters and owed
rows name there) + owed rows. So whoever reads the log after a crash finds exactly what is still to be sent.

How: every delivery is settled once, in `_close`, and every change is collected until `plan_record` turns it into one
`RecordPlan`, which is written in one transaction; `recorded` tells that it was. There is one plan at a time. A plan that
fails has no way back: the node forgets this object and reads the log anew (see `pipeline.tenure`).

Pure: no clock, no I/O, no randomness. Times are microseconds since 1970 of the database's clock.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from heapq import heapify, heappop, heapreplace
from weakref import WeakSet

from outrider_server.domain.delivery import (
    HELD_BACK_US,
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
from outrider_server.domain.sequence import SHARD_BITS, microseconds_of
from outrider_server.domain.subscription import Subscription, SubscriptionState
from outrider_server.policy.checkpoint import Window
from outrider_server.policy.lane import Lane
from outrider_server.policy.plans import (
    CatchUpQuery,
    FoundRow,
    Limits,
    Look,
    RecordPlan,
    Settled,
    ShardRecord,
    ToLoad,
)

OWED_ID_BITS = 20
"""An owed row's id is its record's number above this many bits, and its place in the record below."""

SUBSCRIPTION_DELETED = "subscription deleted"
POLICY_ENDED = "retry policy ended"
REFUSED = "refused for good"
EXPIRED = "expired"

_SHARD_MASK = (1 << SHARD_BITS) - 1
_STEP = 1 << SHARD_BITS

RetryDue = Callable[[int, int], int | None]
"""(attempts made, when the event came, in us) -> when the next attempt is due, in us, or None when the policy ended."""


class Route:
    """A subscription's way to its lane, for the events of one shard.

    `backlog`: unclaimed rows of it that wait for room, not for a time; `unrecorded`: those of them that the record under
    way writes. A deleted one's `backlog` only says whether its rows are to be looked for.
    """

    __slots__ = (
        "active",
        "backlog",
        "deleted",
        "lane",
        "shard",
        "subscription",
        "tenant",
        "unrecorded",
    )

    def __init__(self, shard: int, subscription: int, tenant: int, lane: Lane | None) -> None:
        self.shard = shard
        self.subscription = subscription
        self.tenant = tenant
        self.lane = lane
        self.active = False
        self.deleted = lane is None
        self.backlog = 0
        self.unrecorded = 0


class _Books:
    """Counts per shard and tenant since the last record."""

    __slots__ = ("cancelled", "dead", "delivered")

    def __init__(self) -> None:
        self.delivered: dict[int, int] = {}
        self.dead: dict[int, int] = {}
        self.cancelled: dict[int, int] = {}


class Obligations:
    """The deliveries of a node, from commit to record.

    Lanes and routes are per shard, so that a shard can come and go without the others: `lanes` by (shard, endpoint),
    `routes` by (shard, subscription). Only a split tenant has several of each.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.windows: dict[int, Window] = {}
        self.lanes: dict[tuple[int, int], Lane] = {}
        self.routes: dict[tuple[int, int], Route] = {}
        self.held_bytes = 0
        self.spilled: dict[Cause, int] = dict.fromkeys(Cause, 0)
        self._spilling: set[Lane] = set()
        self._parked: list[Delivery] = []
        self._routes_of: dict[tuple[int, int], dict[int, Route]] = {}
        self._lanes_of: dict[tuple[int, int], dict[int, Lane]] = {}
        self._leaving: set[int] = set()
        self._looks: WeakSet[Look] = WeakSet()
        self._ending: dict[tuple[int, int], OwedRow] = {}
        self._owed: dict[tuple[int, int, int, int, int, Cause], list[int]] = {}
        self._dead: dict[tuple[int, int, int, int, int, bool, str, int, str], list[int]] = {}
        self._dirty: dict[tuple[int, int], OwedRow] = {}
        self._attempts: list[AttemptRow] = []
        self._outcomes = 0
        self._outcomes_planned = 0
        self._books: dict[int, _Books] = {}
        self._plan: RecordPlan | None = None

    # What is sent where: configuration.

    def configure(
        self,
        shard: int,
        tenant: int,
        endpoints: Collection[Endpoint],
        subscriptions: Iterable[Subscription],
        parts: int = 1,
    ) -> list[Lane]:
        """Take over a tenant's whole configuration for one shard; return the lanes that may have something to do now.

        A subscription or endpoint that is gone from it was deleted: its queued deliveries are cancelled here, its owed
        rows by `cancel` page by page (`deleted` names the subscriptions). `parts`: over how many shards the tenant is
        split, and its limits with it.
        """
        lanes = self._lanes_of.setdefault((shard, tenant), {})
        routes = self._routes_of.setdefault((shard, tenant), {})
        woken: dict[Lane, None] = {}
        for endpoint in endpoints:
            lane = lanes.get(endpoint.id)
            if lane is None:
                lane = Lane(
                    endpoint, self.limits.lane_deliveries_max, self.limits.lane_bytes_max, shard
                )
                self.lanes[shard, endpoint.id] = lanes[endpoint.id] = lane
            if lane.configure(endpoint, parts):
                woken[lane] = None
            lane.paused = endpoint.state is not EndpointState.ACTIVE
        present = set()
        for subscription in subscriptions:
            present.add(subscription.id)
            lane = lanes[subscription.endpoint]
            route = routes.get(subscription.id)
            known = route is not None
            if route is None:
                route = self._add_route(Route(shard, subscription.id, tenant, lane))
            active = (
                subscription.state is SubscriptionState.ACTIVE
                and not lane.paused
                and shard not in self._leaving
            )
            if active and not route.active:
                self._activate(route, lane)
                if known:  # it may have retries: the first look tells when the next is due
                    self._retry_at(lane, 0)
                woken[lane] = None
            elif route.active and not active:
                self._deactivate(route, lane)
                woken[lane] = None
        for route in routes.values():
            if route.subscription not in present and not route.deleted:
                assert route.lane is not None
                self._delete(route, route.lane)
                woken[route.lane] = None
        self._forget_lanes(shard, lanes, {endpoint.id for endpoint in endpoints})
        return list(woken)

    def _add_route(self, route: Route) -> Route:
        self.routes[route.shard, route.subscription] = route
        self._routes_of.setdefault((route.shard, route.tenant), {})[route.subscription] = route
        return route

    def _forget_lanes(self, shard: int, lanes: dict[int, Lane], present: set[int]) -> None:
        """Drop the lanes of deleted endpoints, once nothing is in them."""
        for endpoint in [endpoint for endpoint in lanes if endpoint not in present]:
            lane = lanes[endpoint]
            if not (lane.queue or lane.spill or lane.rows or lane.in_flight):
                del self.lanes[shard, endpoint], lanes[endpoint]

    def deleted(self) -> list[tuple[int, int]]:
        """(shard, subscription) pairs whose owed rows are to be cancelled."""
        return [
            key
            for key, route in self.routes.items()
            if route.deleted and route.backlog and route.shard not in self._leaving
        ]

    # Shards that leave.

    def pause_shard(self, shard: int) -> None:
        """The shard is to be handed off: nothing more of it is sent; what waits becomes owed with the next records."""
        self._leaving.add(shard)
        for route in self.routes.values():
            if route.shard == shard and route.active:
                assert route.lane is not None
                self._deactivate(route, route.lane)

    def keep_shard(self, shard: int) -> None:
        """It is not handed off after all. Its tenants are to be configured again."""
        self._leaving.discard(shard)

    def in_flight_of(self, shard: int) -> int:
        """Requests under way for a shard."""
        return sum(lane.in_flight for lane in self.lanes.values() if lane.shard == shard)

    def busy_shards(self) -> set[int]:
        """The shards with requests under way."""
        return {lane.shard for lane in self.lanes.values() if lane.in_flight}

    def is_clean(self, shard: int) -> bool:
        """Whether memory holds nothing of a shard that the log does not say: it can be handed off."""
        return not (
            self._plan is not None
            or len(self.windows[shard])
            or shard in self._books
            or any(row.shard == shard for row in self._ending.values())
            or any(key[0] == shard for key in self._owed)
            or any(key[0] == shard for key in self._dead)
            or any(key[0] == shard for key in self._dirty)
            or any(attempt.shard == shard for attempt in self._attempts)
            or any(delivery.shard == shard for delivery in self._parked)
            or any(
                lane.in_flight or lane.loading or lane.catching_up
                for lane in self.lanes.values()
                if lane.shard == shard
            )
        )

    def forget_shard(self, shard: int) -> None:
        """It belongs to another node now. What is still in flight may end, and is no longer settled here."""
        assert self._plan is None, "between two records"
        for look in self._looks:
            look.left.add(shard)
        del self.windows[shard]
        self._leaving.discard(shard)
        for key in [key for key in self.lanes if key[0] == shard]:
            lane = self.lanes.pop(key)
            lane.paused = True
            for delivery in (*lane.queue, *lane.spill):
                self._let_go(delivery.event)
            lane.queue.clear()
            lane.spill.clear()
            self._spilling.discard(lane)
        for key in [key for key in self.routes if key[0] == shard]:
            del self.routes[key]
        for of in (self._routes_of, self._lanes_of):
            for key in [key for key in of if key[0] == shard]:
                del of[key]
        for delivery in self._parked:
            if delivery.shard == shard:
                self._let_go(delivery.event)
        self._parked = [delivery for delivery in self._parked if delivery.shard != shard]
        self._attempts = [attempt for attempt in self._attempts if attempt.shard != shard]
        self._outcomes = sum(len(attempt.sequences) for attempt in self._attempts)
        self._owed = {key: held for key, held in self._owed.items() if key[0] != shard}
        self._dead = {key: held for key, held in self._dead.items() if key[0] != shard}
        self._dirty = {key: held for key, held in self._dirty.items() if key[0] != shard}
        self._ending = {key: held for key, held in self._ending.items() if key[0] != shard}
        self._books.pop(shard, None)

    def _activate(self, route: Route, lane: Lane) -> None:
        route.active = True
        lane.subscriptions[route.subscription] = None
        lane.backlog += route.backlog
        lane.unrecorded += route.unrecorded
        # What waited while it was paused may belong before what the lane has claimed.
        self._read_again(lane)
        lane.waiting_rows += [
            row
            for row in lane.rows.values()
            if row.subscription == route.subscription and row.waiting
        ]
        soon = [delivery.subscription for delivery in self._parked]
        soon += [row.subscription for row in self._ending.values() if row.remaining]
        soon += [key[2] for key in self._owed if not key[4]]
        if route.subscription in soon:
            lane.owing = True
        if route.unrecorded:
            lane.owing_now = True

    def _leave(self, route: Route, lane: Lane) -> list[Delivery]:
        """Take a subscription out of its lane; return its deliveries that waited there."""
        if route.active:
            route.active = False
            del lane.subscriptions[route.subscription]
            lane.backlog -= route.backlog
            lane.unrecorded -= route.unrecorded
            lane.waiting_rows = [
                row for row in lane.waiting_rows if row.subscription != route.subscription
            ]
        return self._take_out(lane, route.subscription)

    def _deactivate(self, route: Route, lane: Lane) -> None:
        """Pause a subscription: its fresh deliveries will be owed, owed ones go back to their rows."""
        for delivery in self._leave(route, lane):
            if delivery.owed is None:
                delivery.state = DeliveryState.SPILLED
                self._parked.append(delivery)
            else:
                self._put_back(lane, delivery)
        for row in [row for row in lane.rows.values() if row.subscription == route.subscription]:
            self._release(lane, route, row)

    def _delete(self, route: Route, lane: Lane) -> None:
        """Cancel a subscription's queued deliveries; those in flight end by themselves."""
        queued = self._leave(route, lane)
        route.deleted = True
        route.backlog += 1  # at least one look for owed rows, whatever was counted
        for delivery in queued:
            self._cancel(delivery, lane.endpoint.id)
        parked, self._parked = self._parked, []
        for delivery in parked:
            if delivery.subscription == route.subscription:
                self._cancel(delivery, lane.endpoint.id)
            else:
                self._parked.append(delivery)
        for row in lane.rows.values():
            if row.subscription == route.subscription and row.waiting:
                waiting, row.waiting = row.waiting, []
                for sequence in waiting:
                    self._cancel_waiting(row, lane.endpoint.id, sequence)

    def _cancel_waiting(self, row: OwedRow, endpoint: int, sequence: int) -> None:
        """Cancel a delivery of a deleted subscription that only its row stands for."""
        row.remaining.discard(sequence)
        self._note_dead(
            row.shard,
            row.tenant,
            endpoint,
            row.subscription,
            row.attempt,
            SUBSCRIPTION_DELETED,
            sequence,
            cancelled=True,
        )
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
        delivery.state = DeliveryState.SETTLED
        self._let_go(delivery.event)
        self._wait_again(lane, row, delivery.event.sequence)

    def _wait_again(self, lane: Lane, row: OwedRow, sequence: int) -> None:
        """A sequence of a claimed row is in memory no longer."""
        route = self.routes[row.shard, row.subscription]
        row.out -= 1
        if route.active and not row.waiting:
            lane.waiting_rows.append(row)
        row.waiting.append(sequence)
        row.waiting.sort(reverse=True)
        if not route.active:
            self._release(lane, route, row)

    def _release(self, lane: Lane, route: Route, row: OwedRow) -> None:
        """Give up the claim on a paused subscription's row, once nothing in memory and no record refers to it."""
        if row.remaining and not row.out and not row.dirty and not row.planned:
            del lane.rows[row.shard, row.id]
            route.backlog += not row.retry

    def _read_again(self, lane: Lane) -> None:
        """Rows come up that may belong before those that the lane has claimed: read them first."""
        lane.horizon = -1
        for look in self._looks:
            if look.lane is lane:
                look.overtaken = True

    def _retry_at(self, lane: Lane, due_us: int) -> None:
        """A retry of the lane came up that nothing in memory stands for."""
        if lane.retry_us is None or due_us < lane.retry_us:
            lane.retry_us = due_us
        for look in self._looks:
            if look.lane is lane and (look.retry_us is None or due_us < look.retry_us):
                look.retry_us = due_us

    # From ingest: an event gets its sequence, then commits.

    def assigned(self, window: Window, events: Sequence[Event], first: int) -> None:
        """Events of one shard get sequences from `first` on; until `committed` or `aborted` the checkpoint stays below."""
        sequence = first
        for event in events:
            event.sequence = sequence
            event.open = 1 + len(event.targets)
            sequence += _STEP
        window.extend(events)

    def aborted(self, event: Event) -> None:
        """The event's transaction was rolled back: its sequence is nobody's, and it may be given another."""
        self.windows[event.sequence & _SHARD_MASK].discard(event)
        event.open = 0

    def committed(self, event: Event, woken: set[Lane]) -> None:
        """The event is durable: queue its deliveries, and add the lanes that got one to `woken`."""
        event.open -= 1
        targets = event.targets
        if not targets:
            event.deliveries = ()
            return
        # One hold more than deliveries until all are dealt out, or a cancelled one could drop the others' payload.
        event.held = 1 + len(targets)
        self.held_bytes += event.size
        deliveries = []
        shard = event.sequence & _SHARD_MASK
        for subscription in targets:
            delivery = Delivery(event, subscription)
            deliveries.append(delivery)
            route = self.routes.get((shard, subscription))
            if route is None or route.deleted or route.lane is None:
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
        self._let_go(event)

    def relieve(self) -> list[Lane]:
        """Bring the bytes held under their bound: the lanes that hold most become owed first. Returns these lanes.

        They may want to catch up later: what came from rows waits in them again, and no record will tell. What is in
        flight stays, and what spilled leaves with the next record.
        """
        relieved: list[Lane] = []
        while self.held_bytes > self.limits.held_bytes_max:
            lane = max(self.lanes.values(), key=_queue_bytes, default=None)
            if lane is None or not lane.queue:
                break
            relieved.append(lane)
            queued = list(lane.queue)
            lane.queue.clear()
            lane.queue_bytes = 0
            for delivery in queued:
                if delivery.owed is None:
                    self._owe_spilled(delivery, Cause.BYTE_BUDGET)
                    lane.owing = True
                else:
                    self._put_back(lane, delivery)
            if lane.owing:
                self._read_again(lane)
        return relieved

    # To the endpoint and back.

    def take(self, lane: Lane) -> list[Delivery]:
        """What the lane's next request carries; empty when there is nothing to send."""
        if lane.spill and not lane.queue:
            self._reclaim(lane)
        taken = lane.take()
        if lane.spill:
            self._reclaim(lane)
        return taken

    def settle(
        self, lane: Lane, deliveries: Sequence[Delivery], outcome: Outcome, retry_due: RetryDue
    ) -> Settled:
        """A request of `lane` ended: settle what it carried, or owe it for a retry, or bury it.

        `retry_due` should give equal times for equal attempts: what failed together then stays one batch and few rows.
        """
        lane.in_flight -= 1
        endpoint = lane.endpoint
        first = deliveries[0]
        shard = lane.shard
        if self.lanes.get((shard, endpoint.id)) is not lane:
            # Handed off while this was under way: its next owner sends it again.
            for delivery in deliveries:
                self._let_go(delivery.event)
            return Settled()
        tenant = first.event.tenant
        books = self._books_of(shard)
        number = 0
        for delivery in deliveries:
            delivery.attempt += 1
            if delivery.attempt > number:
                number = delivery.attempt
        self._outcomes += len(deliveries)
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
            self._close(deliveries)
            books.delivered[tenant] = books.delivered.get(tenant, 0) + len(deliveries)
            return Settled()
        settled = Settled()
        for delivery in deliveries:
            self._fail(lane, delivery, outcome, retry_due, settled)
        return settled

    def _fail(
        self,
        lane: Lane,
        delivery: Delivery,
        outcome: Outcome,
        retry_due: RetryDue,
        settled: Settled,
    ) -> None:
        event = delivery.event
        route = self.routes.get((lane.shard, delivery.subscription))
        if route is None or route.deleted:
            self._cancel(delivery, lane.endpoint.id)
            return
        due = None
        if outcome.verdict is Verdict.RETRY:
            due = retry_due(delivery.attempt, microseconds_of(event.sequence))
        shard = event.sequence & _SHARD_MASK
        self._close((delivery,))
        if due is None:
            self._note_dead(
                shard,
                event.tenant,
                lane.endpoint.id,
                delivery.subscription,
                delivery.attempt,
                POLICY_ENDED if outcome.verdict is Verdict.RETRY else REFUSED,
                event.sequence,
                status=outcome.status,
                detail=outcome.detail,
            )
            settled.dead += 1
            return
        settled.retried += 1
        settled.due_us = due if settled.due_us is None else min(due, settled.due_us)
        self._owe(
            shard,
            event.tenant,
            delivery.subscription,
            delivery.attempt,
            due,
            Cause.RETRY,
            event.sequence,
        )

    def _close(self, deliveries: Sequence[Delivery]) -> None:
        """The fate of deliveries is known and goes into the next record: they are open no longer.

        The one place where a delivery leaves memory for good (`_put_back` only returns it to its row).
        """
        settled = DeliveryState.SETTLED
        for delivery in deliveries:
            event = delivery.event
            row = delivery.owed
            delivery.state = settled
            if row is None:
                event.open -= 1
            else:
                row.out -= 1
                row.remaining.discard(event.sequence)
                self._mark_dirty(row)
            event.held -= 1
            if not event.held:
                self._drop(event)

    def _cancel(self, delivery: Delivery, endpoint: int) -> None:
        event = delivery.event
        self._close((delivery,))
        self._note_dead(
            event.sequence & _SHARD_MASK,
            event.tenant,
            endpoint,
            delivery.subscription,
            delivery.attempt,
            SUBSCRIPTION_DELETED,
            event.sequence,
            cancelled=True,
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
        *,
        cancelled: bool = False,
        status: int = 0,
        detail: str = "",
    ) -> None:
        """A delivery ended without success: one dead letter for all that ended alike, and its count."""
        key = (shard, tenant, endpoint, subscription, attempts, cancelled, reason, status, detail)
        self._dead.setdefault(key, []).append(sequence)
        books = self._books_of(shard)
        counts = books.cancelled if cancelled else books.dead
        counts[tenant] = counts.get(tenant, 0) + 1

    def _hold(self, event: Event) -> None:
        if event.held == 0:
            self.held_bytes += event.size
        event.held += 1

    def _let_go(self, event: Event) -> None:
        event.held -= 1
        if event.held == 0:
            self._drop(event)

    def _drop(self, event: Event) -> None:
        """Nothing in memory needs the event's payload any more."""
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
        self._close((delivery,))
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
        while lane.may_reclaim() and lane.has_room():
            lane.push(lane.spill.popleft())

    def look(self, lane: Lane | None = None) -> Look:
        """Begin to read owed rows: from here on the result may miss what records change."""
        look = Look(lane)
        self._looks.add(look)
        return look

    def catch_up_query(self, lane: Lane, now_us: int) -> CatchUpQuery | None:
        """What to read for a lane; None when no reading is needed (rows may still wait to be loaded)."""
        backlog = lane.wants_backlog()
        # A page of them at a time, or claimed rows would pile up in memory.
        retries = lane.wants_retries(now_us) and not any(row.retry for row in lane.waiting_rows)
        if not backlog and not retries:
            return None
        claimed = [row_id for _, row_id in lane.rows]
        claimed += [
            row.id
            for row in self._ending.values()
            if row.shard == lane.shard and row.subscription in lane.subscriptions
        ]
        return CatchUpQuery(
            lane.shard, list(lane.subscriptions), claimed, backlog, retries, self.look(lane)
        )

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
        look = query.look
        self._looks.discard(look)
        for found in rows:
            key = (found.shard, found.id)
            if key in look.changed or key in lane.rows or key in self._ending:
                continue
            route = self.routes.get((found.shard, found.subscription))
            if route is None or not route.active or route.lane is not lane:
                continue
            row = _held(found)
            row.waiting = sorted(found.sequences, reverse=True)
            lane.rows[key] = row
            lane.waiting_rows.append(row)
            if not row.retry:
                route.backlog -= 1
                lane.backlog -= 1
        if query.backlog:
            lane.horizon = -1 if look.overtaken else horizon
        if query.retries:
            lane.retry_us = retry_us
            if look.retry_us is not None:
                self._retry_at(lane, look.retry_us)

    def to_load(self, lane: Lane, deliveries_max: int) -> list[ToLoad]:
        """Deliveries of claimed rows, in sequence order, for which the lane has room; their events are to be read.

        Give them all to `loaded`, whatever came of the reading.
        """
        room = min(lane.room()[0], deliveries_max) if lane.has_room() else 0
        waiting = [
            (row.waiting[-1], place, row)
            for place, row in enumerate(lane.waiting_rows)
            if lane.may_load(row, row.waiting[-1])
        ]
        heapify(waiting)
        loading: list[ToLoad] = []
        while waiting and len(loading) < room:
            sequence, place, row = waiting[0]
            loading.append(ToLoad(row, sequence))
            row.waiting.pop()
            row.out += 1
            if row.waiting and lane.may_load(row, row.waiting[-1]):
                heapreplace(waiting, (row.waiting[-1], place, row))
            else:
                heappop(waiting)
        if loading:
            lane.waiting_rows = [row for row in lane.waiting_rows if row.waiting]
            lane.loading += len(loading)
        return loading

    def loaded(
        self, lane: Lane, loading: Sequence[ToLoad], events: dict[int, Event], last: int | None
    ) -> None:
        """The events of `loading` were read, up to the sequence `last` (None: all of them); queue their deliveries.

        An event at or below `last` that was not found is gone with its partition. What lies beyond waits again, and so
        does what has no room, or would overtake what went back to its row or became owed during the reading.
        """
        lane.loading -= len(loading)
        if self.lanes.get((lane.shard, lane.endpoint.id)) is not lane:
            return  # handed off by force meanwhile
        lowest = min((row.waiting[-1] for row in lane.waiting_rows if not row.retry), default=None)
        for item in loading:
            row = item.row
            route = self.routes[row.shard, row.subscription]
            event = events.get(item.sequence)
            if route.deleted:
                row.out -= 1
                self._cancel_waiting(row, lane.endpoint.id, item.sequence)
            elif (
                not route.active
                or (event is None and last is not None and item.sequence > last)
                or not lane.may_load(row, item.sequence)
                or (lowest is not None and item.sequence > lowest and not row.retry)
                or not lane.has_room()  # an event counts once for each of its deliveries
            ):
                self._wait_again(lane, row, item.sequence)
            elif event is None:
                row.out -= 1
                self._expire(row, lane.endpoint.id, item.sequence)
            else:
                self._hold(event)
                lane.push(Delivery(event, row.subscription, row.attempt, row))

    def _expire(self, row: OwedRow, endpoint: int, sequence: int) -> None:
        row.remaining.discard(sequence)
        self._note_dead(
            row.shard, row.tenant, endpoint, row.subscription, row.attempt, EXPIRED, sequence
        )
        self._mark_dirty(row)

    def end_rows(self, look: Look, rows: Iterable[FoundRow], *, expired_below: int | None) -> int:
        """Settle what unclaimed rows hold, without sending. `look` was begun before `rows` were read.

        With `expired_below`: their sequences below it are dead. Without: those of deleted subscriptions are cancelled.
        Rows that are claimed, or changed since, are passed over: look again. Returns how many deliveries were settled.
        """
        self._looks.discard(look)
        ended = 0
        for found in rows:
            key = (found.shard, found.id)
            if (
                found.shard not in self.windows
                or found.shard in self._leaving
                or found.shard in look.left
            ):
                continue
            route = self.routes.get((found.shard, found.subscription))
            lane = route.lane if route is not None else None
            if (
                key in look.changed
                or key in self._ending
                or (lane is not None and key in lane.rows)
            ):
                continue
            if expired_below is None:
                if route is not None and not route.deleted:
                    continue
                ending = found.sequences
            else:
                ending = [sequence for sequence in found.sequences if sequence < expired_below]
            if not ending:
                continue
            row = _held(found)
            self._ending[key] = row  # nobody claims it until the record that changes it is durable
            endpoint = lane.endpoint.id if lane is not None else 0
            for sequence in ending:
                if expired_below is None:
                    self._cancel_waiting(row, endpoint, sequence)
                else:
                    self._expire(row, endpoint, sequence)
            ended += len(ending)
            if route is not None and not row.retry:
                self._count_row(route, -1)
                if row.remaining and route.active:
                    _lane_of(route).owing = True  # the rest comes back with the record
        return ended

    def cancelled_all(self, shard: int, subscription: int, look: Look) -> None:
        """No owed row of a deleted subscription was found in a reading that began with `look`."""
        self._looks.discard(look)
        route = self.routes.get((shard, subscription))
        if (
            route is not None
            and shard not in look.left
            and (shard, subscription) not in look.inserted
        ):
            route.backlog = 0

    def _count_row(self, route: Route, change: int) -> None:
        """An unclaimed row that waits for room came up, or went."""
        if route.deleted:
            return
        route.backlog += change
        if route.active and route.lane is not None:
            route.lane.backlog += change

    # Records.

    def plan_record(self, now_us: int) -> RecordPlan | None:
        """Everything since the last record as one plan; None when there is nothing to write.

        Call `recorded` when it is durable, before the next plan.
        """
        assert self._plan is None, "one record at a time"
        self._owe_spills()
        for lane in self.lanes.values():
            lane.owing_now, lane.owing = lane.owing, False
        inserts: list[OwedInsert] = []
        counters: dict[int, int] = {}
        rows = self._owe_old_ends(now_us, inserts, counters)
        claimed = {(row.shard, row.id) for row in rows}
        for (shard, tenant, subscription, attempt, due_us, cause), sequences in self._owed.items():
            route = self.routes.get((shard, subscription))
            if route is None or route.deleted:
                self._cancel_owed(route, shard, tenant, subscription, attempt, sequences)
                continue
            sequences.sort()
            for start in range(0, len(sequences), OWED_SEQUENCES_MAX):
                chunk = tuple(sequences[start : start + OWED_SEQUENCES_MAX])
                row_id = self._next_id(shard, counters)
                inserts.append(
                    OwedInsert(shard, row_id, tenant, subscription, chunk, attempt, due_us, cause)
                )
                if not due_us:
                    self._count_row(route, 1)
                    route.unrecorded += 1
                    if route.active:
                        _lane_of(route).unrecorded += 1
        updates, deletes = self._dirty_rows(rows)
        dead = [
            DeadLetter(shard, tenant, endpoint, subscription, tuple(seqs), attempts, cancelled, reason, status, detail)
            for (shard, tenant, endpoint, subscription, attempts, cancelled, reason, status, detail), seqs
            in self._dead.items()
        ]  # fmt: skip
        attempts, self._attempts = self._attempts, []
        self._outcomes_planned = self._outcomes
        touched = (
            set(counters) | set(self._books) | {a.shard for a in attempts} | {d.shard for d in dead}
        )
        touched |= {shard for shard, _, _ in updates} | {shard for shard, _ in deletes}
        shards = self._shard_records(touched)
        self._owed, self._dead, self._dirty, self._books = {}, {}, {}, {}
        if not shards:
            return None
        self._plan = RecordPlan(shards, attempts, dead, inserts, updates, deletes, claimed, rows)
        return self._plan

    def recorded(self, plan: RecordPlan) -> list[Lane]:
        """The plan is durable. Returns the lanes that got rows, which may want to catch up."""
        assert plan is self._plan, "this plan is not the one under way"
        self._plan = None
        self._outcomes -= self._outcomes_planned
        woken: dict[Lane, None] = {}
        for lane in self.lanes.values():
            if lane.owing_now:
                lane.owing_now = False
                woken[lane] = None
        for insert in plan.owed_inserts:
            if (insert.shard, insert.id) not in plan.claimed:
                self._row_inserted(insert, woken)
        for look in self._looks:
            look.changed.update((shard, row_id) for shard, row_id, _ in plan.owed_updates)
            look.changed.update(plan.owed_deletes)
            look.inserted.update(
                (insert.shard, insert.subscription) for insert in plan.owed_inserts
            )
        for row in plan.rows:
            self._row_written(row, woken)
        return list(woken)

    def _row_inserted(self, insert: OwedInsert, woken: dict[Lane, None]) -> None:
        """A row is durable that nothing in memory stands for."""
        route = self.routes[insert.shard, insert.subscription]
        lane = _lane_of(route)
        if route.active:
            lane.unrecorded -= route.unrecorded
        route.unrecorded = 0
        if route.deleted:
            route.backlog += 1  # whoever looked before may not have found it
        if insert.due_us:
            self._retry_at(lane, insert.due_us)
        woken[lane] = None

    def _row_written(self, row: OwedRow, woken: dict[Lane, None]) -> None:
        """A row in memory and in the log are the same again: only now may a reader find what is left of it."""
        key = (row.shard, row.id)
        row.planned = False
        route = self.routes.get((row.shard, row.subscription))
        lane = route.lane if route is not None else None
        if self._ending.pop(key, None) is not None:
            if row.remaining and route is not None and lane is not None:
                if row.retry:
                    self._retry_at(lane, 0)
                else:
                    self._count_row(route, 1)
                    self._read_again(lane)
                woken[lane] = None
        elif route is not None and lane is not None:
            if not row.remaining and not row.dirty:
                lane.rows.pop(key, None)
            elif not route.active and not route.deleted:
                self._release(lane, route, row)

    def unrecorded(self) -> int:
        """Outcomes that no record holds yet: bounded by the sender, which stops above its limit."""
        return self._outcomes

    def _owe_spills(self) -> None:
        for lane in self._spilling:
            while lane.spill:
                self._owe_spilled(lane.spill.popleft(), Cause.LANE_FULL)
        self._spilling.clear()
        for delivery in self._parked:
            self._owe_spilled(delivery, Cause.PAUSED)
        self._parked.clear()

    def _owe_old_ends(
        self, now_us: int, inserts: list[OwedInsert], counters: dict[int, int]
    ) -> list[OwedRow]:
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
        rows: list[OwedRow] = []
        for (shard, tenant, subscription, attempt), deliveries in old.items():
            lane = _lane_of(self.routes[shard, subscription])
            for start in range(0, len(deliveries), OWED_SEQUENCES_MAX):
                chunk = deliveries[start : start + OWED_SEQUENCES_MAX]
                sequences = [d.event.sequence for d in chunk]
                row_id = self._next_id(shard, counters)
                row = OwedRow(shard, row_id, tenant, subscription, sequences, attempt)
                row.out = len(chunk)
                row.planned = True
                lane.rows[shard, row_id] = row
                rows.append(row)
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
        return rows

    def _cancel_owed(
        self,
        route: Route | None,
        shard: int,
        tenant: int,
        subscription: int,
        attempt: int,
        sequences: list[int],
    ) -> None:
        """What was to be owed to a subscription that is deleted by now needs no row."""
        endpoint = route.lane.endpoint.id if route is not None and route.lane is not None else 0
        for sequence in sequences:
            self._note_dead(
                shard,
                tenant,
                endpoint,
                subscription,
                attempt,
                SUBSCRIPTION_DELETED,
                sequence,
                cancelled=True,
            )

    def _next_id(self, shard: int, counters: dict[int, int]) -> int:
        place = counters.get(shard, 0)
        counters[shard] = place + 1
        return ((self.windows[shard].record_no + 1) << OWED_ID_BITS) + place

    def _dirty_rows(
        self, rows: list[OwedRow]
    ) -> tuple[list[tuple[int, int, tuple[int, ...]]], list[tuple[int, int]]]:
        """The updates and deletions of rows that shrank; they join `rows`, which stay claimed until this is durable."""
        updates: list[tuple[int, int, tuple[int, ...]]] = []
        deletes: list[tuple[int, int]] = []
        for key, row in self._dirty.items():
            row.dirty = False
            row.planned = True
            rows.append(row)
            if row.remaining:
                updates.append((*key, tuple(sorted(row.remaining))))
            else:
                deletes.append(key)
        return updates, deletes

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
        *,
        held_back: bool = False,
    ) -> bool:
        """Take a shard over, after its tenants were configured and `restore_owed`.

        `events` are (sequence, tenant, targets) above the checkpoint in sequence order, `settled` the (sequence,
        subscription) pairs that attempts, dead letters and owed rows name. A long window comes in several calls, in
        order; records may be written between them, for the checkpoint passes only what has come.

        What is left becomes owed in the next record, so a start needs no memory for payloads and moves the checkpoint
        to the end of the window at once; the lanes then catch up like after any other backlog. `held_back`: it waits
        until a person lets it go. Returns whether any of it is still owed.
        """
        self.windows[window.shard] = window
        due_us = HELD_BACK_US if held_back else 0
        cause = Cause.HELD_BACK if held_back else Cause.RECOVERED
        owing = False
        for sequence, tenant, targets in events:
            event = Event(
                tenant, "", b"", 0, sequence=sequence, targets=tuple(targets), deliveries=()
            )
            window.append(event)
            assert (window.shard, tenant) in self._routes_of, (
                "configure comes first, or all would count as deleted"
            )
            for subscription in targets:
                if (sequence, subscription) not in settled:
                    route = self.routes.get((window.shard, subscription))
                    if route is not None and route.active and not held_back:
                        _lane_of(route).owing = True  # new events come after these
                    self._owe(window.shard, tenant, subscription, 0, due_us, cause, sequence)
                    owing = True
        return owing

    def restore_owed(
        self, shard: int, subscription: int, tenant: int, backlog: int, retry_us: int | None
    ) -> None:
        """Owed rows stand in the log: `backlog` rows that wait for room, and retries of which one is due at `retry_us`."""
        route = self.routes.get((shard, subscription))
        if route is None:
            route = self._add_route(Route(shard, subscription, tenant, None))
            route.backlog += 1
        route.backlog += backlog
        if route.lane is not None and route.active:
            route.lane.backlog += backlog
            if retry_us is not None:
                self._retry_at(route.lane, retry_us)


def _lane_of(route: Route) -> Lane:
    assert route.lane is not None
    return route.lane


def _queue_bytes(lane: Lane) -> int:
    return lane.queue_bytes


def _held(found: FoundRow) -> OwedRow:
    """A row as read from the log, to be held in memory."""
    row = OwedRow(
        found.shard,
        found.id,
        found.tenant,
        found.subscription,
        found.sequences,
        found.attempt,
    )
    row.retry = found.due_us > 0
    return row
