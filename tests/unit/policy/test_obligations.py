"""The obligations of a node: each promise alone. `tests/properties/test_obligations_model.py` mixes them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from outrider_server.domain.delivery import (
    HELD_BACK_US,
    OWED_SEQUENCES_MAX,
    Cause,
    Delivery,
    OwedInsert,
)
from outrider_server.domain.endpoint import (
    BatchPolicy,
    DeliveryMode,
    Endpoint,
    EndpointState,
)
from outrider_server.domain.event import Event
from outrider_server.domain.outcome import AttemptError, Outcome, Verdict
from outrider_server.domain.sequence import sequence_of
from outrider_server.domain.subscription import Subscription, SubscriptionState
from outrider_server.policy.checkpoint import Window
from outrider_server.policy.lane import Lane
from outrider_server.policy.obligations import (
    EXPIRED,
    OWED_ID_BITS,
    POLICY_ENDED,
    REFUSED,
    SUBSCRIPTION_DELETED,
    FoundRow,
    Limits,
    Obligations,
    RecordPlan,
)

SHARD = 3
NOW_US = 1_700_000_000_000_000
ONE = Endpoint(1, 1, "one", "http://one", ())
TWO = Endpoint(2, 1, "two", "http://two", ())
A = Subscription(11, 1, "a", 1, ("*",))
B = Subscription(12, 1, "b", 1, ("*",))
C = Subscription(21, 1, "c", 2, ("*",))
DELIVERED = Outcome(Verdict.DELIVERED, 200, AttemptError.NONE, 1.0)
FAILED = Outcome(Verdict.RETRY, 503, AttemptError.STATUS, 1.0, "unavailable")
GONE = Outcome(Verdict.DEAD, 410, AttemptError.STATUS, 1.0)


class Node:
    """Obligations with one shard, and rows as the log would hold them."""

    def __init__(self, limits: Limits | None = None, *, rows: Iterable[OwedInsert] = ()) -> None:
        self.machine = Obligations(limits or Limits(lane_deliveries_max=3))
        self.endpoints = {e.id: e for e in (ONE, TWO)}
        self.subscriptions = {s.id: s for s in (A, B, C)}
        self.rows: dict[int, OwedInsert] = {row.id: row for row in rows}
        self.us = NOW_US
        self.configure()
        self.machine.windows[SHARD] = Window(SHARD, 1, 0, 0, 0)
        self.one = self.machine.lanes[SHARD, 1]
        self.two = self.machine.lanes[SHARD, 2]

    def configure(self) -> list[Lane]:
        return self.machine.configure(
            SHARD, 1, list(self.endpoints.values()), list(self.subscriptions.values())
        )

    def pause(self, subscription: Subscription, *, paused: bool = True) -> list[Lane]:
        state = SubscriptionState.PAUSED if paused else SubscriptionState.ACTIVE
        self.subscriptions[subscription.id] = replace(subscription, state=state)
        return self.configure()

    def delete(self, subscription: Subscription) -> None:
        del self.subscriptions[subscription.id]
        self.configure()

    def event(self, *targets: Subscription, size: int = 10) -> Event:
        self.us += 1
        ids = tuple(sorted(s.id for s in targets))
        event = Event(
            1,
            "order.created",
            b"x" * size,
            0,
            sequence=self.machine.windows[SHARD].clock.take(self.us, 1),
            targets=ids,
            size=size,
        )
        self.machine.assigned(self.machine.windows[event.sequence & 63], [event], event.sequence)
        return event

    def publish(self, *targets: Subscription, size: int = 10) -> Event:
        event = self.event(*targets, size=size)
        self.machine.committed(event, set())
        return event

    def plan(self) -> RecordPlan:
        plan = self.machine.plan_record(self.us)
        assert plan is not None
        return plan

    def write(self, plan: RecordPlan) -> None:
        for insert in plan.owed_inserts:
            self.rows[insert.id] = insert
        for _, row_id, sequences in plan.owed_updates:
            self.rows[row_id] = replace(self.rows[row_id], sequences=sequences)
        for _, row_id in plan.owed_deletes:
            del self.rows[row_id]

    def record(self) -> RecordPlan:
        plan = self.plan()
        self.write(plan)
        self.machine.recorded(plan)
        return plan

    def found(self, *, claimed: Iterable[int] = ()) -> list[FoundRow]:
        return [
            FoundRow(
                r.shard, r.id, r.tenant, r.subscription, list(r.sequences), r.attempt, r.due_us
            )
            for r in sorted(self.rows.values(), key=lambda row: row.sequences[0])
            if r.id not in claimed
        ]

    def claim(self, lane: Lane, *, horizon: int | None = None, retry_us: int | None = None) -> None:
        query = self.machine.catch_up_query(lane, self.us)
        assert query is not None
        rows = [
            row
            for row in self.found(claimed=query.claimed)
            if row.subscription in query.subscriptions
            and (query.backlog if row.due_us == 0 else query.retries)
        ]
        self.machine.claim(lane, query, rows, horizon, retry_us)

    def load(self, lane: Lane, deliveries_max: int = 100) -> list[int]:
        loading = self.machine.to_load(lane, deliveries_max)
        events = {item.sequence: loaded_event(item.sequence) for item in loading}
        self.machine.loaded(lane, loading, events, None)
        return [item.sequence for item in loading]

    def send(self, lane: Lane, outcome: Outcome = DELIVERED) -> list[Delivery]:
        deliveries = self.machine.take(lane)
        self.settle(lane, deliveries, outcome)
        return deliveries

    def settle(self, lane: Lane, deliveries: list[Delivery], outcome: Outcome = DELIVERED) -> None:
        self.machine.settle(
            lane,
            deliveries,
            outcome,
            lambda attempts, _: self.us + 1000 if attempts < 3 else None,
        )

    @property
    def checkpoint(self) -> int:
        return self.machine.windows[SHARD].checkpoint


def loaded_event(sequence: int) -> Event:
    return Event(1, "order.created", b"x" * 10, 0, sequence=sequence, size=10)


def queued(lane: Lane) -> list[int]:
    return [delivery.event.sequence for delivery in lane.queue]


# From commit to record.


def test_an_event_reaches_the_lanes_of_its_targets_at_its_commit() -> None:
    node = Node()
    event = node.event(A, C)
    woken: set[Lane] = set()
    assert not node.one.queue
    node.machine.committed(event, woken)
    assert woken == {node.one, node.two}
    assert queued(node.one) == queued(node.two) == [event.sequence]


def test_an_event_that_matched_nothing_is_passed_at_once() -> None:
    node = Node()
    event = node.publish()
    assert node.record().shards[0].checkpoint == event.sequence


def test_the_checkpoint_waits_for_an_event_that_is_not_committed() -> None:
    node = Node()
    first = node.event()
    node.publish()
    assert node.machine.plan_record(node.us) is None
    node.machine.committed(first, set())
    assert node.record().shards[0].checkpoint > first.sequence


def test_a_rolled_back_event_is_no_event_and_may_be_tried_again() -> None:
    node = Node()
    event = node.event(A)
    node.machine.aborted(event)
    assert node.machine.plan_record(node.us) is None
    event.sequence = node.machine.windows[SHARD].clock.take(node.us, 1)
    node.machine.assigned(node.machine.windows[event.sequence & 63], [event], event.sequence)
    node.machine.committed(event, set())
    assert queued(node.one) == [event.sequence]


def test_a_delivery_is_written_with_its_attempt_its_count_and_the_checkpoint() -> None:
    node = Node()
    event = node.publish(A)
    node.send(node.one)
    plan = node.record()
    (attempt,) = plan.attempts
    assert (attempt.sequences, attempt.subscriptions) == ((event.sequence,), (A.id,))
    assert (attempt.number, attempt.verdict, attempt.status) == (1, Verdict.DELIVERED, 200)
    (shard,) = plan.shards
    assert (shard.record_no, shard.checkpoint) == (1, event.sequence)
    assert (shard.matched, shard.delivered) == ({1: 1}, {1: 1})
    assert not plan.owed_inserts


def test_a_batch_is_one_attempt() -> None:
    node = Node()
    node.endpoints[1] = replace(ONE, mode=DeliveryMode.BATCH, batch=BatchPolicy(3, 1000, 0.0))
    node.configure()
    events = [node.publish(A, B), node.publish(A)]
    node.send(node.one)
    (attempt,) = node.record().attempts
    first, second = (event.sequence for event in events)
    assert attempt.sequences == (first, first, second)
    assert attempt.subscriptions == (A.id, B.id, A.id)


def test_what_is_open_is_matched_only_when_the_checkpoint_passes() -> None:
    node = Node()
    node.publish(A, C)
    node.send(node.one)
    (shard,) = node.record().shards
    assert (shard.matched, shard.delivered) == ({}, {1: 1})
    node.send(node.two)
    (shard,) = node.record().shards
    assert (shard.matched, shard.delivered) == ({1: 2}, {1: 1})


def test_there_is_one_record_at_a_time_and_none_without_news() -> None:
    node = Node()
    assert node.machine.plan_record(node.us) is None
    node.publish()
    plan = node.plan()
    with pytest.raises(AssertionError, match="one record at a time"):
        node.machine.plan_record(node.us)
    node.machine.recorded(plan)
    with pytest.raises(AssertionError, match="not the one under way"):
        node.machine.recorded(plan)


def test_outcomes_that_no_record_holds_are_counted() -> None:
    node = Node()
    node.publish(A)
    node.send(node.one)
    assert node.machine.unrecorded() == 1
    plan = node.plan()
    assert node.machine.unrecorded() == 1
    node.machine.recorded(plan)
    assert node.machine.unrecorded() == 0


def test_a_payload_is_held_until_its_last_delivery_is_settled() -> None:
    node = Node()
    event = node.publish(A, C, size=40)
    assert node.machine.held_bytes == 40
    node.send(node.one)
    assert (node.machine.held_bytes, len(event.data)) == (40, 40)
    node.send(node.two)
    assert (node.machine.held_bytes, event.data) == (0, b"")


def test_a_cancelled_target_does_not_take_the_payload_from_the_others() -> None:
    node = Node()
    event = node.event(A, B)
    node.delete(A)
    node.machine.committed(event, set())
    assert [len(delivery.event.data) for delivery in node.machine.take(node.one)] == [10]


# Failures.


def test_a_failed_delivery_is_owed_until_it_is_due() -> None:
    node = Node()
    event = node.publish(A)
    node.send(node.one, FAILED)
    plan = node.plan()
    assert not node.one.wants_retries(node.us + 1000), "nobody could find it yet"
    node.write(plan)
    node.machine.recorded(plan)
    (insert,) = plan.owed_inserts
    assert (insert.sequences, insert.attempt) == ((event.sequence,), 1)
    assert (insert.due_us, insert.cause) == (node.us + 1000, Cause.RETRY)
    assert node.checkpoint == event.sequence
    assert node.one.retry_us == insert.due_us
    assert not node.one.wants_catch_up(node.us)
    node.us += 1000
    node.claim(node.one)
    node.load(node.one)
    (delivery,) = node.send(node.one)
    assert delivery.attempt == 2
    assert node.record().owed_deletes == [(SHARD, insert.id)]


@pytest.mark.parametrize(
    ("outcome", "attempts", "reason"), [(FAILED, 3, POLICY_ENDED), (GONE, 1, REFUSED)]
)
def test_a_delivery_without_a_further_attempt_is_dead_with_its_reason(
    outcome: Outcome, attempts: int, reason: str
) -> None:
    node = Node()
    event = node.publish(A)
    (delivery,) = node.machine.take(node.one)
    delivery.attempt = attempts - 1
    node.settle(node.one, [delivery], outcome)
    plan = node.record()
    (dead,) = plan.dead_letters
    assert (dead.sequences, dead.subscription, dead.endpoint) == ((event.sequence,), A.id, 1)
    assert (dead.attempts, dead.reason, dead.cancelled) == (attempts, reason, False)
    assert dead.status == outcome.status
    assert plan.shards[0].dead == {1: 1}
    assert not plan.owed_inserts


def test_a_settled_request_tells_what_became_of_its_deliveries() -> None:
    node = Node()
    for _ in range(3):
        node.publish(A)
    deliveries = [node.machine.take(node.one)[0] for _ in range(3)]
    deliveries[0].attempt = 2
    node.one.in_flight = 1
    due_of = {1: 500, 2: 400}
    settled = node.machine.settle(
        node.one, deliveries, FAILED, lambda attempts, _: due_of.get(attempts)
    )
    assert (settled.retried, settled.dead, settled.due_us) == (2, 1, 500)


def test_what_fails_together_shares_rows_of_bounded_length() -> None:
    node = Node(Limits(lane_deliveries_max=400))
    policy = BatchPolicy(300, 1_000_000, 0.0)
    node.endpoints[1] = replace(ONE, mode=DeliveryMode.BATCH, batch=policy)
    node.configure()
    for _ in range(300):
        node.publish(A)
    node.send(node.one, FAILED)
    inserts = node.record().owed_inserts
    assert [len(insert.sequences) for insert in inserts] == [OWED_SEQUENCES_MAX, 44]
    assert [insert.id for insert in inserts] == [1 << OWED_ID_BITS, (1 << OWED_ID_BITS) + 1]


# Overflow.


def test_what_has_no_room_becomes_owed_and_new_events_join_the_tail() -> None:
    node = Node()
    events = [node.publish(A) for _ in range(5)]
    plan = node.record()
    (insert,) = plan.owed_inserts
    assert insert.sequences == (events[3].sequence, events[4].sequence)
    assert (insert.due_us, insert.cause) == (0, Cause.LANE_FULL)
    for _ in range(3):
        node.send(node.one)
    last = node.publish(A)
    assert not node.one.queue, "it must not overtake what is owed"
    node.record()
    node.claim(node.one)
    assert node.load(node.one) == [events[3].sequence, events[4].sequence, last.sequence]


def test_a_lane_is_full_by_bytes_too() -> None:
    node = Node(Limits(lane_bytes_max=15))
    for _ in range(3):
        node.publish(A)
    assert len(node.one.queue) == 2


def test_what_spilled_comes_back_as_soon_as_there_is_room() -> None:
    node = Node()
    events = [node.publish(A) for _ in range(5)]
    node.machine.take(node.one)
    assert queued(node.one) == [event.sequence for event in events[1:4]]
    assert len(node.record().owed_inserts[0].sequences) == 1


def test_a_lane_with_a_backlog_spills_even_when_its_queue_is_empty() -> None:
    node = Node()
    for _ in range(4):
        node.publish(A)
    node.record()
    while node.one.queue:
        node.send(node.one)
    node.publish(A)
    assert node.machine.take(node.one) == []


def test_the_lane_that_holds_most_bytes_becomes_owed_first() -> None:
    node = Node(Limits(held_bytes_max=100))
    large = [node.publish(A, size=50), node.publish(A, size=50)]
    small = node.publish(C)
    assert node.machine.relieve() == [node.one]
    assert (queued(node.one), queued(node.two)) == ([], [small.sequence])
    assert node.machine.held_bytes == 10
    (insert,) = node.record().owed_inserts
    assert insert.cause is Cause.BYTE_BUDGET
    assert insert.sequences == tuple(event.sequence for event in large)


def test_events_that_several_lanes_hold_are_relieved_from_all_of_them() -> None:
    node = Node(Limits(held_bytes_max=100))
    for _ in range(3):
        node.publish(A, C, size=50)
    node.machine.relieve()
    assert node.machine.held_bytes == 0


def test_nothing_is_loaded_before_what_was_relieved() -> None:
    node = Node(Limits(lane_deliveries_max=3, held_bytes_max=35))
    fresh = [node.publish(A) for _ in range(4)]
    node.record()
    node.send(node.one)
    node.send(node.one)
    node.claim(node.one)
    late = fresh[3].sequence
    assert node.one.waiting_rows[0].waiting == [late]
    node.machine.held_bytes += 100
    node.machine.relieve()
    assert node.machine.to_load(node.one, 10) == []
    node.record()
    assert node.machine.to_load(node.one, 10) == [], "the rows of what was relieved come first"
    node.claim(node.one)
    assert node.load(node.one) == [fresh[2].sequence, late]


# The window.


def test_what_is_open_at_the_old_end_gets_rows_and_memory_goes_on() -> None:
    node = Node(Limits(window_us_max=100))
    events = [node.publish(A), node.publish(A)]
    (flying,) = node.machine.take(node.one)
    node.us += 1000
    plan = node.record()
    (insert,) = plan.owed_inserts
    assert insert.cause is Cause.WINDOW_PASSED
    assert insert.sequences == tuple(event.sequence for event in events)
    assert (insert.shard, insert.id) in plan.claimed
    assert node.checkpoint == events[1].sequence
    assert node.machine.catch_up_query(node.one, node.us) is None, "memory has them"
    node.settle(node.one, [flying])
    assert node.record().owed_updates == [(SHARD, insert.id, (events[1].sequence,))]
    node.send(node.one)
    assert node.record().owed_deletes == [(SHARD, insert.id)]
    assert not node.one.rows


def test_the_window_is_bounded_by_events() -> None:
    node = Node(Limits(window_events_max=2))
    events = [node.publish(A) for _ in range(3)]
    (insert,) = node.record().owed_inserts
    assert insert.sequences == (events[0].sequence,)


# Catch up.


def overflowing(lane_deliveries_max: int = 3, owed: int = 4) -> tuple[Node, list[int]]:
    """A node whose lane one is empty and has rows of one delivery each; their sequences."""
    node = Node(Limits(lane_deliveries_max=lane_deliveries_max))
    for _ in range(lane_deliveries_max):
        node.publish(A)
    sequences = []
    for _ in range(owed):
        sequences.append(node.publish(A).sequence)
        node.record()
    while node.one.queue:
        node.send(node.one)
    node.record()
    return node, sequences


def test_claiming_and_loading_change_no_row() -> None:
    node, _ = overflowing()
    node.claim(node.one)
    node.load(node.one)
    node.machine.take(node.one)
    assert node.machine.plan_record(node.us) is None


def test_rows_are_loaded_in_sequence_order_as_far_as_there_is_room() -> None:
    node, sequences = overflowing()
    node.claim(node.one)
    assert node.load(node.one, 2) == sequences[:2]
    assert node.load(node.one) == sequences[2:3]
    assert node.load(node.one) == []


def test_nothing_beyond_the_horizon_is_loaded_before_the_rows_between_are_read() -> None:
    node, sequences = overflowing()
    query = node.machine.catch_up_query(node.one, node.us)
    assert query is not None
    page = node.found()[:2]
    node.machine.claim(node.one, query, page, sequences[0], None)
    assert node.load(node.one) == sequences[:1]
    assert node.one.wants_backlog()
    node.claim(node.one)
    assert node.load(node.one) == sequences[1:3]


def test_events_published_during_a_load_do_not_overtake_it() -> None:
    node, _ = overflowing(owed=1)
    node.claim(node.one)
    loading = node.machine.to_load(node.one, 10)
    new = node.publish(A)
    assert not node.one.queue
    events = {item.sequence: loaded_event(item.sequence) for item in loading}
    node.machine.loaded(node.one, loading, events, None)
    node.send(node.one)
    assert queued(node.one) == [new.sequence]


def test_a_load_that_stopped_early_goes_on_where_it_stopped() -> None:
    node, sequences = overflowing()
    node.claim(node.one)
    loading = node.machine.to_load(node.one, 10)
    events = {sequences[0]: loaded_event(sequences[0])}
    node.machine.loaded(node.one, loading, events, sequences[0])
    assert queued(node.one) == sequences[:1]
    assert node.load(node.one) == sequences[1:3]


def test_a_load_keeps_the_lanes_bound_of_bytes() -> None:
    node = Node(Limits(lane_deliveries_max=3, lane_bytes_max=15))
    events = [node.publish(A, B) for _ in range(3)]
    node.record()
    while node.one.queue:
        node.send(node.one)
    node.claim(node.one)
    node.load(node.one)
    assert queued(node.one) == [events[1].sequence, events[1].sequence]
    assert node.load(node.one) == []


def test_a_full_lane_loads_nothing() -> None:
    node, _ = overflowing()
    node.claim(node.one)
    node.one.bytes_max = 0
    assert node.machine.to_load(node.one, 10) == []


def test_an_event_that_is_gone_is_dead_as_expired() -> None:
    node, sequences = overflowing(owed=1)
    node.claim(node.one)
    loading = node.machine.to_load(node.one, 10)
    node.machine.loaded(node.one, loading, {}, None)
    plan = node.record()
    (dead,) = plan.dead_letters
    assert (dead.sequences, dead.reason) == (tuple(sequences), EXPIRED)
    assert plan.shards[0].dead == {1: 1}
    assert len(plan.owed_deletes) == 1
    assert not node.one.drains()


def test_a_row_settled_during_a_reading_is_not_sent_again() -> None:
    node = Node(Limits(lane_deliveries_max=3, window_us_max=100))
    node.publish(A)
    for _ in range(4):
        node.publish(B, size=1)  # the lane overflows, so that there is something to read
    node.record()
    query = node.machine.catch_up_query(node.one, node.us)
    assert query is not None
    node.us += 1000
    node.record()  # the window passed: a row stands for the first delivery
    stale = node.found()
    while node.one.queue:
        node.send(node.one)
    node.record()  # ... and is gone
    node.machine.claim(node.one, query, stale, None, None)
    first = stale[0].sequences[0]
    assert all(row.waiting[-1] > first for row in node.one.waiting_rows)


def test_a_retry_that_came_up_during_a_reading_is_not_forgotten() -> None:
    node = Node()
    node.publish(A)
    node.send(node.one, FAILED)
    node.record()
    node.publish(A)
    node.us += 1000
    query = node.machine.catch_up_query(node.one, node.us)
    assert query is not None
    found = node.found()
    node.send(node.one, FAILED)
    (insert,) = node.record().owed_inserts
    node.machine.claim(node.one, query, found, None, None)
    assert node.one.retry_us == insert.due_us


def test_retries_are_claimed_a_page_at_a_time() -> None:
    node = Node()
    for _ in range(2):
        node.publish(A)
        node.send(node.one, FAILED)
        node.record()
    node.us += 1000
    query = node.machine.catch_up_query(node.one, node.us)
    assert query is not None
    first, second = node.found()
    node.machine.claim(node.one, query, [first], None, second.due_us)
    assert node.one.wants_retries(node.us)
    assert node.machine.catch_up_query(node.one, node.us) is None
    node.load(node.one)
    assert node.machine.catch_up_query(node.one, node.us) is not None


def test_a_deleted_row_stays_claimed_until_its_deletion_is_durable() -> None:
    node, _ = overflowing(owed=1)
    node.claim(node.one)
    node.load(node.one)
    node.send(node.one)
    plan = node.plan()
    (row_id,) = [row_id for _, row_id in plan.owed_deletes]
    assert (SHARD, row_id) in node.one.rows
    node.machine.recorded(plan)
    assert not node.one.rows


# Pause and resume.


def test_the_queue_of_a_paused_subscription_becomes_owed() -> None:
    node = Node()
    events = [node.publish(A), node.publish(B), node.publish(A)]
    node.pause(A)
    assert queued(node.one) == [events[1].sequence]
    events.append(node.publish(A))
    (insert,) = node.record().owed_inserts
    assert insert.cause is Cause.PAUSED
    assert insert.sequences == tuple(events[place].sequence for place in (0, 2, 3))
    assert node.machine.catch_up_query(node.one, node.us) is None
    assert node.pause(A, paused=False) == [node.one]
    node.claim(node.one)
    assert node.load(node.one, 2) == [events[0].sequence, events[2].sequence]


def test_a_paused_endpoint_pauses_all_its_subscriptions() -> None:
    node = Node()
    node.publish(A, B, C)
    node.endpoints[1] = replace(ONE, state=EndpointState.PAUSED)
    assert node.configure() == [node.one]
    assert (len(node.one.queue), len(node.two.queue)) == (0, 1)
    node.endpoints[1] = ONE
    assert node.configure() == [node.one]


def test_what_a_paused_subscription_has_in_flight_ends_and_is_recorded() -> None:
    node = Node()
    node.publish(A)
    deliveries = node.machine.take(node.one)
    node.pause(A)
    node.settle(node.one, deliveries)
    assert len(node.record().attempts) == 1


def test_a_subscription_paused_during_a_load_gets_its_events_back_into_their_row() -> None:
    node, sequences = overflowing(owed=1)
    node.claim(node.one)
    loading = node.machine.to_load(node.one, 10)
    node.pause(A)
    node.machine.loaded(node.one, loading, {sequences[0]: loaded_event(sequences[0])}, None)
    assert (list(node.one.queue), node.one.rows) == ([], {})
    node.pause(A, paused=False)
    node.claim(node.one)
    assert node.load(node.one) == sequences


def test_a_row_that_a_record_shrinks_is_not_read_before_that_is_durable() -> None:
    node = Node()
    for _ in range(5):
        node.publish(A)
    node.record()
    while node.one.queue:
        node.send(node.one)
    node.claim(node.one)
    node.load(node.one)
    node.send(node.one)
    plan = node.plan()
    node.pause(A)
    node.pause(A, paused=False)
    query = node.machine.catch_up_query(node.one, node.us + 1)
    assert query is None or plan.owed_updates[0][1] in query.claimed


def test_a_paused_subscriptions_rows_are_given_up_once_they_are_written() -> None:
    node = Node()
    for _ in range(5):
        node.publish(A)
    node.record()
    while node.one.queue:
        node.send(node.one)
    node.claim(node.one)
    node.load(node.one)
    node.send(node.one)
    node.pause(A)
    assert node.one.rows, "a record has to shrink it first"
    node.record()
    assert not node.one.rows, "or retention could never end it"
    assert node.machine.routes[SHARD, A.id].backlog == 1


def test_a_paused_subscription_does_not_hold_back_its_neighbours_on_the_lane() -> None:
    node = Node()
    for _ in range(5):
        node.publish(A)
    node.record()
    while node.one.queue:
        node.send(node.one)
    node.claim(node.one)
    node.load(node.one, 1)
    node.machine.take(node.one)
    node.pause(A)
    assert not node.one.drains()
    event = node.publish(B)
    assert queued(node.one) == [event.sequence]


def test_a_resumed_subscriptions_retries_are_looked_for() -> None:
    node = Node()
    node.publish(A)
    node.send(node.one, FAILED)
    node.pause(A)
    node.record()
    query = node.machine.catch_up_query(node.one, node.us + 1000)
    assert query is not None
    node.machine.claim(node.one, query, [], None, None)
    assert node.one.retry_us is None
    node.pause(A, paused=False)
    assert node.one.retry_us == 0


def test_what_is_parked_comes_before_new_events_after_a_resume() -> None:
    node = Node()
    node.publish(A)
    node.pause(A)
    node.pause(A, paused=False)
    node.publish(A)
    assert not node.one.queue


# Deletion.


def cancelled(plan: RecordPlan) -> list[int]:
    assert all(d.reason == SUBSCRIPTION_DELETED for d in plan.dead_letters if d.cancelled)
    return sorted(s for d in plan.dead_letters if d.cancelled for s in d.sequences)


def test_a_deleted_subscriptions_queue_is_cancelled_and_counted() -> None:
    node = Node()
    events = [node.publish(A, B), node.publish(A)]
    node.delete(A)
    assert queued(node.one) == [events[0].sequence]
    plan = node.record()
    assert cancelled(plan) == [event.sequence for event in events]
    assert plan.shards[0].cancelled == {1: 2}


@pytest.mark.parametrize("outcome", [FAILED, GONE, DELIVERED])
def test_what_a_deleted_subscription_has_in_flight_ends_without_a_retry(outcome: Outcome) -> None:
    node = Node()
    event = node.publish(A)
    deliveries = node.machine.take(node.one)
    node.delete(A)
    node.settle(node.one, deliveries, outcome)
    plan = node.record()
    assert not plan.owed_inserts
    assert cancelled(plan) == ([] if outcome is DELIVERED else [event.sequence])


def test_what_was_to_be_owed_to_a_deleted_subscription_is_cancelled_instead() -> None:
    node = Node()
    event = node.publish(A)
    node.send(node.one, FAILED)
    node.delete(A)
    plan = node.record()
    assert not plan.owed_inserts
    assert cancelled(plan) == [event.sequence]


def test_claimed_deliveries_of_a_deleted_subscription_are_cancelled_wherever_they_are() -> None:
    node, sequences = overflowing(owed=4)
    node.claim(node.one)
    node.load(node.one, 1)
    loading = node.machine.to_load(node.one, 1)
    node.delete(A)
    node.machine.loaded(node.one, loading, {}, None)
    plan = node.record()
    assert cancelled(plan) == sequences
    assert len(plan.owed_deletes) == 4


def test_the_rows_of_a_deleted_subscription_are_cancelled_by_pages_and_once() -> None:
    node, sequences = overflowing(owed=2)
    node.delete(A)
    assert node.machine.deleted() == [(SHARD, A.id)]
    look = node.machine.look()
    assert node.machine.end_rows(look, node.found()[:1], expired_below=None) == 1
    plan = node.plan()
    stale_look = node.machine.look()
    stale = node.found()
    node.write(plan)
    node.machine.recorded(plan)
    assert node.machine.end_rows(stale_look, stale, expired_below=None) == 1, "not the first again"
    assert cancelled(plan) + cancelled(node.record()) == sequences
    look = node.machine.look()
    assert node.found() == []
    node.machine.cancelled_all(SHARD, A.id, look)
    assert node.machine.deleted() == []


def test_a_row_written_while_somebody_looks_makes_them_look_again() -> None:
    node = Node()
    node.publish(A)
    node.send(node.one, FAILED)
    plan = node.plan()
    node.delete(A)
    look = node.machine.look()
    assert node.found() == []
    node.write(plan)
    node.machine.recorded(plan)
    node.machine.cancelled_all(SHARD, A.id, look)
    assert node.machine.deleted() == [(SHARD, A.id)]


def test_events_for_a_deleted_subscription_are_cancelled_at_their_commit() -> None:
    node = Node()
    event = node.event(A)
    node.delete(A)
    node.machine.committed(event, set())
    assert cancelled(node.record()) == [event.sequence]


def test_rows_of_living_subscriptions_are_not_cancelled() -> None:
    node, _ = overflowing(owed=1)
    look = node.machine.look()
    assert node.machine.end_rows(look, node.found(), expired_below=None) == 0


# Retention.


def test_only_what_is_below_the_end_of_retention_expires() -> None:
    node = Node()
    for _ in range(3):
        node.publish(B)
    events = [node.publish(A) for _ in range(3)]
    node.record()
    look = node.machine.look()
    end = events[2].sequence
    assert node.machine.end_rows(look, node.found(), expired_below=end) == 2
    while node.one.queue:
        node.send(node.one)
    node.publish(A)
    assert not node.one.queue, "the rest of the row comes first"
    plan = node.record()
    (dead,) = plan.dead_letters
    assert (dead.sequences, dead.reason) == (tuple(e.sequence for e in events[:2]), EXPIRED)
    assert plan.owed_updates[0][2] == (end,)
    node.claim(node.one)
    assert node.load(node.one, 1) == [end]


def test_claimed_rows_do_not_expire() -> None:
    node, sequences = overflowing(owed=1)
    node.claim(node.one)
    look = node.machine.look()
    assert node.machine.end_rows(look, node.found(), expired_below=sequences[0] + 1) == 0


# Start and takeover.


def sequences_at(*us: int) -> list[int]:
    return [sequence_of(NOW_US + each, SHARD) for each in us]


def test_a_start_owes_what_the_window_holds_and_nothing_settled() -> None:
    node = Node()
    first, second = sequences_at(1, 2)
    window = Window(SHARD, 2, first - 1024, 7, second)
    node.machine.restore_window(
        window, [(first, 1, [A.id, B.id]), (second, 1, [A.id])], {(first, A.id)}
    )
    plan = node.record()
    owed = {(i.subscription, i.sequences) for i in plan.owed_inserts}
    assert owed == {(A.id, (second,)), (B.id, (first,))}
    assert all(i.cause is Cause.RECOVERED and not i.due_us for i in plan.owed_inserts)
    (shard,) = plan.shards
    assert (shard.epoch, shard.record_no, shard.checkpoint) == (2, 8, second)
    assert shard.matched == {1: 3}
    assert node.machine.held_bytes == 0


def test_new_events_come_after_those_of_the_window_taken_over() -> None:
    node = Node()
    (first,) = sequences_at(0)
    node.machine.restore_window(Window(SHARD, 2, 0, 7, first), [(first, 1, [A.id])], set())
    new = node.publish(A)
    assert not node.one.queue
    node.record()
    node.claim(node.one)
    assert node.load(node.one) == [first, new.sequence]


def test_a_start_counts_the_rows_that_stand_and_looks_for_retries() -> None:
    (first,) = sequences_at(0)
    row = OwedInsert(SHARD, 5, 1, A.id, (first,), 2, 0, Cause.LANE_FULL)
    node = Node(rows=[row])
    node.machine.restore_owed(SHARD, A.id, 1, 1, NOW_US + 50)
    assert (node.one.backlog, node.one.retry_us) == (1, NOW_US + 50)
    node.claim(node.one)
    node.load(node.one)
    (delivery,) = node.machine.take(node.one)
    assert delivery.attempt == 2


def test_rows_of_a_subscription_deleted_before_the_start_are_looked_for_and_ended_once() -> None:
    (first,) = sequences_at(0)
    row = OwedInsert(SHARD, 5, 1, 99, (first,), 0, 0, Cause.LANE_FULL)
    node = Node(rows=[row])
    node.machine.restore_owed(SHARD, 99, 1, 1, None)
    assert node.machine.deleted() == [(SHARD, 99)]
    assert node.machine.end_rows(node.machine.look(), node.found(), expired_below=None) == 1
    plan = node.plan()
    assert node.machine.end_rows(node.machine.look(), node.found(), expired_below=None) == 0
    assert cancelled(plan) == [first]


def test_a_window_is_not_taken_over_before_its_tenants_are_configured() -> None:
    machine = Obligations(Limits())
    (first,) = sequences_at(0)
    with pytest.raises(AssertionError, match="configure comes first"):
        machine.restore_window(Window(SHARD, 2, 0, 7, first), [(first, 1, [A.id])], set())


def test_a_long_window_comes_in_slices_with_records_between() -> None:
    """The checkpoint passes only what has come, and what the records wrote is not counted twice."""
    node = Node()
    named = sequences_at(*range(5))
    window = Window(SHARD, 2, named[0] - 1024, 7, named[-1])
    window.open = False
    node.machine.restore_owed(SHARD, A.id, 1, 0, None)
    node.machine.restore_window(window, (), set())
    assert node.machine.plan_record(node.us) is None
    checkpoints, owed = [], []
    for start in (0, 2, 4):
        page = [(sequence, 1, [A.id]) for sequence in named[start : start + 2]]
        node.machine.restore_window(window, page, {(named[1], A.id)})
        plan = node.record()
        checkpoints.append(plan.shards[0].checkpoint)
        owed += [sequence for insert in plan.owed_inserts for sequence in insert.sequences]
    assert checkpoints == [named[1], named[3], named[4]]
    assert owed == [named[0], *named[2:]]
    assert node.one.backlog == 3
    assert node.machine.routes[SHARD, A.id].backlog == 3
    node.claim(node.one)
    assert node.load(node.one) == [named[0], *named[2:4]]


def test_what_a_crashing_shard_owes_is_held_back_until_a_person_lets_it_go() -> None:
    node = Node()
    first, second = sequences_at(1, 2)
    window = Window(SHARD, 2, first - 1024, 7, second)
    events = [(first, 1, [A.id, C.id]), (second, 1, [A.id])]
    node.machine.restore_window(window, events, {(first, A.id)}, held_back=True)
    plan = node.record()
    assert {(i.subscription, i.sequences) for i in plan.owed_inserts} == {
        (A.id, (second,)),
        (C.id, (first,)),
    }
    assert {(i.cause, i.due_us) for i in plan.owed_inserts} == {(Cause.HELD_BACK, HELD_BACK_US)}
    assert node.checkpoint == second
    for lane in (node.one, node.two):
        assert not lane.wants_catch_up(node.us + 10**15), "in thirty years neither"
    # New events need not wait for what no one may send.
    new = node.publish(A)
    assert queued(node.one) == [new.sequence]


# Shards that come and go.

OTHER_SHARD = 9


class Both(Node):
    """A node with two shards: the tenant is split over them."""

    def __init__(self, limits: Limits | None = None) -> None:
        super().__init__(limits)
        self.configure_both()
        self.machine.windows[OTHER_SHARD] = Window(OTHER_SHARD, 1, 0, 0, 0)
        self.elsewhere = self.machine.lanes[OTHER_SHARD, 1]

    def configure_both(self) -> list[Lane]:
        given = (1, list(self.endpoints.values()), list(self.subscriptions.values()), 2)
        return [lane for s in (SHARD, OTHER_SHARD) for lane in self.machine.configure(s, *given)]

    def publish_there(self, *targets: Subscription) -> Event:
        """An event of the other shard."""
        event = self.event(*targets)
        self.machine.aborted(event)
        event.sequence = self.machine.windows[OTHER_SHARD].clock.take(self.us, 1)
        self.machine.assigned(self.machine.windows[event.sequence & 63], [event], event.sequence)
        self.machine.committed(event, set())
        return event


def test_a_split_tenants_events_wait_in_the_lanes_of_their_shard() -> None:
    node = Both()
    here, there = node.publish(A), node.publish_there(A)
    assert queued(node.one) == [here.sequence]
    assert queued(node.elsewhere) == [there.sequence]
    for lane in (node.one, node.elsewhere):
        node.send(lane)
    plan = node.record()
    assert {shard.shard: shard.checkpoint for shard in plan.shards} == {
        SHARD: here.sequence,
        OTHER_SHARD: there.sequence,
    }
    assert {attempt.shard for attempt in plan.attempts} == {SHARD, OTHER_SHARD}


def test_a_split_tenants_limits_are_divided() -> None:
    node = Both()
    assert {lane.concurrency for lane in node.machine.lanes.values()} == {ONE.concurrency // 2}
    node.endpoints[1] = replace(ONE, concurrency=1)
    node.configure_both()
    assert (node.one.concurrency, node.elsewhere.concurrency) == (1, 1), "never none at all"


def test_a_paused_shard_sends_nothing_more_and_becomes_owed() -> None:
    node = Both()
    flying = node.publish(A)
    (delivery,) = node.machine.take(node.one)
    waiting = node.publish(A, C)
    there = node.publish_there(A)
    node.machine.pause_shard(SHARD)
    assert node.machine.in_flight_of(SHARD) == 1
    assert node.machine.in_flight_of(OTHER_SHARD) == 0
    assert not node.one.queue
    assert not node.two.queue
    assert queued(node.elsewhere) == [there.sequence], "the others go on"
    late = node.publish(A)  # whoever sent it does not know yet
    assert not node.machine.is_clean(SHARD)
    plan = node.record()
    owed = {(i.subscription, i.sequences) for i in plan.owed_inserts}
    assert owed == {(A.id, (waiting.sequence, late.sequence)), (C.id, (waiting.sequence,))}
    assert not node.machine.is_clean(SHARD), "a request is under way"
    node.settle(node.one, [delivery])
    assert not node.machine.is_clean(SHARD), "its outcome is in no record"
    plan = node.plan()
    assert plan.attempts[0].sequences == (flying.sequence,)
    assert not node.machine.is_clean(SHARD), "the record may fail"
    node.write(plan)
    node.machine.recorded(plan)
    assert node.machine.is_clean(SHARD)
    assert not node.machine.is_clean(OTHER_SHARD)


def test_a_change_of_configuration_wakes_no_shard_that_is_leaving() -> None:
    node = Both()
    node.machine.pause_shard(SHARD)
    node.pause(A)
    node.pause(A, paused=False)
    node.publish(A)
    assert not node.one.queue
    node.machine.keep_shard(SHARD)
    assert node.one in node.configure()
    node.record()
    node.claim(node.one)
    assert len(node.load(node.one)) == 1


def test_the_owed_rows_of_a_shard_that_is_leaving_are_ended_by_its_next_owner() -> None:
    node, _ = overflowing(owed=2)
    node.delete(A)
    node.machine.pause_shard(SHARD)
    assert node.machine.deleted() == []
    assert node.machine.end_rows(node.machine.look(), node.found(), expired_below=None) == 0
    node.machine.keep_shard(SHARD)
    assert node.machine.deleted() == [(SHARD, A.id)]
    assert node.machine.end_rows(node.machine.look(), node.found(), expired_below=None) == 2


def test_of_a_forgotten_shard_nothing_is_left() -> None:
    node = Both()
    node.publish(A, C)
    node.publish_there(A)
    node.machine.pause_shard(SHARD)
    node.record()
    node.machine.forget_shard(SHARD)
    machine = node.machine
    assert set(machine.windows) == {OTHER_SHARD}
    assert {key[0] for key in machine.lanes} == {key[0] for key in machine.routes} == {OTHER_SHARD}
    assert machine.held_bytes == 10, "what the other shard has"
    # It may come back, with what the log says.
    machine.configure(SHARD, 1, list(node.endpoints.values()), list(node.subscriptions.values()), 2)
    assert machine.lanes[SHARD, 1] is not node.one
    assert machine.routes[SHARD, A.id].active


def test_what_is_forgotten_by_force_is_let_go_wherever_it_was() -> None:
    """Its next owner sends it again; this node writes nothing of it any more, and holds no payload."""
    node = Both(Limits(lane_deliveries_max=2))
    for _ in range(4):  # two in the queue, two spilled
        node.publish(A)
    (flying,) = node.machine.take(node.one)
    node.send(node.one, FAILED)  # to be owed
    node.publish(C)
    node.send(node.two)  # an outcome that is in no record
    there = node.publish_there(A)
    node.machine.pause_shard(SHARD)  # parks what waits
    node.machine.forget_shard(SHARD)
    assert node.machine.unrecorded() == 0
    assert node.machine.held_bytes == 20, "what is in flight and what the other shard has"
    settled = node.machine.settle(node.one, [flying], DELIVERED, lambda *_: None)
    assert (settled.retried, settled.dead) == (0, 0)
    assert node.machine.held_bytes == 10
    node.send(node.elsewhere)
    plan = node.record()
    assert [shard.shard for shard in plan.shards] == [OTHER_SHARD]
    assert [attempt.sequences for attempt in plan.attempts] == [(there.sequence,)]
    assert not plan.owed_inserts
    assert not plan.dead_letters


def test_a_lane_forgotten_by_force_in_the_middle_of_a_reading_is_no_error() -> None:
    node, sequences = overflowing(owed=2)
    node.claim(node.one)
    loading = node.machine.to_load(node.one, 1)
    events = {sequences[0]: loaded_event(sequences[0])}
    node.machine.pause_shard(SHARD)
    assert not node.machine.is_clean(SHARD), "it is being read for"
    node.machine.forget_shard(SHARD)
    node.machine.loaded(node.one, loading, events, None)
    assert not node.one.queue
    assert node.machine.held_bytes == 0
    assert node.machine.to_load(node.one, 10) == []


def test_what_was_found_for_a_lane_that_is_gone_is_not_claimed() -> None:
    node, _ = overflowing(owed=2)
    query = node.machine.catch_up_query(node.one, node.us)
    assert query is not None
    node.machine.pause_shard(SHARD)
    node.machine.forget_shard(SHARD)
    # It came back meanwhile, with other lanes.
    node.configure()
    node.machine.windows[SHARD] = Window(SHARD, 3, 0, 0, 0)
    node.machine.claim(node.one, query, node.found(), None, None)
    assert not node.one.rows
    assert not node.machine.lanes[SHARD, 1].rows


def test_a_look_from_before_a_shard_was_away_ends_nothing_of_it() -> None:
    """What was found then may have been settled by the other owner since."""
    node, _ = overflowing(owed=2)
    node.delete(A)
    look, empty_look = node.machine.look(), node.machine.look()
    found = node.found()
    node.machine.pause_shard(SHARD)
    node.machine.forget_shard(SHARD)
    node.configure()
    node.machine.restore_owed(SHARD, A.id, 1, 2, None)
    node.machine.windows[SHARD] = Window(SHARD, 3, 0, 0, 0)
    assert node.machine.end_rows(look, found, expired_below=None) == 0
    node.machine.cancelled_all(SHARD, A.id, empty_look)
    assert node.machine.deleted() == [(SHARD, A.id)]
